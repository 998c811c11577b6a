"""One line at the start of training that says what really runs, and a stop where it is not what was asked for."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_momentum.errors import InputError
from hf_momentum.integrations.registry import OPTIMIZERS, OptimizerSpec
from hf_momentum.optim import MomentumOptimizer
from hf_momentum.optim.base import COMMON


class WhatRunsCallback(TrainerCallback):
    """Looks, after every library has wrapped what it wanted, at the optimizer that is going to step.

    `import hf_momentum` adds it to transformers' default callbacks, so that every Trainer has it. It speaks only where
    one of our optimizers runs or was asked for.

    Example:
        >>> callback = WhatRunsCallback()  # then: Trainer(..., callbacks=[callback])
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Print the line on the main process.

        Raises:
            InputError: another optimizer runs than `--optim` named, or with other options, which the state of a
                checkpoint brought along.
            UnsupportedLayoutError: the parameters lie in a way in which the optimizer would be wrong.
        """
        base, asked = base_optimizer(optimizer), str(getattr(args.optim, "value", args.optim))
        if asked in OPTIMIZERS and type(base) is not OPTIMIZERS[asked].cls and not isinstance(base, MomentumOptimizer):
            raise InputError(
                f"--optim {asked} was asked for, but {type(base).__module__}.{type(base).__name__} is what would run. "
                'An "optimizer" block in a DeepSpeed JSON wins over --optim: remove it, or give it the type '
                f"{OPTIMIZERS[asked].cls.__name__}"
            )
        if asked in OPTIMIZERS and type(base) is OPTIMIZERS[asked].cls and state.global_step > 0:
            _check_options(base, OPTIMIZERS[asked], args.weight_decay)
        if isinstance(base, MomentumOptimizer):
            line = f"hf-momentum: {describe(base)}"
            if state.is_world_process_zero:
                print(line, file=sys.stderr, flush=True)


def _check_options(optimizer: Any, spec: OptimizerSpec, weight_decay: float) -> None:
    """Refuse a resumed run that asks for other options than the checkpoint's, which are those that hold.

    Not for momentum, nor the first beta: a schedule of ours or of torch's may have moved them, as it did the rate.
    """
    groups = optimizer.param_groups
    theirs = {"lr", "momentum", *COMMON}  # COMMON stays as it was typed
    asked = {name: value for name, value in optimizer.defaults.items() if name in spec.arguments and name not in theirs}
    if weight_decay > 0:  # in one group at least; somebody's own groups may have any where it was not asked for
        asked["weight_decay"] = weight_decay

    def differs(name: str, value: Any, group: Mapping[str, Any]) -> bool:
        return bool(value[1:] != group[name][1:] if name == "betas" else value != group[name])

    changed = {name: groups[0][name] for name, value in asked.items() if all(differs(name, value, g) for g in groups)}
    if changed:
        name, value = next(iter(changed.items()))
        raise InputError(
            f"the checkpoint continues with {name}={value}, with which it was saved, not {asked[name]}; resume with "
            "that, or train from the start"
        )


def describe(optimizer: MomentumOptimizer) -> str:
    """Class and layout of an optimizer, in one line.

    Raises:
        UnsupportedLayoutError: the layout is not supported.

    Example:
        >>> from hf_momentum import TAM
        >>> describe(TAM([torch.nn.Parameter(torch.zeros(2))]))
        'TAM on whole tensors: 1 tensor in 1 group; no communication in the step'
    """
    wrapper = "" if optimizer.wrapper is None else f" inside {type(optimizer.wrapper).__name__}"
    return f"{type(optimizer).__name__}{wrapper} on {optimizer.layout().describe()}"


def base_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate and DeepSpeed, or itself.

    Example:
        >>> base_optimizer("anything else")
        'anything else'
    """
    from accelerate.optimizer import AcceleratedOptimizer

    # DeepSpeed's wrappers are no torch optimizers; both keep what they wrap under the same name.
    while isinstance(optimizer, AcceleratedOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    return optimizer
