"""`--optim tam` in every Trainer: our names in transformers' enum and in its table of optimizers.

transformers offers no public way to add a name. `OptimizerNames` (what `--optim` accepts) and
`_OPTIMIZER_HANDLERS` (what builds it) are extended as soon as transformers itself is imported; importing this
file does not import it. Both are private, so their shape is checked first, and where it does not fit, nothing is
touched and a warning names the tested versions and the public roads.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any

import torch
import wrapt

from hf_momentum.errors import InputError
from hf_momentum.integrations.optim_args import parse_optim_args
from hf_momentum.integrations.registry import OPTIMIZERS, OptimizerSpec, get_spec
from hf_momentum.sharding import SUPPORTED

TESTED_VERSIONS = "5.17 to 5.23"


class HookError(RuntimeError):
    """This version of transformers does not have the tables that `--optim` names are added to."""


def install() -> None:
    """Register the names now if transformers is loaded, else when it is. Safe to call again."""
    wrapt.register_post_import_hook(_or_warn(add_names), "transformers.training_args")
    wrapt.register_post_import_hook(_or_warn(add_handlers), "transformers.trainer_optimizer")
    wrapt.register_post_import_hook(_or_warn(add_callback), "transformers.trainer")


def _or_warn(register: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    # An import must not fail for the sake of a hook: `import transformers` would break for everyone.
    def hook(module: ModuleType) -> None:
        try:
            register(module)
        except HookError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    return hook


def _require(condition: bool, what: str) -> None:
    if not condition:
        installed = importlib.metadata.version("transformers")
        raise HookError(
            f"--optim names of hf-momentum are not available: transformers {installed} has no {what} as expected "
            f"(tested: {TESTED_VERSIONS}). Use hf_momentum.MomentumTrainer, or pass "
            "optimizer_cls_and_kwargs=hf_momentum.optimizer_cls_and_kwargs('tam', lr=...) to any Trainer."
        )


def add_names(training_args: ModuleType) -> None:
    """Add our names to `transformers.training_args.OptimizerNames`.

    Raises:
        HookError: there is no such string enum.
    """
    names = training_args.__dict__.get("OptimizerNames")
    _require(
        isinstance(names, type)
        and issubclass(names, str)
        and issubclass(names, Enum)
        and {"_member_map_", "_member_names_", "_value2member_map_"} <= set(vars(names)),
        "string enum training_args.OptimizerNames",
    )
    for name in OPTIMIZERS:
        if name not in names._value2member_map_:
            _add_member(names, name)
    taken = sorted(foreign_names(training_args) & set(OPTIMIZERS))
    _require(not taken, f"room for an optimizer {taken[0] if taken else ''!r}: it has one of its own; not that name")


def foreign_names(training_args: ModuleType) -> set[str]:
    """The names in `OptimizerNames` that are not ours: transformers' own."""
    members = training_args.__dict__["OptimizerNames"]._value2member_map_
    return {name for name, member in members.items() if "__reduce_ex__" not in vars(member)}


def _add_member(enum: Any, value: str) -> None:
    member = str.__new__(enum, value)
    member._name_, member._value_ = value.upper(), value
    # Pickled arguments (training_args.bin) name this module, not the enum alone: a process that has not imported
    # hf_momentum then does so by loading them, and one that cannot says which module it misses.
    member.__reduce_ex__ = lambda protocol: (restore_name, (value,))
    setattr(enum, member._name_, member)
    enum._member_map_[member._name_] = member
    enum._value2member_map_[value] = member
    enum._member_names_.append(member._name_)


def restore_name(value: str) -> Any:
    """The member of `OptimizerNames` with this value; called when pickled training arguments are loaded."""
    from transformers.training_args import OptimizerNames

    return OptimizerNames(value)


def add_handlers(trainer_optimizer: ModuleType) -> None:
    """Add our handlers to `transformers.trainer_optimizer._OPTIMIZER_HANDLERS`.

    Raises:
        HookError: there is no such table, or handlers are not called with a context that holds `args`.
    """
    table = trainer_optimizer.__dict__.get("_OPTIMIZER_HANDLERS")
    context = trainer_optimizer.__dict__.get("OptimizerContext")
    _require(isinstance(table, dict) and bool(table), "table trainer_optimizer._OPTIMIZER_HANDLERS")
    _require(
        isinstance(context, type) and "args" in getattr(context, "__dataclass_fields__", {}),
        "dataclass trainer_optimizer.OptimizerContext with args",
    )
    for name in OPTIMIZERS:
        table.setdefault(name, _handle)  # never in the place of one of its own


def add_callback(trainer: ModuleType) -> None:
    """Add `WhatRunsCallback` to the callbacks that every Trainer has.

    Raises:
        HookError: there is no such list.
    """
    defaults = trainer.__dict__.get("DEFAULT_CALLBACKS")
    _require(isinstance(defaults, list), "list trainer.DEFAULT_CALLBACKS")
    from hf_momentum.integrations.what_runs import WhatRunsCallback

    if isinstance(defaults, list) and WhatRunsCallback not in defaults:
        defaults.append(WhatRunsCallback)


def _handle(context: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    return from_training_arguments(context.args)


def from_training_arguments(args: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and keyword arguments for a `transformers.TrainingArguments` whose `optim` is one of our names.

    `learning_rate` becomes `lr`; `adam_beta1`, `adam_beta2` and `adam_epsilon` reach the optimizers that have them;
    `optim_args` comes last. Weight decay is left to the Trainer's parameter groups.

    Raises:
        InputError: a bad value in `optim_args`, a value out of range, or a backend that is not supported.
    """
    require_supported_backend()
    spec = get_spec(str(getattr(args.optim, "value", args.optim)))
    return spec.cls, keyword_arguments(spec, args)


def keyword_arguments(spec: OptimizerSpec, args: Any) -> dict[str, Any]:
    """The optimizer's keyword arguments out of training arguments, all checked.

    Raises:
        InputError: a bad value in `optim_args` or a value out of range.
    """
    kwargs: dict[str, Any] = {"lr": args.learning_rate}
    if spec.adam_arguments:
        offered = {"betas": (args.adam_beta1, args.adam_beta2), "beta2": args.adam_beta2, "eps": args.adam_epsilon}
        kwargs |= {name: value for name, value in offered.items() if name in spec.arguments}
    kwargs |= parse_optim_args(spec, args.optim_args)
    spec.check({**kwargs, "weight_decay": args.weight_decay})
    return kwargs


def require_supported_backend(backend: Any = None) -> None:
    """Refuse the distributed backends that no optimizer here was run on.

    Args:
        backend: Accelerate's DistributedType; that of this process unless given.

    Raises:
        InputError: Accelerate runs Megatron-LM or XLA.
    """
    from accelerate import DistributedType, PartialState

    backend = PartialState().distributed_type if backend is None else backend
    if backend in {DistributedType.MEGATRON_LM, DistributedType.XLA}:
        raise InputError(
            f"distributed backend {backend.value}: not tested with optimizers that sum over whole tensors, so refused. "
            f"Supported: {SUPPORTED}"
        )
