"""`BloopTrainer`: a main and an auxiliary objective, whose gradients become one before the optimizer steps.

on_step_begin      batches of every auxiliary, their forward and backward passes        (order="paper": first)
training_step      the main micro-batches, as the Trainer does them
last of them       the surgery's last word; then the Trainer clips and steps
"""

import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_momentum.errors import InputError, TrainingStopped
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.sharding import ReducedGradients, reduced_gradients
from hf_momentum.surgery import (
    SURVIVES,
    TOLERATED,
    Regulariser,
    Settings,
    Surgery,
    make_surgery,
    survives,
    weights_of,
)
from hf_momentum.training.arguments import BloopArguments
from hf_momentum.training.auxiliary import GlobalOrder, auxiliary_loader, check_auxiliary, named
from hf_momentum.training.trainer import MomentumTrainer

_LOGGER = logging.getLogger("hf_momentum")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Auxiliary:
    """One auxiliary objective.

    Attributes:
        name: for logs and checkpoints.
        lam: weight of its gradient.
        dataset, collator: its examples; None where it is a loss on the main batch, or of the weights.
        batches: the rest of the run's batches on this process.
        regulariser: for a loss of the weights alone.
    """

    name: str
    lam: float
    dataset: Any = None
    collator: Any = None
    batches: Iterator[Any] | None = None
    regulariser: Regulariser | None = field(default=None, repr=False)


