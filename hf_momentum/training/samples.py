"""Which predictions of a model are wrong and right, and the gradients of both: from settings to scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hf_momentum.diagnosis.attribution import Gradients, NoPredictions, compare
from hf_momentum.diagnosis.choice import Rule
from hf_momentum.diagnosis.groups import LayerGroup, Split, layer_groups
from hf_momentum.diagnosis.results import Compared
from hf_momentum.evaluation.suite import SuiteSplit
from hf_momentum.training.differentiable import Differentiable, Loss, differentiable
from hf_momentum.training.evaluated import Evaluated, load_evaluated
from hf_momentum.training.examples import IGNORED, Examples, examples_of
from hf_momentum.training.processes import own_device
from hf_momentum.training.suite_rows import load_rows, written_rows

_UNITS = 32  # micro-batches of a sample at least, for the intervals, as far as there are examples


@dataclass(frozen=True)
class Settings:
    """What is diagnosed, and how.

    Attributes:
        model: a Hub name, a folder, an adapter or a checkpoint.
        data: the split whose errors are looked at; its task is the model's. For "causal_lm" an error is a wrong token,
            for "generation" a text that is not the reference.
        against: a split whose right predictions are taken in place of those in `data`.
        split: "blocks", or "parts": attention, MLP and norms apart.
        patterns: groups of one's own, by name.
        score: what ranks the groups: "contrast", or one of SCORES.
        rule: which of them are chosen.
        random: whether a model of the same architecture with random weights is scored beside it.
        lora_weights: of LoRA, what counts as the weight: "base" or "delta".
        batch_size: examples at a time at most.
        device, revision: as for `evaluate`.
        seed: of the draw of right examples, the order, the random weights and the bootstrap.
    """

    model: str
    data: SuiteSplit
    against: SuiteSplit | None = None
    split: Split = "blocks"
    patterns: Mapping[str, str] = field(default_factory=dict)
    score: str = "contrast"
    rule: Rule = field(default_factory=lambda: Rule(top=3))
    random: bool = True
    lora_weights: str = "base"
    batch_size: int = 16
    device: str | None = None
    revision: str | None = None
    seed: int = 0


def model_task(task: str) -> str:
    """What kind of model a task is for: generation is done by a causal language model.

    Example:
        >>> model_task("generation")
        'causal_lm'
    """
    return "causal_lm" if task == "generation" else task


@dataclass(frozen=True)
class Data:
    """A model with the examples it is diagnosed on.

    Attributes:
        evaluated: in float32: gradients are added up in the weights' own dtype.
        examples: of the data.
        against: right examples from elsewhere, if any.
        written: for generation, whether what the model writes for each example is the reference; of both.
    """

    evaluated: Evaluated
    examples: Examples
    against: Examples | None
    written: tuple[np.ndarray, np.ndarray | None] | None

    @staticmethod
    def load(settings: Settings) -> "Data":
        """Read all that the settings name.

        Raises:
            InputError: it cannot be used as given.
        """
        rows = load_rows(settings.data)
        others = None if settings.against is None else load_rows(settings.against)
        task = model_task(settings.data.task)
        device = settings.device or own_device()
        evaluated = load_evaluated(settings.model, task, device, "float32", settings.revision, for_gradients=True)
        examples = examples_of(evaluated, rows, settings.data)
        against = None
        if others is not None and settings.against is not None:
            against = examples_of(evaluated, others, settings.against)
        return Data(evaluated, examples, against, _written(evaluated, rows, others, settings))


def _written(
    evaluated: Evaluated, rows: datasets.Dataset, others: datasets.Dataset | None, settings: Settings
) -> tuple[np.ndarray, np.ndarray | None] | None:
    if settings.data.task != "generation":
        return None
    with torch.inference_mode():
        own = written_rows(evaluated, rows, settings.data, settings.batch_size)
        if others is None or settings.against is None:
            return own[:, 1] > 0, None
        return own[:, 1] > 0, written_rows(evaluated, others, settings.against, settings.batch_size)[:, 1] > 0


@dataclass(frozen=True)
class Sample:
    """Which predictions a gradient is taken of.

    Attributes:
        indices: examples, in the order of the pass.
        masks: for language models which tokens of each example count; those of this process.
    """

    indices: Sequence[int]
    masks: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a model has wrong and right, and the scores of its groups.

    Attributes:
        looked_at, errors, right: predictions of the data.
        groups: in the order of the model.
        compared: None without errors.
        wrong, good: the samples, for another model.
    """

    looked_at: int
    errors: int
    right: int
    groups: Sequence[LayerGroup]
    compared: Compared | None
    wrong: Sample = Sample(())
    good: Sample = Sample(())


