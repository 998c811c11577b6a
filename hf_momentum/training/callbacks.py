"""Callbacks for any `transformers.Trainer`: inner quantities in the log, a momentum schedule, and no bad checkpoint."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_momentum.errors import InputError, TrainingStopped
from hf_momentum.integrations.optim_args import parse_pairs
from hf_momentum.integrations.registry import Argument, arguments_of
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.optim import MomentumOptimizer, MomentumSchedule
from hf_momentum.optim.momentum_laws import check_schedule


class DynamicsCallback(TrainerCallback):
    """Adds what an optimizer knows of itself to every training log: TAM's cosine and damping, and so on.

    The values are read back once per logging step; in between nothing waits for the device. `attach` places the
    callback before the reporters, so that TensorBoard, Trackio, Weights & Biases and the JSON history all see them.

    Args:
        per_layer: log the quantities that are kept for each parameter as `name/parameter`, too.
        update_norm: log the norm of the update of all trained weights, for any optimizer; at the steps that are
            logged it holds a copy of them.

    Example:
        >>> callback = DynamicsCallback(per_layer=True)  # then: callback.attach(trainer)
    """

    def __init__(self, per_layer: bool = False, update_norm: bool = False) -> None:
        self.per_layer, self.update_norm = per_layer, update_norm
        self._before: list[torch.Tensor] = []
        self._norm: torch.Tensor | None = None
        self._rates: list[float] = []

    def attach(self, trainer: Trainer) -> None:
        """Make `trainer` log the dynamics; works with any Trainer."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Note the learning rates of the coming step: at its log the scheduler has set those of the next one."""
        base = base_optimizer(optimizer)
        if isinstance(base, MomentumOptimizer):
            self._rates = [group["lr"] for group in base.param_groups]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Copy the weights if the coming step is to be logged."""
        every = state.logging_steps
        if self.update_norm and PartialState().distributed_type is DistributedType.DEEPSPEED:
            raise InputError(
                "log_update_norm does not work under DeepSpeed, which steps before it can be asked; drop it"
            )
        if self.update_norm and every and (state.global_step + 1) % int(every) == 0:
            self._before = [param.detach().clone() for param in _trained(model)]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Form the norm of the difference, on the device."""
        if self._before:
            differences = torch._foreach_sub([param.detach() for param in _trained(model)], self._before)
            norms = [torch.linalg.vector_norm(difference, dtype=torch.float32) for difference in differences]
            # A norm of shards is the local part until it is asked for as a whole; reading it earlier would not say so.
            whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
            self._norm = torch.linalg.vector_norm(torch.stack(whole))
            self._before = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Extend a training log (not one of an evaluation) in place."""
        if logs is None or "loss" not in logs:
            return
        base = base_optimizer(optimizer)
        found: dict[str, torch.Tensor] = {}
        if isinstance(base, MomentumOptimizer):
            found |= _dynamics(base, self._rates)
            if self.per_layer:
                names = {id(param): name for name, param in model.named_parameters()}
                for quantity, pairs in base.tensor_dynamics().items():
                    found |= {f"{quantity}/{names[id(param)]}": value for param, value in pairs}
        if self._norm is not None:
            found["update_norm"], self._norm = self._norm, None
        named: dict[str, float] = {}
        if found:
            values = torch.stack([value.float() for value in found.values()]).tolist()  # one read-out for all
            named = dict(zip(found, values, strict=True))
        if base is not None and "momentum_schedule" in base.param_groups[0]:
            group = base.param_groups[0]
            named["scheduled_momentum"] = group["momentum"] if "momentum" in group else group["betas"][0]
        named = {name: value for name, value in named.items() if math.isfinite(value)}  # JSON knows no infinity
        logs.update(named)
        state.log_history[-1].update(named)


def _dynamics(optimizer: MomentumOptimizer, rates: Sequence[float]) -> dict[str, torch.Tensor]:
    """The inner quantities of the last step, at the learning rates that it had."""
    now = [group["lr"] for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        return optimizer.dynamics()
    finally:
        for group, rate in zip(optimizer.param_groups, now, strict=True):
            group["lr"] = rate


def _trained(model: Any) -> list[torch.Tensor]:
    return [param for param in model.parameters() if param.requires_grad]


def _here(param: Any) -> torch.Tensor:
    """What this process holds of a parameter: under ZeRO-3 that is `ds_tensor`, and the parameter itself is empty."""
    if isinstance(param, DTensor):
        return param.to_local()
    local: torch.Tensor = getattr(param, "ds_tensor", param)
    return local


class MomentumScheduleCallback(TrainerCallback):
    """Puts a `MomentumSchedule` on whatever optimizer the Trainer runs.

    Its state travels in the optimizer's own state dict, so a resumed run continues with it.

    Args:
        law: a law of `MomentumSchedule`.
        arguments: its arguments as text, `key=value,...`; `metric` names the evaluation metric of switch=metric.

    Raises:
        InputError: a bad law or argument, or an optimizer without momentum.

    Example:
        >>> callback = MomentumScheduleCallback("hybrid", "switch=fraction,fraction=0.6")
    """

    def __init__(self, law: str, arguments: str | None = None) -> None:
        self.law = law
        self.metric, self.arguments = parse_schedule(law, arguments)
        self.schedule: MomentumSchedule | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach the schedule, after a checkpoint has been loaded."""
        sharded = PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if sharded and self.arguments.get("curvature") == "measured":
            raise InputError(
                "momentum_schedule_args: curvature=measured does not sum over shards; under FSDP and DeepSpeed use "
                "--optim critical_sgd or critical_adamw with --optim_args curvature=measured, which do"
            )
        try:
            self.schedule = MomentumSchedule(
                base_optimizer(optimizer), self.law, total_steps=state.max_steps, **self.arguments
            )
        except ValueError as error:
            raise InputError(f"momentum_schedule {self.law}: {error}") from error

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the schedule how far training is; a wrapper may call the optimizer's `step` in parts."""
        if self.schedule is not None:
            self.schedule.set_steps(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The same before a checkpoint is written."""
        self.on_step_begin(args, state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report the metric, where the hybrid waits for one."""
        if self.schedule is None or self.arguments.get("switch") != "metric" or metrics is None:
            return
        if self.metric not in metrics:
            raise InputError(f"momentum_schedule_args: no metric {self.metric!r}; evaluated: {', '.join(metrics)}")
        self.schedule.report(metrics[self.metric])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the optimizer alone again."""
        if self.schedule is not None:
            self.schedule.detach()


def parse_schedule(law: str, text: str | None) -> tuple[str, dict[str, Any]]:
    """The metric's name and the keyword arguments of a `MomentumSchedule`, all checked.

    Raises:
        InputError: an unknown law or key, or a value that does not fit.

    Example:
        >>> parse_schedule("hybrid", "switch=fraction,fraction=0.6")
        ('eval_accuracy', {'switch': 'fraction', 'fraction': 0.6})
    """
    accepted = arguments_of(MomentumSchedule.__init__, without=("self", "optimizer", "law", "total_steps", "return"))
    accepted["metric"] = Argument("metric", str, "eval_accuracy")
    kwargs = parse_pairs("--momentum_schedule_args", text, accepted)
    metric = kwargs.pop("metric", "eval_accuracy")
    try:
        check_schedule(law, total_steps=1, **kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    return metric, kwargs


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
        bad = torch.tensor([not all(bool(torch.isfinite(_here(param)).all()) for param in _trained(model))])
        state_of_processes = PartialState()
        if state_of_processes.num_processes > 1:  # all stop together, whoever holds the piece that is not finite
            bad = bad.to(state_of_processes.device, dtype=torch.float32)
            torch.distributed.all_reduce(bad)
        if bool(bad.any()):
            raise TrainingStopped(
                f"the weights are not finite after step {state.global_step}; nothing was saved. Lower learning_rate, "
                "or set max_grad_norm"
            )
