"""Per-layer gradient attribution: how large is the gradient of the mean loss over a sample, layer group by layer group.

    g_l = gradient of the mean loss over the sample with respect to group l, of N_l weights w_l
    raw |g_l|     rms |g_l| / sqrt(N_l)     relative |g_l| / |w_l|     taylor sum |w_l g_l|
    contrast = raw of wrong predictions / (eps + raw of right ones)

("Beta-scheduling", arXiv 2603.28921, takes the gradient of wrong examples only; how it normalises is not known to us.
relative is the weight of "surgical fine-tuning", arXiv 2210.11466; the contrast and the intervals are ours.)

One pass over the sample, one gradient in memory, whatever the number of examples. For intervals the gradient of every
micro-batch would have to be kept. What is kept is a sketch of it, a few numbers for each group whose inner products are
those of the gradients on average; of at most 64 stretches of the sample, joined two by two when they become more.

    the sum over a resample of the stretches is c, how often each was drawn:  |sum|^2 = c' G c,  G their Gram matrix

Resampling adds noise to a norm, so that resampled norms lie above the score. Their spread is used, not their place: an
interval is value * exp(+-1.96 s), s the standard deviation of the log of the resampled scores. The sum of |w g| is
linear in g as long as no sign changes; its spread is that of sum sign(w g) w g_stretch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hf_momentum.diagnosis.results import Attribution, Compared
from hf_momentum.diagnosis.sketch import SignSketch
from hf_momentum.evaluation.metrics import Estimate
from hf_momentum.sharding import GradientPiece, ReducedGradients

EPS = 1e-12
_STRETCHES = 64
_RESAMPLES = 1000
_Z = 1.959964
_BLOCKS = {"cpu": 2**16}  # numbers that are turned to float64 at a time: as many as stay in a core's cache


class NoPredictions(ValueError):
    """A sample without a single prediction has no mean loss."""


@dataclass(frozen=True)
class Gradients:
    """What a pass over one sample leaves behind.

    Attributes:
        loss: summed over the sample, in nats.
        counts: `[stretches]`, how many predictions each stretch of the sample has.
        squares: `[groups]`, |G|^2 of the gradient G of the summed loss.
        weights: `[groups]`, |w|^2.
        products: `[groups]`, sum |w G|.
        gram: `[groups, stretches, stretches]`, inner products of the stretches' gradients, by their sketches.
        slopes: `[groups, stretches]`, sum sign(w G) w G_stretch, by their sketches.
    """

    loss: float
    counts: np.ndarray
    squares: np.ndarray
    weights: np.ndarray
    products: np.ndarray
    gram: np.ndarray
    slopes: np.ndarray

    @property
    def predictions(self) -> int:
        """How many the loss was summed over."""
        return int(self.counts.sum())


# ---- the pass --------------------------------------------------------------------------------------------------------


def collect(
    batches: Iterable[Any],
    loss_of: Callable[[Any], tuple[Tensor, int]],
    gradients: ReducedGradients,
    group_of: Sequence[int],
    groups: int,
    backward: Callable[[Tensor], None] = Tensor.backward,
    average: Callable[[Tensor], Tensor] = torch.clone,
    weights: Mapping[int, Tensor] | None = None,
    seed: int = 0,
) -> Gradients:
    """Differentiate the summed loss over a sample of predictions.

    Args:
        batches: micro-batches of the sample in random order; each is a unit of the bootstrap. Every process has as
            many, its own.
        loss_of: forward pass; this process's summed loss, times the number of processes where the wrapper averages
            gradients over them, and how many predictions all processes together have in this batch.
        gradients: where the reduced gradient lies.
        group_of: for each tensor of `gradients.layout`, in its order, the number of its group.
        groups: how many there are.
        backward: of the wrapper.
        average: the mean of a number over all processes.
        weights: in place of a tensor's own values, by row; for tensors that are whole.
        seed: of the sketch.

    Raises:
        NoPredictions: there is none.
    """
    layout = gradients.layout
    owners = {row: group for group, rows in layout.reduce_over.items() for row in rows}
    stretches = _Stretches(SignSketch(seed=seed), group_of, groups, owners)
    gradients.drop()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss, count = loss_of(batch)
        backward(loss)
        total = total.to(loss.device) + loss.detach()
        gradients.keep()
        stretches.add(count, lambda: gradients.pieces(lambda holder: False))
    if stretches.predictions == 0:
        gradients.drop()
        raise NoPredictions("a sample needs at least one prediction")
    pieces = gradients.pieces(lambda holder: False)
    sketches, counts = stretches.finish(pieces)
    table = torch.zeros(sum(layout.counts), 3, dtype=torch.float64)
    for piece in pieces:
        table[piece.row] += _sums(piece.grad, _weights_of(piece, weights)).cpu()
    signed = stretches.pulls(pieces, weights)
    gradients.drop()
    squares, norms, products = _by_group(layout.totals(table), group_of, groups).T.numpy()
    width = stretches.sketcher.width
    summed = layout.joined(sketches, (len(counts), groups, width))
    direction = layout.joined(signed, (groups, width))
    return Gradients(
        loss=float(average(total)),
        counts=np.array(counts, dtype=np.float64),
        squares=squares,
        weights=norms,
        products=products,
        gram=torch.einsum("sgk,tgk->gst", summed, summed).numpy(),
        slopes=torch.einsum("sgk,gk->gs", summed, direction).numpy(),
    )


def _weights_of(piece: GradientPiece, weights: Mapping[int, Tensor] | None) -> Tensor:
    if weights is not None and piece.row in weights:
        return weights[piece.row].detach().reshape(piece.grad.shape).to(piece.grad.dtype)
    return piece.piece.of(piece.holder.detach()).reshape(piece.grad.shape).to(piece.grad.dtype)


def _sums(grad: Tensor, weight: Tensor) -> Tensor:
    """|G|^2, |w|^2 and sum |w G| of a piece in float64, without a copy of it in float64."""
    total = torch.zeros(3, dtype=torch.float64, device=grad.device)
    block = _BLOCKS.get(grad.device.type, 2**24)
    for some in zip(grad.reshape(-1).split(block), weight.reshape(-1).split(block), strict=True):
        g, w = (part.double() for part in some)
        total += torch.stack([g.dot(g), w.dot(w), (g * w).abs().sum()])
    return total


def _by_group(table: Tensor, group_of: Sequence[int], groups: int) -> Tensor:
    return table.new_zeros(groups, table.shape[1]).index_add_(0, torch.tensor(group_of), table)


@dataclass
class _Stretches:
    """Sketches of the gradients of up to 64 stretches of a sample, from the gradient that grows from batch to batch.

    Attributes:
        owners: by row of the layout, the processes over which its pieces have to be added up.
    """

    sketcher: SignSketch
    group_of: Sequence[int]
    groups: int
    owners: Mapping[int, ProcessGroup]
    predictions: int = 0
    _every: int = 1
    _batches: int = 0
    _counted: int = 0
    _counts: list[int] = field(default_factory=list)
    _parts: list[dict[ProcessGroup | None, Tensor]] = field(default_factory=list)
    _before: dict[ProcessGroup | None, Tensor] = field(default_factory=dict)

    def add(self, count: int, pieces: Callable[[], Sequence[GradientPiece]]) -> None:
        """Note a batch; close the stretch if it is long enough."""
        self.predictions += count
        self._counted += count
        self._batches += 1
        if self._batches == self._every:
            self._close(pieces())
        if len(self._counts) == _STRETCHES:
            self._counts = [sum(self._counts[i : i + 2]) for i in range(0, _STRETCHES, 2)]
            self._parts = [_plus(*self._parts[i : i + 2]) for i in range(0, _STRETCHES, 2)]
            self._every *= 2

    def _close(self, pieces: Sequence[GradientPiece]) -> None:
        now = self.sketches(pieces)
        if self._counted:
            # The sketch is linear: of a stretch it is the difference.
            self._parts.append({owner: part - self._before.get(owner, 0.0) for owner, part in now.items()})
            self._counts.append(self._counted)
            self._before = now
        self._counted = self._batches = 0

    def finish(self, pieces: Sequence[GradientPiece]) -> tuple[dict[ProcessGroup | None, Tensor], list[int]]:
        """`[stretches, groups, width]` of each owner, and how many predictions each stretch has."""
        if self._counted:
            self._close(pieces)
        owners = {owner for part in self._parts for owner in part}
        empty = torch.zeros(self.groups, self.sketcher.width, dtype=torch.float64)
        return (
            {owner: torch.stack([part.get(owner, empty) for part in self._parts]) for owner in owners},
            self._counts,
        )

    def sketches(self, pieces: Sequence[GradientPiece]) -> dict[ProcessGroup | None, Tensor]:
        """`[groups, width]` of each owner: the sketches of the gradients."""
        by_owner: dict[ProcessGroup | None, list[GradientPiece]] = {}
        for piece in pieces:
            by_owner.setdefault(self.owners.get(piece.row), []).append(piece)
        return {
            owner: self.sketcher.table(
                [piece.grad for piece in own],
                [piece.row for piece in own],
                [_offset(piece) for piece in own],
                [self.group_of[piece.row] for piece in own],
                self.groups,
            ).cpu()
            for owner, own in by_owner.items()
        }

    def pulls(
        self, pieces: Sequence[GradientPiece], weights: Mapping[int, Tensor] | None
    ) -> dict[ProcessGroup | None, Tensor]:
        """The same of the derivative of sum |w G| with respect to G, one piece at a time: it is as large as G."""
        found: dict[ProcessGroup | None, Tensor] = {}
        for piece in pieces:
            weight, owner = _weights_of(piece, weights), self.owners.get(piece.row)
            if owner not in found:
                found[owner] = torch.zeros(self.groups, self.sketcher.width, dtype=torch.float64)
            pull = (weight * piece.grad).sign_().mul_(weight)
            found[owner][self.group_of[piece.row]] += self.sketcher.of(pull, piece.row, _offset(piece)).cpu()
        return found


def _offset(piece: GradientPiece) -> int:
    """Something that parts the pieces of one tensor on different processes."""
    if piece.offset is not None:
        return piece.offset
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _plus(
    one: Mapping[ProcessGroup | None, Tensor], other: Mapping[ProcessGroup | None, Tensor]
) -> dict[ProcessGroup | None, Tensor]:
    return {
        owner: one[owner] + other[owner] if owner in one and owner in other else {**one, **other}[owner]
        for owner in {**one, **other}
    }


# ---- scores ----------------------------------------------------------------------------------------------------------


def attribution(found: Gradients, numel: Sequence[int], seed: int = 0) -> Attribution:
    """The scores of one sample, with intervals over its examples.

    Args:
        found: by `collect`.
        numel: weights of each group.
        seed: of the bootstrap.

    Example:
        >>> one = Gradients(2.0, np.array([1.0, 1.0]), *np.ones((3, 1)), np.full((1, 2, 2), 0.25), np.full((1, 2), 0.5))
        >>> attribution(one, [4]).scores["rms"][0].value
        0.25
    """
    return _scored(found, numel, _resampled(found, seed))


def _scored(found: Gradients, numel: Sequence[int], resampled: tuple[np.ndarray, np.ndarray]) -> Attribution:
    norm = np.sqrt(found.squares) / found.predictions
    size, weight = np.sqrt(np.maximum(numel, 1)), np.sqrt(found.weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(weight > 0, norm / weight, 0.0)
    spread, slope = (_spread(logs) for logs in resampled)
    return Attribution(
        predictions=found.predictions,
        units=len(found.counts),
        loss=found.loss / found.predictions,
        scores={
            "raw": _estimates(norm, spread),
            "rms": _estimates(norm / size, spread),
            "relative": _estimates(relative, spread),
            "taylor": _estimates(found.products / found.predictions, slope),
        },
        noise=_noise(found),
    )


def compare(errors: Gradients, right: Gradients | None, numel: Sequence[int], seed: int = 0) -> Compared:
    """Scores of wrong and of right predictions, their contrast, and how often each group is first.

    Example:
        >>> one = Gradients(2.0, np.array([1.0, 1.0]), *np.ones((3, 1)), np.full((1, 2, 2), 0.25), np.full((1, 2), 0.5))
        >>> round(compare(one, one, [4]).contrast[0].value, 6), compare(one, None, [4]).contrast
        (1.0, [])
    """
    resampled = _resampled(errors, seed)
    wrong, logs = _scored(errors, numel, resampled), resampled[0]
    if right is None:
        return Compared(wrong, None, [], _first(np.array([one.value for one in wrong.scores["raw"]]), logs))
    good = attribution(right, numel, seed)
    # Other examples: drawn independently.
    logs = logs - _resampled(right, seed + 1)[0]
    pairs = zip(wrong.scores["raw"], good.scores["raw"], strict=True)
    ratio = np.array([one.value / (EPS + other.value) for one, other in pairs])
    return Compared(wrong, good, _estimates(ratio, _spread(logs)), _first(ratio, logs))


def _resampled(found: Gradients, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`[resamples, groups]`: logs of |g| and of the linearised sum |w g|, over stretches drawn with replacement."""
    stretches = len(found.counts)
    drawn = np.random.default_rng(seed).multinomial(stretches, np.full(stretches, 1 / stretches), _RESAMPLES)
    counts = (drawn @ found.counts)[:, None]
    squares = np.einsum("rs,gst,rt->rg", drawn, found.gram, drawn, optimize=True)
    slopes = drawn @ found.slopes.T
    tiny = np.finfo(np.float64).tiny
    return (
        np.log(np.sqrt(np.maximum(squares, tiny)) / counts),
        np.log(np.maximum(np.abs(slopes), tiny) / counts),
    )