# ---- samples of wrong and right predictions --------------------------------------------------------------------------


def attribute(evaluated: Evaluated, data: Data, settings: Settings) -> Found:
    """Find what a model has wrong and right, and score its groups by both.

    Example:
        >>> attribute  # then: attribute(data.evaluated, data, settings).compared.values("contrast")
        <function attribute ...
    """
    groups = layer_groups(evaluated.model, settings.split, settings.patterns)
    with differentiable(evaluated, groups, settings.lora_weights) as ready:
        if settings.data.task == "causal_lm":
            return _attribute_tokens(ready, data, settings)
        return _attribute_examples(ready, data, settings)


def scores_of(evaluated: Evaluated, data: Data, settings: Settings, found: Found) -> Compared:
    """The scores of another model by the same predictions."""
    groups = layer_groups(evaluated.model, settings.split, settings.patterns)
    by_name = {group.name: group for group in groups}
    same = [by_name[group.name] for group in found.groups]
    with differentiable(evaluated, same) as ready:
        good = data.against or data.examples
        return _compare(ready, settings, (data.examples, found.wrong), (good, found.good))


def _compare(
    ready: Differentiable,
    settings: Settings,
    wrong: tuple[Examples, Sample],
    good: tuple[Examples, Sample],
) -> Compared:
    """Both gradients, of samples that are known."""
    loss = LOSSES[settings.data.task]
    errors, right = (
        _collected(
            ready,
            examples,
            sample,
            unit_size(len(sample.indices), settings.batch_size, ready.processes),
            lambda logits, targets, own, masks=sample.masks: loss(logits, targets, [masks.get(i) for i in own]),
            settings.seed,
        )
        for examples, sample in (wrong, good)
    )
    assert errors is not None  # without errors nothing is compared
    return compare(errors, right, [group.numel for group in ready.groups], settings.seed)


