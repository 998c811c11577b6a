"""Callbacks for any `transformers.Trainer`: the optimizer's inner quantities in the log, and no bad checkpoint."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_momentum.errors import TrainingStopped
from hf_momentum.optim import MomentumOptimizer


class DynamicsCallback(TrainerCallback):
    """Adds the optimizer's `dynamics()` to every training log: TAM's cosine and damping, and so on.

    The values are read back once per logging step; in between nothing waits for the device. `attach` places the
    callback before the reporters, so that TensorBoard, Weights & Biases and the JSON history all see the numbers.

    Example:
        >>> callback = DynamicsCallback()  # then: callback.attach(trainer)
    """

    def attach(self, trainer: Trainer) -> None:
        """Make `trainer` log the dynamics; works with any Trainer."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Extend a training log (not one of an evaluation) in place."""
        if logs is None or "loss" not in logs:
            return
        base = unwrapped(optimizer)
        if not isinstance(base, MomentumOptimizer):
            return
        dynamics = base.dynamics()
        if not dynamics:
            return
        values = torch.stack([value.float() for value in dynamics.values()]).tolist()  # one read-out for all
        named = dict(zip(dynamics, values, strict=True))
        logs.update(named)
        state.log_history[-1].update(named)


class FiniteCheckpointCallback(TrainerCallback):
    """Refuses to save weights that are not finite, so that the last checkpoint is always a good one."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check the trained weights when a save is due.

        Raises:
            TrainingStopped: a weight is NaN or infinite.
        """
        if not control.should_save:
            return
        trained = [param for param in model.parameters() if param.requires_grad]
        if not all(bool(torch.isfinite(param).all()) for param in trained):
            raise TrainingStopped(
                f"the weights are not finite after step {state.global_step}; nothing was saved. Lower learning_rate, "
                "or set max_grad_norm"
            )


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper, or itself.

    Example:
        >>> unwrapped("anything else")
        'anything else'
    """
    from accelerate.optimizer import AcceleratedOptimizer

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
