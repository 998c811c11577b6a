"""Which layers move, and how noisily: gradient norm, relative update and gradient noise of every layer group.

Nothing of this waits for the device: sums and sketches stay there, one all-reduce of a small table makes them whole
where tensors are sharded, and one read-out per logging step brings them to the log.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import IntervalStrategy, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_momentum.diagnosis.groups import LayerGroup, Split, layer_groups
from hf_momentum.diagnosis.sketch import SignSketch
from hf_momentum.errors import InputError
from hf_momentum.evaluation.pictures import layer_curves, layer_heat_map
from hf_momentum.evaluation.writing import write_whole
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.kernels.sums import squared_norms
from hf_momentum.optim import MomentumOptimizer
from hf_momentum.sharding import GradientPiece, Layout, WholeGradients

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = {
    "grad_norm": "norm of the gradient",
    "update_ratio": "norm of the update / norm of the weights",
    "noise": "noise share of the gradient",
}
SKETCHES = 8  # of each logging window at most


class LayerGradientLog(TrainerCallback):
    """Adds to every training log, for each layer group that is trained:

        grad_norm/<group>      |g|: of the logged step, as the optimizer uses it: accumulated, unscaled and clipped
        update_ratio/<group>   |w_new - w_old| / |w_old|: of the logged step, over the trained weights of the group
        noise/<group>          1 - |mean g|^2 / mean |g|^2: over steps since the last log, in [0, 1]

    `noise` is 0 where all steps had one gradient and near 1 where they have nothing in common. Both squares are
    estimated without bias from sketches of at most 8 steps of each logging window, spread evenly; their error is a few
    hundredths. What differs between steps is the batch, but also the weights: a gradient that drifts within the window
    counts as noise. A window of one step has no value. A run that is resumed within a window measures its rest.

    Groups are those of `hf_momentum.diagnosis.groups.layer_groups`; adapters are counted in the group that they adapt,
    and a group of which nothing is trained is left out. Works with any Trainer in one process, under DDP and FSDP2.

    Cost: a pass over the gradients at steps that are sketched, another at logged steps, and four over the trained
    weights there. During a logged step a copy of the trained weights is held (of the shard that a process has), unless
    `updates=False`; and 8 KB for each group and sketch of the window. See docs/layers.md.

    Args:
        split: "blocks", or "parts" of them.
        patterns: groups of one's own, as for `layer_groups`.
        folder: where `layers.json` and pictures are written at the end; `layers` in the output folder unless given.
        updates: whether to log `update_ratio`.
        noise: whether to log `noise`.

    Example:
        >>> callback = LayerGradientLog(split="parts", patterns={"biases": "*.bias"})  # then: callback.attach(trainer)
    """

    def __init__(
        self,
        split: Split = "blocks",
        patterns: Mapping[str, str] | None = None,
        folder: str | Path | None = None,
        updates: bool = True,
        noise: bool = True,
    ) -> None:
        self.split, self.patterns, self.folder = split, patterns, folder
        self.updates, self.noise = updates, noise
        self._watched: _Watched | None = None
        self._pending: Tensor | None = None
        self._sketches: list[Tensor] = []
        self._gradients: Tensor | None = None
        self._before: list[Tensor] = []
        self._found: tuple[int, Tensor] | None = None

    def attach(self, trainer: Trainer) -> None:
        """Make `trainer` log its layers; before the reporters, so that all of them see the values."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Find the groups, after every library has wrapped what it wanted.

        Raises:
            InputError: DeepSpeed; another logging strategy than steps; no trained parameter; a bad `split` or pattern.
            UnsupportedLayoutError: the parameters lie in a way in which sums would be wrong.
        """
        if PartialState().distributed_type is DistributedType.DEEPSPEED:
            raise InputError(
                "the log of layers (log_layers) does not work under DeepSpeed, which steps before its gradients can be "
                "looked at; shard with FSDP2 (accelerate_configs), or leave it out"
            )
        if args.logging_strategy != IntervalStrategy.STEPS:
            raise InputError(
                f"the log of layers (log_layers) needs to know which steps are logged; logging_strategy is "
                f"{IntervalStrategy(args.logging_strategy).value!r}: set it to 'steps', and logging_steps to how many"
            )
        self._watched = _Watched(unwrapped(model), base_optimizer(optimizer), self.split, self.patterns)
        self._pending, self._sketches, self._gradients, self._before, self._found = None, [], None, [], None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients and copy the weights, if the coming step is to be logged or sketched."""
        watched, step, every = self._watched, state.global_step + 1, int(state.logging_steps)
        if watched is None:
            return
        logged, sketched = is_logged(step, every, args.logging_first_step), self.noise and is_sketched(step, every)
        pieces = watched.gradients.pieces(lambda holder: False) if logged or sketched else []
        if sketched:
            self._pending = watched.sketched(pieces)
        if logged:
            self._gradients = watched.squares({piece.row: piece.grad for piece in pieces})
            if self.updates:
                self._before = [tensor.clone() for tensor in watched.weights().values()]

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Form what is logged, on the device, and over all processes."""
        watched, step, every = self._watched, state.global_step + 1, int(state.logging_steps)
        if watched is None or (self._pending is None and self._gradients is None):
            return
        factor = clipped_by(base_optimizer(optimizer))
        if self._pending is not None:
            self._sketches.append(self._pending * factor)
            self._pending = None
        if self._gradients is None:
            return
        columns = [self._gradients.unsqueeze(1) * factor**2]
        if self.updates:
            weights = watched.weights()
            columns.append(watched.squares(dict(zip(weights, self._before, strict=True))).unsqueeze(1))
            torch._foreach_sub_(self._before, list(weights.values()))  # in place: no third copy of the weights
            columns.append(watched.squares(dict(zip(weights, self._before, strict=True))).unsqueeze(1))
        table = watched.totals(torch.cat([*columns, *self._sketches], dim=1))
        sums, sketches = table[:, : len(columns)], table[:, len(columns) :]
        found = [sums[:, 0].sqrt()]
        found += [(sums[:, 2] / sums[:, 1]).sqrt()] if self.updates else []
        found += [noise_share(sketches.unflatten(1, (len(self._sketches), -1)))] if self._sketches else []
        self._found = (step, torch.stack(found))
        self._gradients, self._before = None, []
        if step % every == 0:
            self._sketches = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Extend the training log of the step in place."""
        if logs is None or "loss" not in logs or self._watched is None or self._found is None:
            return
        step, found = self._found
        if step != state.global_step:
            return
        self._found = None
        quantities = ["grad_norm", *["update_ratio"] * self.updates, "noise"][: len(found)]
        named = {
            f"{quantity}/{group.name}": value
            for quantity, values in zip(quantities, found.tolist(), strict=True)  # one read-out for all
            for group, value in zip(self._watched.groups, values, strict=True)
            if math.isfinite(value)  # JSON knows no infinity
        }
        logs.update(named)
        state.log_history[-1].update(named)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what was logged, also before a run was resumed, as numbers and pictures."""
        if self._watched is None or not state.is_world_process_zero:
            return
        folder = Path(self.folder) if self.folder is not None else Path(str(args.output_dir)) / "layers"
        write_layers(state.log_history, [group.name for group in self._watched.groups], folder)
        self._watched = None


class _Watched:
    """The trained tensors of a prepared model, by layer group, and sums over them.

    A *cell* is what one layer group has in tensors that the same processes share; a group has one cell, or one for
    each set of processes if some of its tensors are sharded and others are whole. Rows of tables are cells until
    `totals` makes them groups.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, patterns: Mapping[str, str] | None
    ) -> None:
        self.gradients = WholeGradients(optimizer)
        layout = self.gradients.layout
        every = layer_groups(model, split, patterns)
        names = {id(param): name for name, param in model.named_parameters()}
        group_of = {name: place for place, group in enumerate(every) for name in (*group.weights, *group.adapters)}
        held = [param for group in optimizer.param_groups for param in group["params"]]
        self.tensors: dict[int, Tensor] = {
            row: param for row, param in enumerate(held) if param.requires_grad and names.get(id(param)) in group_of
        }
        if not self.tensors:
            raise InputError(
                f"the log of layers (log_layers) finds none of the model's parameters in {type(optimizer).__name__}, "
                "which may step each layer within backward; choose another optim"
            )
        shared = {row: process_group for process_group, rows in layout.reduce_over.items() for row in rows}
        places = {row: (group_of[names[id(param)]], shared.get(row)) for row, param in self.tensors.items()}
        cells = sorted(dict.fromkeys(places.values()), key=lambda cell: cell[0])  # in one order on every process
        trained = list(dict.fromkeys(group for group, _ in cells))
        self.groups: list[LayerGroup] = [every[group] for group in trained]
        self.device = self._local(next(iter(self.tensors.values()))).device
        self._cell = {row: cells.index(place) for row, place in places.items()}
        self._count = len(cells)
        self._group_of_cell = torch.tensor([trained.index(group) for group, _ in cells], device=self.device)
        rows_of = {one: tuple(k for k, (_, by) in enumerate(cells) if by is one) for one in layout.reduce_over}
        self._layout = Layout(layout.kind, (len(cells),), {one: rows for one, rows in rows_of.items() if rows})
        self._cells = torch.tensor(list(self._cell.values()), device=self.device)
        self._sketch = SignSketch()

    @staticmethod
    def _local(param: Tensor) -> Tensor:
        return param.to_local() if isinstance(param, DTensor) else param

    def weights(self) -> dict[int, Tensor]:
        """What this process holds of each trained tensor, by row."""
        return {row: self._local(param).detach() for row, param in self.tensors.items()}

    def squares(self, tensors: Mapping[int, Tensor]) -> Tensor:
        """Sums of squares, `[cells]`, in float64, of tensors like the trained ones, by row."""
        found, nothing = torch.zeros((2, self._count), dtype=torch.float64, device=self.device)
        # A row for every tensor, so that the cells, which lie on the device, are always the same.
        sums = [squared_norms([tensors[row]])[0].to(found) if row in tensors else nothing[0] for row in self._cell]
        return found.index_add_(0, self._cells, torch.stack(sums))

    def sketched(self, pieces: Sequence[GradientPiece]) -> Tensor:
        """Sketches of the gradient, `[cells, width]`; those of all processes add up to those of whole tensors.

        Raises:
            InputError: a tensor is cut along another dimension than the first.
        """
        known = [piece for piece in pieces if piece.row in self._cell]
        cut = next((piece for piece in known if piece.offset is None), None)
        if cut is not None:
            raise InputError(
                f"noise: a tensor of shape {tuple(cut.holder.shape)} is cut along another dimension than its first, "
                "so its piece is not one stretch of it; set noise=False"
            )
        found = torch.zeros((self._count, self._sketch.width), dtype=torch.float64, device=self.device)
        for device in dict.fromkeys(piece.grad.device for piece in known):
            here = [piece for piece in known if piece.grad.device == device]
            found += self._sketch.table(
                [piece.grad for piece in here],
                [piece.row for piece in here],
                [piece.offset or 0 for piece in here],
                [self._cell[piece.row] for piece in here],
                self._count,
            ).to(self.device)
        return found

    def totals(self, table: Tensor) -> Tensor:
        """A table of sums of this process, `[cells, k]`, as one over all processes, `[groups, k]`."""
        found = table.new_zeros(len(self.groups), table.shape[1])
        return found.index_add_(0, self._group_of_cell, self._layout.totals(table))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what DDP and `torch.compile` put around it.

    Example:
        >>> inner = nn.Linear(1, 1)
        >>> unwrapped(torch.compile(inner)) is inner
        True
    """
    from accelerate.utils import extract_model_from_parallel

    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def is_logged(step: int, every: int, first: bool) -> bool:
    """Whether transformers logs after this step, counted from 1.

    Example:
        >>> [step for step in range(1, 9) if is_logged(step, 4, first=True)]
        [1, 4, 8]
    """
    return step % every == 0 or (first and step == 1)


def is_sketched(step: int, every: int) -> bool:
    """Whether a step, counted from 1, is among the `SKETCHES` of its window of `every` that are sketched.

    Example:
        >>> [step for step in range(1, 17) if is_sketched(step, 16)]
        [2, 4, 6, 8, 10, 12, 14, 16]
        >>> [step for step in range(1, 11) if is_sketched(step, 5)], is_sketched(1, 1)
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], False)
    """
    place, wanted = (step - 1) % every + 1, min(SKETCHES, every)
    return every > 1 and place * wanted // every > (place - 1) * wanted // every


def noise_share(sketches: Tensor) -> Tensor:
    """What part of a gradient's mean square is not its mean's, estimated from sketches of it.

    |mean g|^2 is estimated by the mean of <s_t, s_u> over all pairs of different steps, which noise does not bias.

    Args:
        sketches: `[groups, steps, width]`; steps whose sketch is not finite are left out.

    Returns:
        `[groups]`, in [0, 1]; NaN for fewer than two steps, or gradients that are all zero.

    Example:
        >>> one, other = torch.eye(2).double()
        >>> noise_share(torch.stack([torch.stack([one, one]), torch.stack([one, other]), torch.stack([one, -one])]))
        tensor([0., 1., 1.], dtype=torch.float64)
    """
    squares = sketches.square().sum(-1)
    finite = squares.isfinite()
    sketches = torch.where(finite.unsqueeze(-1), sketches, 0.0)
    count, sum_of_squares = finite.sum(-1), torch.where(finite, squares, 0.0).sum(-1)
    square_of_mean = (sketches.sum(-2).square().sum(-1) - sum_of_squares) / (count * (count - 1))
    share = (1 - square_of_mean / (sum_of_squares / count)).clamp(0.0, 1.0)
    return torch.where(count > 1, share, math.nan)


def clipped_by(optimizer: Any) -> Tensor | float:
    """What an optimizer that clips inside its step has just multiplied its gradients by; 1 for any other.

    Example:
        >>> clipped_by(torch.optim.SGD([torch.zeros(1)]))
        1.0
    """
    if not isinstance(optimizer, MomentumOptimizer) or optimizer.grad_norm is None:
        return 1.0
    factor: Tensor = (optimizer.param_groups[0]["max_grad_norm"] / (optimizer.grad_norm + 1e-6)).clamp(max=1.0)
    return factor


def write_layers(history: Sequence[Mapping[str, Any]], groups: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write what a log says of layer groups: `layers.json`, `curves.png`, and a heat map of each quantity.

    Args:
        history: of a Trainer.
        groups: names in the order of the model.
        folder: made if it is missing; nothing is written if the history says nothing.

    Returns:
        What `layers.json` has: `steps`, `groups`, and by quantity `[groups][steps]`, null where there is no value.

    Example:
        >>> import tempfile
        >>> history = [{"step": 5, "loss": 1.0, "grad_norm/head": 2.0}, {"step": 5, "eval_loss": 1.0}]
        >>> write_layers(history, ["head"], Path(tempfile.mkdtemp()))
        {'steps': [5], 'groups': ['head'], 'grad_norm': [[2.0]]}
    """
    entries = [entry for entry in history if any(f"grad_norm/{group}" in entry for group in groups)]
    steps = [entry["step"] for entry in entries]
    values = {
        quantity: [[entry.get(f"{quantity}/{group}") for entry in entries] for group in groups]
        for quantity in QUANTITIES
        if any(f"{quantity}/{group}" in entry for entry in entries for group in groups)
    }
    found: dict[str, Any] = {"steps": steps, "groups": list(groups), **values}
    if not steps:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "layers.json", json.dumps(found, indent=1) + "\n")
    shown = {QUANTITIES[quantity]: rows for quantity, rows in values.items()}
    write_whole(folder / "curves.png", _png(layer_curves(shown, groups, steps, linear=[QUANTITIES["noise"]])))
    for quantity, rows in values.items():
        name = "heatmap.png" if quantity == "grad_norm" else f"heatmap_{quantity}.png"
        picture = layer_heat_map(rows, groups, steps, QUANTITIES[quantity], logarithmic=quantity != "noise")
        write_whole(folder / name, _png(picture))
    return found


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
