"""Retrain some layer groups of a model on chosen predictions, everything else frozen: the mechanics of a repair.

Frozen means `requires_grad` off, out of the optimizer, and in evaluation mode: a frozen BatchNorm keeps its statistics,
a frozen Dropout drops nothing. What trains is remembered as it was, tensors and buffers, so that old and new weights
can be mixed, the old model can be asked without a copy of it, and everything can be put back.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_momentum.diagnosis.groups import LayerGroup
from hf_momentum.diagnosis.results import Flips, Mixture
from hf_momentum.diagnosis.verification import flips
from hf_momentum.errors import InputError
from hf_momentum.evaluation.writing import write_whole
from hf_momentum.training.arguments import MomentumTrainingArguments
from hf_momentum.training.evaluated import Evaluated
from hf_momentum.training.examples import IGNORED, Examples
from hf_momentum.training.predictions import Held, Predictions
from hf_momentum.training.samples import LOSSES
from hf_momentum.training.trainer import MomentumTrainer

# ---- what trains -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """The part of a model that trains, and how it was.

    Attributes:
        model: with `requires_grad` as it shall be.
        names: of the parameters that train.
        buffers: of the modules that train: statistics that change with them.
        old: all of these as they were, on the model's device.
    """

    model: Any
    names: Sequence[str]
    buffers: Sequence[str]
    old: Mapping[str, Tensor]

    @staticmethod
    def of(model: Any, names: Sequence[str]) -> "Trained":
        """Freeze all but the named parameters.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            >>> trained = Trained.of(model, ["1.weight", "1.bias"])
            >>> trained.numel, [name for name in trained.buffers]
            (4, ['1.running_mean', '1.running_var', '1.num_batches_tracked'])
        """
        wanted = set(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        inside = {id(module) for module in _moving(model)}
        buffers = [
            f"{place}.{name}" if place else name
            for place, module in model.named_modules()
            if id(module) in inside
            for name, _ in module.named_buffers(recurse=False)
        ]
        kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return Trained(model, list(names), buffers, {name: kept[name].detach().clone() for name in [*names, *buffers]})

    @property
    def numel(self) -> int:
        """How many numbers train."""
        return sum(self.old[name].numel() for name in self.names)

    def now(self) -> dict[str, Tensor]:
        """A copy of all that trains, and of its buffers."""
        return {name: tensor.detach().clone() for name, tensor in self._live().items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors back."""
        with torch.no_grad():
            for name, tensor in self._live().items():
                tensor.copy_(tensors[name])

    def mixed(self, new: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """old + share (new - old); exactly one of the two at the ends, and of whole numbers the new ones.

        Example:
            >>> layer = nn.Linear(1, 1, bias=False)
            >>> _ = nn.init.ones_(layer.weight)
            >>> Trained.of(layer, ["weight"]).mixed({"weight": torch.tensor([[3.0]])}, 0.5)["weight"]
            tensor([[2.]])
        """
        if share in (0, 1):
            return dict(new if share else self.old)
        return {
            name: torch.lerp(old, new[name], share) if old.is_floating_point() else new[name]
            for name, old in self.old.items()
        }

    def freeze_modes(self) -> None:
        """Training mode for the modules of which everything trains, evaluation mode for all others."""
        moving = {id(module) for module in _moving(self.model)}
        for module in self.model.modules():
            module.training = id(module) in moving

    def old_logits(self, given: Mapping[str, Tensor]) -> Tensor:
        """What the old model says, without a copy of it."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            for module, _ in modes:
                module.training = False
            with torch.no_grad():
                logits: Tensor = functional_call(self.model, dict(self.old), (), dict(given)).logits
        finally:
            for module, mode in modes:
                module.training = mode
        return logits

    def _live(self) -> dict[str, Tensor]:
        every = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: every[name] for name in [*self.names, *self.buffers]}


def _moving(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of which all parameters train, with those inside them that have none."""
    for module in model.children():
        parameters = list(module.parameters())
        if parameters and all(parameter.requires_grad for parameter in parameters):
            yield from module.modules()
        elif parameters:
            yield from _moving(module)


def weights_to_train(groups: Sequence[LayerGroup], model: Any) -> list[str]:
    """The parameters that train for chosen groups: their weights, or of a LoRA model their adapters.

    Raises:
        InputError: there are none: a LoRA model whose adapters are elsewhere.
    """
    if not isinstance(model, PeftModel):
        return [name for group in groups for name in group.weights]
    # Modules that PEFT trains in whole stand among the weights.
    names = [name for group in groups for name in (*group.adapters, *group.weights) if _adapts(name)]
    if not names:
        chosen = ", ".join(group.name for group in groups)
        raise InputError(f"groups {chosen} have no adapters; choose groups that have, or merge the adapters first")
    return names


def _adapts(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def with_lora(evaluated: Evaluated, groups: Sequence[LayerGroup], rank: int, seed: int = 0) -> Evaluated:
    """The model with fresh LoRA adapters on the linear layers of chosen groups, by PEFT's own `target_modules`.

    Raises:
        InputError: the groups have no linear layer, or the model has adapters already.
    """
    if isinstance(evaluated.model, PeftModel):
        raise InputError("lora_r is for a model without adapters; without it the model's own adapters are trained")
    inside = {name.rpartition(".")[0] for group in groups for name in group.weights}
    targets = sorted(name for name in inside if isinstance(evaluated.model.get_submodule(name), nn.Linear))
    if not targets:
        raise InputError(f"groups {', '.join(group.name for group in groups)} have no linear layer for LoRA to adapt")
    whole = "|".join(map(re.escape, targets))  # PEFT takes a name in a list for the end of others, too
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=whole)
    with torch.random.fork_rng():  # an interrupted repair begins again with the same ones
        torch.manual_seed(seed)
        return Evaluated(evaluated.place, get_peft_model(evaluated.model, config), evaluated.processor)


# ---- on which predictions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lessons:
    """What is trained on: examples that the old model had wrong, and a replay of some that it had right.

    Attributes:
        examples: of the training split.
        task: of the split.
        indices: which of them.
        masks: of a language model, which tokens count; empty for all.
        right: of each example (of a language model: of each token), whether the old model had it right.
    """

    examples: Examples
    task: str
    indices: Sequence[int]
    masks: Mapping[int, Tensor]
    right: Mapping[int, Tensor]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, int]:
        return {"index": self.indices[place]}

    def batch(self, features: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """A batch for `RepairTrainer`."""
        own = [feature["index"] for feature in features]
        targets = self.examples.targets(own)
        return {
            **self.examples.inputs(own),
            "targets": targets,
            "counted": _padded([self.masks.get(index) for index in own], targets, True),
            "was_right": _padded([self.right.get(index) for index in own], targets, False),
        }


def _padded(rows: Sequence[Tensor | None], targets: Tensor, default: bool) -> Tensor:
    """One row for each example, in the shape of the targets."""
    if targets.dim() == 1:
        return torch.tensor([default if row is None else bool(row) for row in rows])
    found = torch.full(targets.shape, default)
    for place, row in enumerate(rows):
        if row is not None and row.dim() == 0:  # of a text as a whole
            found[place] = row
        elif row is not None:
            found[place] = False
            length = min(len(row), targets.shape[1])
            found[place, :length] = row[:length]
    return found & (targets != IGNORED)


def lessons(held: Held, before: Predictions, replay: float, seed: int) -> Lessons:
    """Errors and a replay of right predictions, `replay` of them for each error, drawn by the seed.

    Of a language model whole windows are passed, and the wrong tokens count with as many right ones.
    """
    generator = np.random.default_rng([seed, 1])
    examples, task = held.examples, held.split.task
    if task != "causal_lm":
        right = np.array([bool(one.all()) for one in before.right])
        wrong = np.flatnonzero(~right)
        known = generator.permutation(np.flatnonzero(right))[: round(replay * len(wrong))]
        indices = [int(index) for index in (*wrong, *known)]
        return Lessons(examples, task, indices, {}, {index: torch.tensor(bool(right[index])) for index in indices})
    wrong_tokens = sum(int((~one).sum()) for one in before.right)
    right_tokens = sum(int(one.sum()) for one in before.right)
    share = min(1.0, replay * wrong_tokens / max(right_tokens, 1))
    masks, was_right = {}, {}
    for index, one in enumerate(before.right):
        counted = ~one | (one & (generator.random(len(one)) < share))
        if counted.any():
            start = examples.sizes[index] - len(one)  # context that is not predicted
            masks[index] = torch.cat([torch.zeros(start, dtype=torch.bool), torch.from_numpy(counted)])
            was_right[index] = torch.cat([torch.zeros(start, dtype=torch.bool), torch.from_numpy(one)])
    return Lessons(examples, task, list(masks), masks, was_right)


# ---- training --------------------------------------------------------------------------------------------------------


class RepairTrainer(MomentumTrainer):
    """Trains the mean loss over what counts, with an optional pull towards the old model on what it had right.

    loss = mean cross-entropy + distill * mean over predictions that were right of KL(old || new)

    Args:
        trained: what trains.
        lessons: on what.
        distill: weight of the pull; 0 for none.
        rates: a factor of the learning rate for each parameter by name; None for 1.
        **kwargs: of `MomentumTrainer`.
    """

    def __init__(
        self,
        trained: Trained,
        lessons: Lessons,
        distill: float = 0.0,
        rates: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.trained, self.lessons, self.distill, self.rates = trained, lessons, distill, rates
        super().__init__(trained.model, train_dataset=lessons, data_collator=lessons.batch, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is this class's, and a mean over each micro-batch

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' own, over what trains; with `rates`, groups of tensors with learning rates of their own."""
        if self.rates is None or self.optimizer is not None:
            made: torch.optim.Optimizer = super().create_optimizer()
            return made
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = [
            {
                "params": [parameter],
                "lr": self.args.learning_rate * self.rates.get(name, 1.0),
                "weight_decay": self.args.weight_decay if name in decayed else 0.0,
            }
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        ]
        self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of one batch."""
        self.trained.freeze_modes()
        given = dict(inputs)
        targets, counted, was_right = (given.pop(name) for name in ("targets", "counted", "was_right"))
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(next(model.parameters()).dtype)
        outputs = model(**given)
        masks = list(counted) if targets.dim() == 2 else [None] * len(targets)
        summed, count = LOSSES[self.lessons.task](outputs.logits, targets, masks)
        loss = summed / max(count, 1)
        if self.distill and bool(was_right.any()):
            old = functional.log_softmax(self.trained.old_logits(given).float(), -1)[was_right]
            new = functional.log_softmax(outputs.logits.float(), -1)[was_right]
            loss = loss + self.distill * functional.kl_div(new, old, reduction="batchmean", log_target=True)
        return (loss, outputs) if return_outputs else loss


@dataclass
class Best(TrainerCallback):
    """Measures the validation split now and then, keeps the best weights, and stops when they stay the best.

    The best are those with the largest net gain over the old model, and of equal ones the least loss. They are kept on
    the CPU and, if a folder is named, in files there. An interrupted run goes on with those that were the best when its
    checkpoint was written: later ones are measured again.

    Attributes:
        trained: what trains.
        measure: what the model predicts of the validation split, as it is now.
        before: what the old model predicted.
        every: steps between two measurements.
        patience: measurements without a better one after which training ends; 0 for never.
        folder: for the files.
        tensors: the best so far.
        best: the log's entry of them.
        waited: measurements since then.
        log: all measurements.
    """

    trained: Trained
    measure: Callable[[], Predictions]
    before: Predictions
    every: int
    patience: int = 0
    folder: Path | None = None
    tensors: dict[str, Tensor] | None = None
    best: dict[str, float] | None = None
    waited: int = 0
    log: list[dict[str, float]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether patience is at its end."""
        return self.patience > 0 and self.waited >= self.patience

    def continue_from(self, step: int) -> None:
        """Go on from what was measured up to that step."""
        if self.folder is None or not (self.folder / "best.json").is_file():
            return
        for entry in json.loads((self.folder / "best.json").read_text(encoding="utf-8")):
            if entry["step"] <= step:
                self._is_best(entry)
        if self.best is not None:
            stored = load_file(self._file(self.best["step"]))
            self.tensors = {name: stored[name] for name in self.trained.old}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure when it is time."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        self.trained.model.eval()
        now = self.measure()
        entry = {"step": state.global_step, "validation_net": gain(self.before, now).net, "eval_loss": now.loss}
        if self._is_best({**entry, "validation_accuracy": now.accuracy}):
            self.tensors = {name: tensor.cpu() for name, tensor in self.trained.now().items()}
            self._write(state.global_step)
        if self.folder is not None:
            write_whole(self.folder / "best.json", json.dumps(self.log))
        if self.ended:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete what no checkpoint needs any more."""
        if self.folder is not None and self.best is not None:
            for path in self.folder.glob("best-*.safetensors"):
                if path != self._file(self.best["step"]):
                    path.unlink()

    def _is_best(self, entry: dict[str, float]) -> bool:
        """Add an entry to the log."""
        self.log.append(entry)
        self.waited += 1
        if self.best is not None and _merit(entry) <= _merit(self.best):
            return False
        self.best, self.waited = entry, 0
        return True

    def _file(self, step: float) -> Path:
        assert self.folder is not None
        return self.folder / f"best-{step}.safetensors"

    def _write(self, step: int) -> None:
        if self.folder is None or self.tensors is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "best.partial"
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, partial)
        partial.replace(self._file(step))


def _merit(entry: Mapping[str, float]) -> tuple[float, float]:
    return entry["validation_net"], -entry["eval_loss"]


def gain(before: Predictions, after: Predictions) -> Flips:
    """How predictions changed."""
    return flips(np.concatenate(before.right), np.concatenate(after.right))


@dataclass(frozen=True)
class Retrained:
    """What came of a training.

    Attributes:
        new: the best weights on validation.
        share: of them, mixed with the old ones, that was best on validation. The model has that mixture now.
        mixtures: all that were tried.
        steps: that were made.
        stopped: why training ended.
        history: the Trainer's log, with the validation.
    """

    new: Mapping[str, Tensor]
    share: float
    mixtures: Sequence[Mixture]
    steps: int
    stopped: str
    history: Sequence[dict[str, float]]


def retrain(
    evaluated: Evaluated,
    trained: Trained,
    taught: Lessons,
    validation: Held,
    before: Predictions,
    training: MomentumTrainingArguments,
    distill: float = 0.0,
    patience: int = 0,
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    rates: Mapping[str, float] | None = None,
    keep: Path | None = None,
    resume: str | None = None,
) -> Retrained:
    """Train, take the best weights of validation, and mix them with the old ones as validation likes best.

    Args:
        evaluated: whose model `trained` is a part of.
        before: the old model's predictions of the validation split.
        training: its `eval_steps` say how often validation is measured.
        distill, rates: as for `RepairTrainer`.
        patience: as for `Best`.
        shares: of the new weights that are tried; where none gains anything the old weights, share 0, stay.
        keep: a folder for the best weights, with which a run that is interrupted goes on.
        resume: a checkpoint to go on from.
    """
    every = max(1, int(training.eval_steps or 1))
    best = Best(trained, lambda: validation.predictions(evaluated, training.per_device_eval_batch_size), before, every)
    best.patience, best.folder = patience, keep
    trainer = RepairTrainer(trained, taught, distill, rates, args=training, callbacks=[best])
    state = None
    if resume is not None:
        state = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
        best.continue_from(state.global_step)
    # A Trainer that goes on from its last step, or from where patience ended, would make a step more.
    if state is None or not (best.ended or state.global_step >= state.max_steps):
        trainer.train(resume_from_checkpoint=resume)
        state = trainer.state
    stopped = "all steps were made"
    if state.global_step < state.max_steps:
        stopped = f"validation did not improve in {patience} measurements"
    assert best.tensors is not None
    device = next(iter(trained.old.values())).device
    new = {name: tensor.to(device) for name, tensor in best.tensors.items()}
    trained.model.eval()
    mixtures = []
    for share in sorted({0.0, *shares}):
        trained.put(trained.mixed(new, share))
        found = before if share == 0 else best.measure()
        mixtures.append(Mixture(share, gain(before, found), found.loss))
    gaining = [one for one in mixtures if one.flips.net > 0]
    chosen = max(gaining, key=lambda one: (one.flips.net, -one.loss)).share if gaining else 0.0
    trained.put(trained.mixed(new, chosen))
    history = [*state.log_history, *best.log]
    return Retrained(new, chosen, mixtures, state.global_step, stopped, history)
