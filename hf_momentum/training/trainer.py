"""`MomentumTrainer`: a Trainer that knows our optimizers by the public road and stops at a non-finite loss."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_momentum.errors import TrainingStopped
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.integrations.transformers_hook import from_training_arguments
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.optim.ahb import ObservesGradients
from hf_momentum.training.arguments import MomentumTrainingArguments
from hf_momentum.training.callbacks import (
    DynamicsCallback,
    FiniteCheckpointCallback,
    MomentumScheduleCallback,
)


class MomentumTrainer(Trainer):
    """transformers' Trainer with five additions.

    Registered optimizer names work without touching transformers' private tables; the optimizer's inner quantities
    are logged with the loss; a non-finite loss stops the run at once, before the weights move, and weights that are
    not finite are never saved; evaluating before training leaves the processes synchronised;
    and AHB's optimizers take their gradient differences before gradients are clipped.

    Args: those of `transformers.Trainer`.

    Example:
        >>> import torch
        >>> args = MomentumTrainingArguments(output_dir="out", optim="tam", optim_args="gamma=0.95", use_cpu=True)
        >>> cls, kwargs = MomentumTrainer.get_optimizer_cls_and_kwargs(args)
        >>> cls.__name__, kwargs["gamma"]
        ('TAM', 0.95)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.card: str | None = None  # the text that create_model_card writes instead of transformers' own
        self.add_callback(FiniteCheckpointCallback())
        ours = self.args
        if not isinstance(ours, MomentumTrainingArguments):
            DynamicsCallback().attach(self)
            return
        if ours.log_dynamics:
            DynamicsCallback(ours.log_dynamics_per_layer, ours.log_update_norm).attach(self)
        if ours.momentum_schedule is not None:
            self.add_callback(MomentumScheduleCallback(ours.momentum_schedule, ours.momentum_schedule_args))

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Class and arguments for `args.optim`, ours or one of transformers' own."""
        if args.optim in OPTIMIZERS:
            return from_training_arguments(args)
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `self.card` as the model card, also when pushing to the Hub; without one, transformers' own."""
        if self.card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            (Path(self.args.output_dir) / "README.md").write_text(self.card, encoding="utf-8")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, also after an evaluation.

        Evaluating a fresh Trainer marks the model as prepared without wrapping it for DDP (transformers 5.23 with
        accelerate 1.15). Training would then find it prepared, leave it unwrapped, and every process would train
        on its own gradients, silently. The mark is taken off first.
        """
        unwrapped = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        vars(unwrapped).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch.

        Raises:
            TrainingStopped: the loss is NaN or infinite, or several processes train without synchronisation.
        """
        replicated = self.accelerator.distributed_type.value.startswith("MULTI_")
        if replicated and not any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise TrainingStopped(
                f"{self.args.world_size} processes were launched, but the model is not wrapped for them "
                f"({type(model).__name__}): each would train apart. Start the run anew from a fresh Trainer"
            )
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._require_finite(loss)
        base = base_optimizer(self.optimizer)
        # Under DeepSpeed the step has been taken already; the optimizer then undoes DeepSpeed's clipping by itself.
        observes = isinstance(base, ObservesGradients) and not self.is_deepspeed_enabled
        if observes and self.accelerator.sync_gradients and self.accelerator.scaler is None:
            base.observe_gradients()  # the gradients are whole and not clipped yet; under a scaler they are scaled
        return loss

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Forward pass; under DeepSpeed, which steps at the end of the backward pass, the loss is looked at here.

        Raises:
            TrainingStopped: the loss of a training batch is NaN or infinite.
        """
        result = super().compute_loss(model, *args, **kwargs)
        if model.training and self.is_deepspeed_enabled:
            self._require_finite(result[0] if isinstance(result, tuple) else result)
        return result

    def _require_finite(self, loss: torch.Tensor) -> None:
        value = loss.item()
        if not math.isfinite(value):
            kept = get_last_checkpoint(self.args.output_dir)
            raise TrainingStopped(
                f"loss is {value} at step {self.state.global_step + 1}; the step was not taken. "
                f"Last good checkpoint: {kept or 'none'}. Lower learning_rate, set max_grad_norm, or look at that batch"
            )