def unit_size(examples: int, batch_size: int, processes: int = 1) -> int:
    """Examples of each process's micro-batch: fewer than asked for where there would be too few units for an interval.

    A unit is what all processes take at once, so that several of them have the units of one, as far as that goes.

    Example:
        >>> unit_size(40, 16), unit_size(200, 16), unit_size(10_000, 16), unit_size(200, 16, processes=2)
        (1, 6, 16, 3)
    """
    return max(1, min(batch_size, examples // (_UNITS * processes)))


def _attribute_examples(ready: Differentiable, data: Data, settings: Settings) -> Found:
    """Of classifiers, and of texts that were written."""
    right, right_there = data.written or (
        _right(ready, data.examples, settings),
        None if data.against is None else _right(ready, data.against, settings),
    )
    errors = int((~right).sum())
    found = Found(len(right), errors, len(right) - errors, ready.groups, None)
    if errors == 0:
        return found
    wrong = Sample(_shuffled(np.flatnonzero(~right), settings.seed))
    source, known = (data.examples, right) if data.against is None else (data.against, right_there)
    assert known is not None
    classes = [data.examples.classes[i] for i in wrong.indices] if data.examples.classes else [0] * errors
    good = Sample(matched(np.flatnonzero(known), source.classes, classes, settings.seed))
    compared = _compare(ready, settings, (data.examples, wrong), (source, good))
    return replace(found, compared=compared, wrong=wrong, good=good)


def matched(right: Sequence[int], classes: Sequence[int], wanted: Sequence[int], seed: int) -> list[int]:
    """As many right examples of each class as are wanted, or as there are, drawn at random.

    Args:
        right: the examples to draw from.
        classes: of all examples; empty if they have none.
        wanted: the classes of the wrong ones.
        seed: of the draw.

    Example:
        >>> sorted(matched([0, 1, 2, 3, 4], [7, 7, 7, 8, 8], wanted=[7, 7, 9], seed=0)) in ([0, 1], [0, 2], [1, 2])
        True
    """
    left = {one: list(wanted).count(one) for one in set(wanted)}
    drawn = []
    for index in _shuffled(right, seed):
        one = classes[index] if classes else 0
        if left.get(one, 0) > 0:
            left[one] -= 1
            drawn.append(index)
    return drawn


def _shuffled(indices: Sequence[int] | np.ndarray, seed: int) -> list[int]:
    return [int(index) for index in np.random.default_rng(seed).permutation(np.asarray(indices, dtype=np.int64))]


def _right(ready: Differentiable, examples: Examples, settings: Settings) -> np.ndarray:
    """`[examples]`: whether the most likely class is the right one. Examples of like size share a batch."""
    order = sorted(range(len(examples)), key=lambda index: -examples.sizes[index])
    found = np.zeros(len(examples), dtype=np.int64)
    with torch.no_grad():
        for batch in ready.batches(order, settings.batch_size):
            logits, targets, own = ready.logits(examples, batch)
            if own:
                found[own] = (logits.argmax(-1) == targets).cpu().numpy()
    return ready.gathered(found) > 0


def _attribute_tokens(ready: Differentiable, data: Data, settings: Settings) -> Found:
    """Of language models: wrong tokens of one half of the windows, right ones of the other, each half passed once.

    Which tokens are wrong is seen in the forward pass that is differentiated. A right token is taken with the
    probability at which as many of each kind are taken as were wrong in the first half.
    """
    order = _shuffled(range(len(data.examples)), settings.seed)
    half = len(order) if data.against is not None else -(-len(order) // 2)
    source = data.examples if data.against is None else data.against
    rest = order[half:] if data.against is None else _shuffled(range(len(source)), settings.seed)
    wrong, good = Sample(order[:half], {}), Sample(rest, {})
    counts = np.zeros((2, 2, _kinds(data)), dtype=np.int64)  # [pass][wrong, right][token]

    def of_errors(logits: Tensor, targets: Tensor, own: Sequence[int]) -> tuple[Tensor, int]:
        masks = []
        for index, right, wanted in _each(logits, targets, own):
            _count(counts[0], right, wanted)
            masks.append(~right & (wanted != IGNORED))
            wrong.masks[index] = masks[-1].cpu()  # type: ignore[index]
        return token_loss(logits, targets, masks)

    size = unit_size(len(wrong.indices), settings.batch_size, ready.processes)
    gradients = [_collected(ready, data.examples, wrong, size, of_errors, settings.seed)]
    counts[0] = ready.gathered(counts[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = torch.tensor(np.nan_to_num(np.minimum(1.0, counts[0, 0] / counts[0, 1]), nan=0.0, posinf=1.0))

    def of_right(logits: Tensor, targets: Tensor, own: Sequence[int]) -> tuple[Tensor, int]:
        masks = []
        for index, right, wanted in _each(logits, targets, own):
            _count(counts[1], right, wanted)
            drawn = torch.tensor(np.random.default_rng([settings.seed, index]).random(len(wanted)))
            taken = drawn < share[wanted.cpu().clamp(min=0)]
            masks.append(right & (wanted != IGNORED) & taken.to(right.device))
            good.masks[index] = masks[-1].cpu()  # type: ignore[index]
        return token_loss(logits, targets, masks)

    if len(good.indices):
        size = unit_size(len(good.indices), settings.batch_size, ready.processes)
        gradients.append(_collected(ready, source, good, size, of_right, settings.seed))
        counts[1] = ready.gathered(counts[1])
    own = counts[:1] if data.against is not None else counts
    errors, right = int(own[:, 0].sum()), int(own[:, 1].sum())
    found = Found(errors + right, errors, right, ready.groups, None, wrong, good)
    if gradients[0] is None:
        return found
    numel = [group.numel for group in ready.groups]
    other = gradients[1] if len(gradients) > 1 else None
    return replace(found, compared=compare(gradients[0], other, numel, settings.seed))


def _kinds(data: Data) -> int:
    """Tokens of the vocabulary, with those that only the embeddings have room for."""
    return max(len(data.evaluated.processor), data.evaluated.model.config.get_text_config().vocab_size)


def _collected(
    ready: Differentiable, examples: Examples, sample: Sample, size: int, loss: Loss, seed: int
) -> Gradients | None:
    try:
        return ready.collect(examples, sample.indices, size, loss, seed)
    except NoPredictions:
        return None


def _each(logits: Tensor, targets: Tensor, own: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, whether each prediction is right, and the targets, of each example of a batch."""
    with torch.no_grad():
        right = logits.argmax(-1) == targets
    return zip(own, right, targets, strict=True)


def _count(counts: np.ndarray, right: Tensor, wanted: Tensor) -> None:
    for row, chosen in enumerate((~right & (wanted != IGNORED), right)):
        tokens, times = torch.unique(wanted[chosen], return_counts=True)
        counts[row][tokens.cpu().numpy()] += times.cpu().numpy()


# ---- losses ----------------------------------------------------------------------------------------------------------


def class_loss(logits: Tensor, targets: Tensor, masks: Sequence[Tensor | None]) -> tuple[Tensor, int]:
    """Summed cross-entropy, and of how many examples.

    Example:
        >>> loss, count = class_loss(torch.zeros(3, 2), torch.tensor([0, 1, 1]), [None] * 3)
        >>> round(loss.item(), 4), count
        (2.0794, 3)
    """
    return functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def token_loss(logits: Tensor, targets: Tensor, masks: Sequence[Tensor | None]) -> tuple[Tensor, int]:
    """Summed cross-entropy of the tokens in the masks, one for each example, and how many they are.

    Example:
        >>> mask = torch.tensor([True, False, True])
        >>> loss, count = token_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]]), [mask])
        >>> round(loss.item(), 4), count
        (1.3863, 2)
    """
    wanted = targets.clone()
    for row, mask in enumerate(masks):
        if mask is not None:
            chosen = torch.zeros_like(wanted[row], dtype=torch.bool)
            length = min(len(mask), len(chosen))  # batches of other examples are padded otherwise
            chosen[:length] = mask[:length].to(chosen.device)
            wanted[row][~chosen] = IGNORED
    loss = functional.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="sum", ignore_index=IGNORED)
    return loss, int((wanted != IGNORED).sum())


def answer_loss(logits: Tensor, targets: Tensor, masks: Sequence[Tensor | None]) -> tuple[Tensor, int]:
    """The sum over examples of the mean cross-entropy of their tokens, and of how many examples.

    Example:
        >>> loss, count = answer_loss(torch.zeros(1, 3, 2), torch.tensor([[-100, 1, 1]]), [None])
        >>> round(loss.item(), 4), count
        (0.6931, 1)
    """
    each = functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return (each.sum(1) / (targets != IGNORED).sum(1)).sum(), len(targets)


LOSSES: Mapping[str, Callable[[Tensor, Tensor, Sequence[Tensor | None]], tuple[Tensor, int]]] = {
    "sequence_classification": class_loss,
    "image_classification": class_loss,
    "causal_lm": token_loss,
    "generation": answer_loss,
}