def _spread(logs: np.ndarray) -> np.ndarray:
    spread: np.ndarray = logs.std(axis=0)
    return spread


def _estimates(values: np.ndarray, spread: np.ndarray) -> list[Estimate]:
    factor = np.exp(np.minimum(_Z * spread, 700.0))
    return [
        Estimate(float(value), float(value / by), float(value * by)) for value, by in zip(values, factor, strict=True)
    ]


def _first(values: np.ndarray, logs: np.ndarray) -> list[float]:
    """How often each group is the largest: the scores, each moved as its resamples are from their mean."""
    with np.errstate(divide="ignore"):
        moved = np.log(values) + logs - logs.mean(axis=0)
    times = np.bincount(moved.argmax(axis=1), minlength=len(values))
    return [float(count) / len(logs) for count in times]


def _noise(found: Gradients) -> list[float] | None:
    """The share of |G|^2 that differences between the stretches explain: their variance of the sum over |G|^2."""
    stretches = len(found.counts)
    if stretches < 2:
        return None
    share = found.counts / found.counts.sum()
    whole = np.maximum(found.gram.sum((1, 2)), np.finfo(np.float64).tiny)
    rows = found.gram.sum(2)  # <G_stretch, G>
    residual = (np.einsum("gss->gs", found.gram) - 2 * share * rows + share**2 * found.gram.sum((1, 2))[:, None]).sum(1)
    return [min(1.0, max(0.0, float(one))) for one in residual * stretches / (stretches - 1) / whole]
