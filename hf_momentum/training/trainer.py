"""`MomentumTrainer`: a Trainer that knows our optimizers by the public road and stops at a non-finite loss."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_momentum.errors import TrainingStopped
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.integrations.transformers_hook import from_training_arguments
from hf_momentum.optim.ahb import ObservesGradients
from hf_momentum.training.arguments import MomentumTrainingArguments
from hf_momentum.training.callbacks import (
    DynamicsCallback,
    FiniteCheckpointCallback,
    MomentumScheduleCallback,
    unwrapped,
)
from hf_momentum.training.checkpoints import check_checkpoint, find_checkpoint, last_complete, rotate, write_manifest


class MomentumTrainer(Trainer):
    """transformers' Trainer with six additions.

    Registered optimizer names work without touching transformers' private tables; the optimizer's inner quantities
    are logged with the loss; a non-finite loss stops the run at once, before the weights move, and weights that are
    not finite are never saved; evaluating before training leaves the processes synchronised;
    AHB's optimizers take their gradient differences before gradients are clipped; and a checkpoint is declared complete
    in its last moment, so that resuming passes over one that a dying process left half written.

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, also after an evaluation.

        Evaluating a fresh Trainer marks the model as prepared without wrapping it for DDP (transformers 5.23 with
        accelerate 1.15). Training would then find it prepared, leave it unwrapped, and every process would train
        on its own gradients, silently. The mark is taken off first.

        Args:
            resume_from_checkpoint: a checkpoint's path, or True for the last complete one in the output folder.
            *args: as in transformers.
            **kwargs: as in transformers.

        Raises:
            InputError: the checkpoint is torn or does not fit this run.
        """
        unwrapped = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        vars(unwrapped).pop("_is_accelerate_prepared", None)
        speak = self.is_world_process_zero()
        checkpoint = find_checkpoint(resume_from_checkpoint or None, self.args.output_dir, speak)
        if checkpoint is not None and not self.args.save_only_model:
            name = str(getattr(self.args.optim, "value", self.args.optim))
            check_checkpoint(checkpoint, name, self.args.world_size, self.accelerator.distributed_type.value)
        return super().train(checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, wait for every process, and only then declare the checkpoint complete and delete older ones."""
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # left by an earlier run: its manifest would vouch for a mixture of old and new files
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            self._save_descriptions(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder, self.state.global_step, self.args.world_size)
            rotate(run, limit, keep=[folder, self.state.best_model_checkpoint])

    def _save_descriptions(self, folder: Path) -> None:
        """Configurations and tokenizer, which transformers leaves out of a checkpoint of shards."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            if not (folder / "adapter_config.json").is_file():
                adapter = copy.copy(model.peft_config[model.active_adapter])
                adapter.inference_mode = True  # as PEFT itself saves it: who loads an adapter means to use it
                adapter.save_pretrained(str(folder))
        elif isinstance(model, PreTrainedModel) and not (folder / "config.json").is_file():
            model.config.save_pretrained(folder)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
        if self.processing_class is not None and not (folder / "tokenizer_config.json").is_file():
            self.processing_class.save_pretrained(folder)

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
        value = loss.item()
        if not math.isfinite(value):
            kept = last_complete(self.args.output_dir, speak=False)
            raise TrainingStopped(
                f"loss is {value} at step {self.state.global_step + 1}; the step was not taken. "
                f"Last good checkpoint: {kept or 'none'}. Lower learning_rate, set max_grad_norm, or look at that batch"
            )
        base = unwrapped(self.optimizer)
        if isinstance(base, ObservesGradients) and self.accelerator.sync_gradients and self.accelerator.scaler is None:
            base.observe_gradients()  # the gradients are whole and not clipped yet; under a scaler they are scaled
        return loss
