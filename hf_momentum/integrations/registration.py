"""Optimizers of one's own under the registry's roof: `register`, and packages that are found when ours is imported."""

import importlib.metadata
import inspect
import re
import sys
import warnings

import torch

from hf_momentum.errors import InputError
from hf_momentum.integrations import registry, transformers_hook
from hf_momentum.integrations.registry import OptimizerSpec

ENTRY_POINTS = "hf_momentum.optimizers"
"""The entry points whose modules are imported with `hf_momentum`, so that every program knows what they register."""


def register(spec: OptimizerSpec) -> OptimizerSpec:
    """Make an optimizer of your own known under `spec.name`, as ours are: `--optim`, recipes, `create_optimizer`.

    It holds for this process. A package that names its module in the entry points `hf_momentum.optimizers` is imported
    together with `hf_momentum`, so that the command line and the processes that it starts know the name too.

    Args:
        spec: name, class, one line of summary, source, and whether `--adam_beta1` and so on mean its `betas` and `eps`.
            The class is a `torch.optim.Optimizer` whose arguments are annotated and have defaults, `lr` and
            `weight_decay` among them; one that derives from `hf_momentum.optim.MomentumOptimizer` runs in every layout.

    Returns:
        `spec`.

    Raises:
        InputError: the name is taken, by us or by transformers, or is none that can be typed; or the class cannot be
            built from annotated arguments with defaults.

    Example:
        >>> class Slow(torch.optim.SGD):
        ...     def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0):
        ...         super().__init__(params, lr, weight_decay=weight_decay)
        >>> register(OptimizerSpec("tam", Slow, "Plain SGD.", "", adam_arguments=False))
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: an optimizer 'tam' is there already (hf_momentum.optim.tam.TAM); ...
    """
    _check_name(spec.name)
    _check_class(spec)
    registry.add(spec)
    transformers_hook.install()  # what is loaded already learns the name now
    return spec


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(f"optimizer name {name!r}: write small letters, digits and _, as in 'my_optimizer'")
    if name in registry.OPTIMIZERS:
        cls = registry.OPTIMIZERS[name].cls
        raise InputError(
            f"an optimizer {name!r} is there already ({cls.__module__}.{cls.__qualname__}); take another name"
        )
    loaded = sys.modules.get("transformers.training_args")  # not loaded for this: the hook looks again when it is
    if loaded is not None and name in transformers_hook.foreign_names(loaded):
        raise InputError(f"transformers has an optimizer {name!r} of its own; take another name")


def _check_class(spec: OptimizerSpec) -> None:
    cls = spec.cls
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise InputError(f"{spec.name}: cls must be a subclass of torch.optim.Optimizer, got {cls!r}")
    parameters = inspect.signature(cls.__init__).parameters
    missing = [name for name in ("lr", "weight_decay") if name not in parameters]
    if missing:
        raise InputError(f"{spec.name}: {cls.__name__} has no argument {missing[0]!r}; every Trainer sets it")
    for name, parameter in list(parameters.items())[2:]:  # after self and the parameters
        if parameter.default is parameter.empty or parameter.annotation is parameter.empty:
            raise InputError(
                f"{spec.name}: argument {name!r} of {cls.__name__} needs a type and a default, as in "
                f"`{name}: float = 0.9`; --optim_args is read by them"
            )
    if spec.adam_arguments and not {"betas", "beta2"} & set(parameters):
        raise InputError(f"{spec.name}: adam_arguments is true, but {cls.__name__} has neither betas nor beta2")
    spec.check({})


def load_plugins() -> None:
    """Import the modules that installed packages name in the entry points `hf_momentum.optimizers`; they register.

    One that fails is left out with a warning: an import of ours must not fail for somebody else's module.
    """
    for found in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            found.load()
        except Exception as error:
            warnings.warn(
                f"hf-momentum: the optimizers of {found.value!r} (entry point {found.name!r}) are missing: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