class BloopMixin:
    """Auxiliary objectives for any `transformers.Trainer`; put it before the Trainer among the bases.

    Every optimizer, accumulation, clipping (of the combined gradient, once), mixed precision, PEFT and gradient
    checkpointing work as without it, in one process, DDP, FSDP2, HSDP, DeepSpeed ZeRO-0 to 3 and offload. The average
    of main gradients travels in the optimizer's state, sharded like the parameters, and in every checkpoint.

    Logged beside the loss: `aux_loss`, `aux_cosine` (auxiliary gradient and average), `removed_fraction` (of its
    squared norm), `noise_ratio` n of the main gradient, `rho`. With several auxiliaries `aux_loss_<name>`, and a number
    behind the others. A warning says when rho is too large for the noise, and which value to use.

    Args:
        bloop: how; see `BloopArguments`.
        aux_train_dataset: auxiliary examples: a dataset, or several by name, the most important first.
        aux_data_collator: makes a batch of them; one, or by name; the Trainer's own unless given.
        aux_loss_func: `f(model, inputs)` for the auxiliary batch, or, without a dataset, for the main one. In a
            subclass, override `compute_aux_loss` instead.
        *args: of the Trainer.
        **kwargs: of the Trainer.

    Raises:
        InputError: an argument or dataset that cannot be used.

    Example:
        >>> from trl import DPOTrainer
        >>> class BloopDPOTrainer(BloopMixin, DPOTrainer):
        ...     "Preferences as the main objective, a second set of them as the auxiliary one."
    """

    def __init__(
        self,
        *args: Any,
        bloop: BloopArguments | None = None,
        aux_train_dataset: Any = None,
        aux_data_collator: Any = None,
        aux_loss_func: Callable[[nn.Module, dict[str, Any]], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        self.bloop = bloop or BloopArguments()
        self._aux_loss_func = aux_loss_func
        self.auxiliaries: list[Auxiliary] = []
        self.surgery: Surgery | None = None
        self._objective = 0
        self._samples = 0
        self._given: list[list[weakref.ref[Any]]] = []
        self._carrier: Any = None
        self._gradients: ReducedGradients | None = None
        self._last_of_objective = self._last_pass = False
        self._coming: tuple[list[Any], Any] = ([], None)
        self._warned = False
        super().__init__(*args, **kwargs)
        self._callback = SurgeryCallback(self)
        self.add_callback(self._callback)
        self.auxiliaries = self._make_auxiliaries(aux_train_dataset, aux_data_collator)
        self.settings = self._make_settings()

    # ---- what there is to do ---------------------------------------------------------------------------------------

    def _make_auxiliaries(self, given: Any, collators: Any) -> list[Auxiliary]:
        datasets = given if isinstance(given, dict) else {} if given is None else {"aux": given}
        names = list(datasets)
        found = [Auxiliary(name, 0.0) for name in names]
        for one, collator in zip(found, named(collators, names, self.data_collator), strict=True):
            check_auxiliary(one.name, datasets[one.name])
            one.dataset, one.collator = self.prepare_auxiliary(datasets[one.name], one.name), collator
            check_auxiliary(one.name, one.dataset)
        own = type(self).compute_aux_loss is not BloopMixin.compute_aux_loss or self._aux_loss_func is not None
        if not found and own:
            found.append(Auxiliary("main_batch", 0.0))
        if self.bloop.aux_loss is not None:
            found.append(Auxiliary(self.bloop.aux_loss, 0.0))
        if not found:
            raise InputError(
                "there is no auxiliary objective: give aux_train_dataset, aux_loss_func or BloopArguments(aux_loss=...)"
            )
        weights = weights_of(self.bloop.lam, [one.name for one in found])
        for one, lam in zip(found, weights, strict=True):
            one.lam = lam
        Settings(lam=weights)  # refuses negative ones before those of weight 0 are left out
        return [one for one in found if one.lam > 0]

    def _make_settings(self) -> Settings:
        bloop = self.bloop
        if bloop.surgery == "replay":
            raise InputError(
                "surgery 'replay' mixes examples and no gradients: give a ReplayMixture as train_dataset to a plain "
                "Trainer"
            )
        scaled = self.accelerator.scaler is not None or (self.is_deepspeed_enabled and self.args.fp16)
        return Settings(
            lam=tuple(one.lam for one in self.auxiliaries),
            surgery=bloop.surgery,
            rho=parse_rho(bloop.rho),
            order=bloop.ema_order,
            init=bloop.ema_init,
            dtype=_DTYPES[bloop.ema_dtype],
            metric=bloop.surgery_metric,
            # A loss scaler overflows as a matter of course, and then nothing may have moved.
            intact=bloop.skip_nonfinite or scaled or any(self._is_regulariser(one) for one in self.auxiliaries),
        )

    @staticmethod
    def _is_regulariser(one: Auxiliary) -> bool:
        return one.dataset is None and one.name in ("l2", "distance")

    def prepare_auxiliary(self, dataset: Any, name: str) -> Any:
        """Make an auxiliary dataset's rows fit the model; by default columns that it does not take are left out.

        Raises:
            InputError: none of the columns is one that the model takes.
        """
        import datasets

        if isinstance(dataset, datasets.Dataset) and self._aux_loss_func is None:
            try:
                return self._remove_unused_columns(dataset, description=f"auxiliary ({name})")
            except ValueError as error:
                raise InputError(
                    f"auxiliary dataset {name!r} has the columns {', '.join(dataset.column_names)}, none of which the "
                    "model takes; tokenize it like the main one"
                ) from error
        return dataset

    def compute_aux_loss(
        self, model: nn.Module, inputs: dict[str, Any], name: str, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of an auxiliary batch, or without auxiliary dataset of the main one; override for another loss.

        Args:
            model: as prepared.
            inputs: a batch on the right device.
            name: which auxiliary.
            num_items_in_batch: as in `Trainer.compute_loss`.
        """
        if self._aux_loss_func is not None:
            return self._aux_loss_func(model, inputs)
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    def auxiliary_context(self) -> AbstractContextManager[Any]:
        """Entered around `compute_aux_loss`, for Trainers whose `compute_loss` does more than that."""
        return nullcontext()

    # ---- where the Trainer calls -----------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, which from now on carries the surgery's averages in its state."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.auxiliaries and self.surgery is None:
            base = base_optimizer(optimizer)
            self._given = [[weakref.ref(param) for param in group["params"]] for group in base.param_groups]
            self._carry(base)
        return optimizer

    def _carry(self, base: torch.optim.Optimizer) -> None:
        self._carrier, self.surgery = base, make_surgery(base, self.settings, steps=1)
        for one in self.auxiliaries:
            if self._is_regulariser(one):
                one.regulariser = Regulariser(one.name, base)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The main micro-batches of one update, remembered for a second loss on them."""
        found = super().get_batch_samples(*args, **kwargs)
        if self._objective == 0:
            self._coming = found
        return found

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one main micro-batch; after the last one the gradients are made one.

        Raises:
            TrainingStopped: a gradient is not finite.
        """
        if self._objective == 0 and self.surgery is not None:
            self._last_pass = self.accelerator.sync_gradients and self.surgery.sequence[-1] == 0
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._objective == 0 and self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self._after_main()
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The main loss, or while an auxiliary objective is run its loss times its weight.

        Raises:
            InputError: the auxiliary loss cannot be computed, or has no gradient.
        """
        if self._objective == 0:
            return super().compute_loss(model, inputs, *args, **kwargs)
        one = self.auxiliaries[self._objective - 1]
        try:
            with self.auxiliary_context():
                loss = self.compute_aux_loss(model, inputs, one.name, kwargs.get("num_items_in_batch"))
        except (TypeError, KeyError, ValueError) as error:
            if self.state.global_step > 0:
                raise
            columns = ", ".join(inputs) if isinstance(inputs, dict) else type(inputs).__name__
            raise InputError(
                f"auxiliary {one.name!r}: no loss can be computed from its batches ({columns}): "
                f"{' '.join(str(error).split())}. Tokenize it like the main data, or give aux_loss_func"
            ) from error
        if not (isinstance(loss, torch.Tensor) and loss.requires_grad):
            raise InputError(
                f"auxiliary {one.name!r}: its loss has no gradient, so it can change nothing. Compute it from the "
                "model's outputs, and not under torch.no_grad() or from detached tensors"
            )
        return one.lam * loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with what the surgery has measured since the last training log."""
        if "loss" in logs and self.surgery is not None:
            logs |= self._measured()
        super().log(logs, *args, **kwargs)

    # ---- one update ------------------------------------------------------------------------------------------------

    def _begin(self, state: TrainerState) -> None:
        """Before the first step, when model and optimizer are prepared and a checkpoint is loaded."""
        if not self.auxiliaries:
            return
        base = base_optimizer(self.optimizer)
        if self.surgery is None:
            raise InputError(
                f"{type(base).__name__} was not built by this Trainer, so that its parameters cannot be told apart; "
                "remove the optimizer block from the DeepSpeed JSON, and name it by --optim"
            )
        if base is not self._carrier:  # with offload Accelerate puts DeepSpeedCPUAdam in the place of torch's AdamW
            self._carry(base)
        self.surgery.steps = state.max_steps
        self._callback.continue_from(state)
        scaler = self.accelerator.scaler
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        self._gradients = reduced_gradients(engine, base, self._given, None if scaler is None else scaler.get_scale)
        if engine is not None:
            self.accelerator.deepspeed_engine_wrapped = _SurgeryEngine(engine, self)
        for one in self.auxiliaries:
            if one.dataset is not None:
                one.batches = iter(self._loader(one))

    def _loader(self, one: Auxiliary) -> Any:
        args = self.args
        order = GlobalOrder(
            len(one.dataset),
            self._aux_batch_size,
            args.world_size,
            args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffled=self.bloop.aux_sampling == "shuffled",
            start=self._samples,
        )
        workers, pin = args.dataloader_num_workers, args.dataloader_pin_memory
        return auxiliary_loader(one.dataset, one.collator, order, workers, pin)

    @property
    def _aux_batch_size(self) -> int:
        return self.bloop.aux_batch_size or self.args.train_batch_size

    def _before_main(self) -> None:
        """The auxiliary objectives that come before the main one."""
        if self.surgery is None or self._gradients is None:
            return
        self._gradients.drop()  # some wrappers keep those of the last step
        for objective in self.surgery.sequence:
            if objective == 0:
                break
            self._run(objective, last=False)

    def _after_main(self) -> bool:
        """The surgery on the main gradient, and the objectives that come after it.

        Returns:
            Whether the step is to be taken.
        """
        if self.surgery is None or self._gradients is None:
            return True
        for k, one in enumerate(self.auxiliaries, start=1):
            if one.regulariser is not None:
                pieces, loss = one.regulariser.gradient(self._gradients, one.lam)
                self.surgery.give(k, pieces)
                self.surgery.measured.add(self._label("aux_loss", one), loss)
        going = self._settled(0)
        following = self.surgery.sequence[self.surgery.sequence.index(0) + 1 :]
        for objective in following:
            going = going and self._run(objective, last=objective == following[-1])
        self._samples += self._aux_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return going

    def _run(self, objective: int, last: bool) -> bool:
        """Forward and backward of one auxiliary objective, and its surgery; `last` before the optimizer steps."""
        one, model = self.auxiliaries[objective - 1], self.model_wrapped
        if one.regulariser is not None:
            return True
        batches, items = self._batches(one)
        divisor, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, len(batches)
        self._objective = objective
        try:
            for number, inputs in enumerate(batches, start=1):
                final = number == len(batches)
                self._last_of_objective, self._last_pass = final, final and last
                with nullcontext() if final else self._not_synchronised(model):
                    loss = self.training_step(model, dict(inputs) if isinstance(inputs, dict) else inputs, items)
                self.surgery.measured.add(self._label("aux_loss", one), loss.detach() / one.lam * len(batches))
        finally:
            self._objective, self.current_gradient_accumulation_steps = 0, divisor
        return self._settled(objective)

    def _batches(self, one: Auxiliary) -> tuple[list[Any], Any]:
        if one.batches is None:
            return self._coming
        count, objective = self.args.gradient_accumulation_steps, self._objective
        self._objective = self.auxiliaries.index(one) + 1
        try:
            return self.get_batch_samples(one.batches, count, self.args.device)
        finally:
            self._objective = objective

    def _not_synchronised(self, model: nn.Module) -> AbstractContextManager[Any]:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return nullcontext()
        return self.accelerator.no_sync(model=model)

    def _settled(self, objective: int) -> bool:
        """The surgery on a gradient that has just been reduced; False if the step is not to be taken.

        Raises:
            TrainingStopped: it is not finite, and nobody was asked to skip such steps.
        """
        if self.surgery.after(objective, self._gradients):
            return True
        if self.accelerator.scaler is not None or (self.is_deepspeed_enabled and self.args.fp16):
            return True  # a loss scaler looks at the gradient, which is left as it is, and skips the step by itself
        what = f"auxiliary {self.auxiliaries[objective - 1].name!r}" if objective else "the main objective"
        step = self.state.global_step + 1
        if not self.bloop.skip_nonfinite:
            raise TrainingStopped(
                f"the gradient of {what} is not finite at step {step}; the step was not taken. Lower learning_rate, "
                "look at that batch, or set skip_nonfinite to pass over such steps"
            )
        _LOGGER.warning("step %d is skipped: a gradient is not finite", step)
        self._gradients.drop()
        return False

    # ---- what a person sees ----------------------------------------------------------------------------------------

    def _label(self, quantity: str, one: Auxiliary) -> str:
        return quantity if len(self.auxiliaries) == 1 else f"{quantity}_{one.name}"

    def _measured(self) -> dict[str, float]:
        found = self.surgery.measured.read()
        losses = [name for name in found if name.startswith("aux_loss")]
        if losses and self.args.world_size > 1:  # each process has seen its own examples; the rest is the same on all
            mine = torch.tensor([found[name] for name in losses], device=self.args.device)
            found |= dict(zip(losses, self.accelerator.reduce(mine, reduction="mean").tolist(), strict=True))
        noise = self.surgery.noise()
        found |= {name: value for name, value in noise.items() if math.isfinite(value)}
        self._warn_of_noise(noise)
        return found

    def _warn_of_noise(self, noise: dict[str, float]) -> None:
        n, rho = noise.get("noise_ratio", math.nan), noise.get("rho", math.nan)
        if self._warned or not math.isfinite(n) or survives(n, rho) <= TOLERATED:
            return
        self._warned = True
        remedy = f"use rho {SURVIVES / n:.1g}, or rho auto"
        if self.settings.rho == "auto":
            remedy = f"it would take rho {SURVIVES / n:.1g}, too slow for a run of this length: use larger batches"
        if self.is_world_process_zero():
            _LOGGER.warning(
                "the main gradient is noisy (noise ratio %.3g): with rho %.2g, %.0f %% of what should be removed from "
                "the auxiliary gradient stays; %s",
                n,
                rho,
                100 * survives(n, rho),
                remedy,
            )


class BloopTrainer(BloopMixin, MomentumTrainer):
    """`MomentumTrainer` with auxiliary objectives; see `BloopMixin`.

    Example:
        >>> from hf_momentum.training.arguments import BloopArguments
        >>> arguments = BloopArguments(lam=[0.3], rho="auto")
        >>> # then: BloopTrainer(model, args, train_dataset=main, aux_train_dataset=replay, bloop=arguments).train()
    """


class SurgeryCallback(TrainerCallback, ExportableState):
    """Runs the auxiliary objectives before the main one, and carries the surgery's few numbers in every checkpoint.

    `BloopMixin` adds it by itself.

    Example:
        >>> SurgeryCallback.__name__  # the key of its numbers under `stateful_callbacks` in trainer_state.json
        'SurgeryCallback'
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.proxy(trainer)

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json`."""
        trainer = self._trainer
        numbers = trainer.surgery.state_dict() if trainer.surgery is not None else {}
        return {
            "surgery": trainer.bloop.surgery,
            "auxiliaries": [one.name for one in trainer.auxiliaries],
            "lam": [one.lam for one in trainer.auxiliaries],
            "samples": trainer._samples,
            "numbers": numbers,
        }

    def continue_from(self, state: TrainerState) -> None:
        """Take up the numbers of the checkpoint that a run continues from.

        Raises:
            InputError: it had another surgery, or other auxiliaries.
        """
        trainer, saved = self._trainer, state.stateful_callbacks.get(type(self).__name__)
        trainer._samples = 0
        if state.global_step == 0:
            return
        now = self.state()
        state.stateful_callbacks[type(self).__name__] = now  # the checkpoint may not know of it
        if not saved or not saved["auxiliaries"]:
            say("the checkpoint had no auxiliary objective; the average of main gradients begins anew", trainer)
            return
        for what in ("surgery", "auxiliaries"):
            if saved[what] != now[what]:
                raise InputError(
                    f"the checkpoint was saved with {what} {saved[what]}, this run has {now[what]}, and the averages "
                    "of gradients mean something else. Resume with what it had, or start from its weights alone"
                )
        if saved["lam"] != now["lam"]:
            say(f"lam was {saved['lam']} and is {now['lam']} from here on", trainer)
        trainer._samples = saved["samples"]
        trainer.surgery.load_state_dict(saved["numbers"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build what needs the prepared model."""
        self._trainer._begin(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The auxiliary objectives; here gradients are synchronised, whatever the accumulation."""
        self._trainer._before_main()


class _SurgeryEngine(DeepSpeedEngineWrapper):
    """Accelerate's handle of a DeepSpeed engine, which steps inside `backward`: the surgery comes in between."""

    def __init__(self, engine: Any, trainer: BloopMixin) -> None:
        super().__init__(engine)
        self._trainer = weakref.proxy(trainer)

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """One backward pass of any objective; a step after the last one."""
        trainer = self._trainer
        main = trainer._objective == 0
        reduced = sync_gradients if main else trainer._last_of_objective
        boundary = trainer._last_pass or (reduced and trainer._gradients.boundary)
        self.engine.set_gradient_accumulation_boundary(is_boundary=boundary)
        self.engine.backward(loss, **kwargs)
        if main and sync_gradients and trainer._after_main():
            self.engine.step()


def parse_rho(text: str | float) -> float | str:
    """rho as a number, or "auto".

    Raises:
        InputError: neither.

    Example:
        >>> parse_rho("0.01"), parse_rho("auto")
        (0.01, 'auto')
    """
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise InputError(f"rho is {text!r}; give a number in (0, 1], or auto") from None


def say(message: str, trainer: Any) -> None:
    """One line in the log, from the main process."""
    if trainer.is_world_process_zero():
        _LOGGER.warning("%s", message)
