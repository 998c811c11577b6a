"""`MomentumTrainer`: a Trainer that knows our optimizers by the public road and stops at a non-finite loss."""

import copy
import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments, __version__
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from hf_momentum.errors import InputError, TrainingStopped
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.integrations.transformers_hook import from_training_arguments
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.optim import MomentumOptimizer
from hf_momentum.optim.ahb import ObservesGradients
from hf_momentum.training.arguments import MomentumTrainingArguments
from hf_momentum.training.callbacks import (
    DynamicsCallback,
    FiniteCheckpointCallback,
    MomentumScheduleCallback,
)
from hf_momentum.training.checkpoints import (
    PLAIN,
    check_checkpoint,
    find_checkpoint,
    kind_of,
    last_complete,
    rotate,
    write_manifest,
)
from hf_momentum.training.hub_client import one_line, patiently
from hf_momentum.training.layer_log import LayerGradientLog
from hf_momentum.training.processes import check_launch
from hf_momentum.training.whole import load_whole

# The step of transformers' Trainer between preparing a model and training it, as it is called there.
_PREPARE = ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"]


class MomentumMixin:
    """Ten additions to transformers' Trainer, or to one made from it: written before it among a class's bases.

    Registered optimizer names work without touching transformers' private tables; the optimizer's inner quantities
    are logged with the loss; a non-finite loss stops the run at once, before the weights move, and weights that are
    not finite are never saved; evaluating before training leaves the processes synchronised; AHB's optimizers take
    their gradient differences before gradients are clipped; this package's optimizers clip inside their step where
    nothing else has to (`clips_inside`), which makes one pass less; a function can look at the prepared
    model before its first step, also where it is sharded; `save_model` writes whole weights from shards; a launch whose
    sharding Accelerate left out is refused; and a checkpoint is declared complete in its last moment, so that resuming
    passes over one that a dying process left half written.

    Args: those of the Trainer.

    Attributes:
        before_training: called once when the next `train` has prepared the model. Under FSDP and DeepSpeed that is
            the only place to evaluate an untrained model, because Accelerate prepares model and optimizer together,
            once; a checkpoint is loaded into the model afterwards. Elsewhere its weights are loaded before.
        card: the text that `create_model_card` writes instead of transformers' own.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> class Mine(MomentumMixin, Seq2SeqTrainer): ...
        >>> Mine.get_optimizer_cls_and_kwargs(MomentumTrainingArguments(output_dir="out", optim="tam", use_cpu=True))[0]
        <class 'hf_momentum.optim.tam.TAM'>
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_launch(self.accelerator.state)
        self.card: str | None = None
        self.before_training: Callable[[], None] | None = None
        self.add_callback(FiniteCheckpointCallback())
        ours = self.args
        if not isinstance(ours, MomentumTrainingArguments):
            DynamicsCallback().attach(self)
            return
        if ours.log_dynamics:
            DynamicsCallback(ours.log_dynamics_per_layer, ours.log_update_norm).attach(self)
        if ours.log_layers:
            LayerGradientLog(ours.log_layers_split).attach(self)
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

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository to push to, as transformers does, but with patience.

        Raises:
            InputError: the Hub refuses, or cannot be reached.
        """
        name = str(self.args.hub_model_id or self.args.output_dir)
        with one_line(name, "nothing was trained yet; leave --push_to_hub out, or mend it"):
            patiently(lambda: super(MomentumMixin, self).init_hf_repo(*args, **kwargs))

    @property
    def sharded(self) -> bool:
        """Whether FSDP or DeepSpeed prepares the model, together with its optimizer."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model so that `from_pretrained` can read it, whole, also under FSDP with sharded checkpoints.

        Checkpoints during training stay sharded there. All processes must call it.
        """
        if self.is_fsdp_enabled and not _internal_call:
            kind = self.accelerator.state.fsdp_plugin.state_dict_type
            if "FULL_STATE_DICT" not in str(kind):  # with that one transformers gathers by itself
                self._save(output_dir or self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.sharded and state_dict:
            # In a gathered state dict tied weights are tensors of their own, and would be written twice.
            every = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
            tied = every - {name for name, _ in self.model.named_parameters()}
            state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

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
            InputError: the checkpoint is torn or does not fit this run; or `before_training` is set, and this version
                of transformers prepares a model in another way.
        """
        prepare = vars(Trainer).get("_prepare_for_training")
        if self.before_training and (prepare is None or list(inspect.signature(prepare).parameters) != _PREPARE):
            raise InputError(
                f"transformers {__version__} prepares a model in a way that is not known here, so it cannot be "
                "evaluated before training; use transformers 5.17 to 5.23"
            )
        unwrapped = self.accelerator.unwrap_model(self.model)
        vars(unwrapped).pop("_is_accelerate_prepared", None)
        # Accelerate's own way back from autocast (keep_fp32_wrapper=False) would take TRL's forward off with it.
        if "_original_forward" in vars(unwrapped):
            unwrapped.forward = vars(unwrapped).pop("_original_forward")
        speak = self.is_world_process_zero()
        checkpoint = find_checkpoint(resume_from_checkpoint or None, self.args.output_dir, speak)
        if checkpoint is not None and not self.args.save_only_model:
            name = str(getattr(self.args.optim, "value", self.args.optim))
            launched = self.accelerator.distributed_type.value
            check_checkpoint(checkpoint, name, self.args.world_size, launched, self.args.learning_rate)
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
        self._save_pieces(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder, self.state.global_step, self.args.world_size)
            rotate(run, limit, keep=[folder, self.state.best_model_checkpoint])

    def _save_pieces(self, folder: Path) -> None:
        """Under ZeRO, which part of which tensor lies where in the flat partitions of this process."""
        base = base_optimizer(self.optimizer)
        if not isinstance(base, MomentumOptimizer) or self.args.save_only_model:
            return
        names = {id(param): name for name, param in self.accelerator.unwrap_model(self.model).named_parameters()}
        table = base.piece_table(names)
        if table is not None:
            processes = {"process": self.args.process_index, "processes": self.args.world_size}
            (folder / f"pieces-rank{self.args.process_index}.json").write_text(json.dumps({**processes, **table}))

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

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        look, self.before_training = self.before_training, None
        whole = resume_from_checkpoint is not None and self.sharded and kind_of(resume_from_checkpoint) == PLAIN
        if look is None and not whole:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if look is not None:
            look()
        if whole:
            folder = Path(str(resume_from_checkpoint))
            load_whole(self.accelerator.unwrap_model(self.model), base_optimizer(self.optimizer), folder)
            self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        elif resume_from_checkpoint is not None:
            # As the overridden method does at its end.
            if self.is_deepspeed_enabled:
                strict = not isinstance(self.model, PeftModel)  # an adapter's checkpoint leaves its base model out
                deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=strict)
            elif self.is_fsdp_enabled:
                self._load_from_checkpoint(resume_from_checkpoint, self.model_wrapped)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    @property
    def clips_inside(self) -> bool:
        """Whether the optimizer clips, and not the trainer before it.

        So it is for this package's optimizers wherever the trainer would clip (`max_grad_norm` > 0), but for DeepSpeed,
        which clips by itself, a GradScaler, whose gradients are still scaled, and weights with a gradient that the
        optimizer does not have, whose norm it cannot know.
        """
        base = base_optimizer(self.optimizer)
        if not isinstance(base, MomentumOptimizer) or self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            return False
        held = {id(param) for group in base.param_groups for param in group["params"]}
        return all(id(param) in held for param in self.model.parameters() if param.requires_grad)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """The norm before clipping; where the optimizer clips, a tensor that its step fills in."""
        base = base_optimizer(self.optimizer)
        if not self.clips_inside:
            # Under DeepSpeed the step has been taken already; the optimizer then undoes DeepSpeed's clipping by itself.
            if (
                isinstance(base, ObservesGradients)
                and not self.is_deepspeed_enabled
                and self.accelerator.scaler is None
            ):
                base.observe_gradients()  # the gradients are whole and not clipped yet; under a scaler they are scaled
            return super()._clip_grad_norm(model)
        for group in base.param_groups:
            if group["max_grad_norm"] is None:  # one given in optim_args stands
                group["max_grad_norm"] = self.args.max_grad_norm
        norm = torch.zeros((), device=self.args.device)

        def fill(*_: Any) -> None:
            norm.copy_(base.grad_norm)
            handle.remove()

        handle = base.register_step_post_hook(fill)
        return norm

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
            kept = last_complete(self.args.output_dir, speak=False)
            raise TrainingStopped(
                f"loss is {value} at step {self.state.global_step + 1}; the step was not taken. "
                f"Last good checkpoint: {kept or 'none'}. Lower learning_rate, set max_grad_norm, or look at that batch"
            )


class MomentumTrainer(MomentumMixin, Trainer):
    """transformers' Trainer with the additions of `MomentumMixin`.

    Example:
        >>> import torch
        >>> args = MomentumTrainingArguments(output_dir="out", optim="tam", optim_args="gamma=0.95", use_cpu=True)
        >>> cls, kwargs = MomentumTrainer.get_optimizer_cls_and_kwargs(args)
        >>> cls.__name__, kwargs["gamma"]
        ('TAM', 0.95)
    """
