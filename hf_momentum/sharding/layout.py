"""Which process holds which piece of which tensor, and exact sums over all of them.

A cosine or a norm over a *piece* of a tensor is not the cosine or norm of the tensor, and nothing in torch warns when
an optimizer takes one. Here every tensor that a user gave to an optimizer is one row of a table, whatever wrapper cut
it up: each process fills in the sums over its pieces, and one all-reduce of the table makes them whole everywhere.
No gradient and no parameter is ever gathered.

Words: a *tensor* is a parameter as its user gave it. A *holder* is what stands in the optimizer's group when `step` is
called: the tensor itself, its DTensor shard, or a flat partition with pieces of many tensors. A *piece* is the part of
one tensor inside one holder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_momentum.errors import TrainingStopped

SUPPORTED = (
    "one process, DataParallel, DDP, FSDP2 and HSDP (fully_shard), DeepSpeed ZeRO-1, 2 and 3 with or without CPU "
    "offload, and ZeRO-0 in float32"
)

# Names of mesh dimensions along which a tensor is cut for other reasons than data parallelism. Untested, so refused.
_NOT_DATA_PARALLEL = {"tp", "ep", "etp", "pp"}


class UnsupportedLayoutError(TrainingStopped):
    """A parameter is stored in a way in which the optimizer's reductions would be silently wrong."""

    def __init__(self, what: str, remedy: str = "") -> None:
        advice = f" {remedy}." if remedy else ""
        super().__init__(f"{what}: cosines and norms would be silently wrong.{advice} Supported: {SUPPORTED}.")


@dataclass(frozen=True)
class Piece:
    """The part of one tensor that lies in one holder of this process.

    Attributes:
        group, position: the tensor's place among those its user gave: `param_groups[group]["params"][position]`.
        start: where the piece begins in the holder's flat storage; None if the piece is all that the holder has here.
        numel: its number of elements.
        offset: where it begins in the flattened tensor; meaningful where `start` is given.
    """

    group: int
    position: int
    start: int | None
    numel: int
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of a holder, or of anything shaped like it: a gradient, a state tensor. A view, never a copy.

        Example:
            >>> Piece(0, 0, start=1, numel=2).of(torch.arange(4))
            tensor([1, 2])
        """
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local if self.start is None else local.narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class Holder:
    """A tensor out of `param_groups`, its gradient in this step, and the pieces in it."""

    tensor: Tensor
    grad: Tensor
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """All that one step needs to know of how the tensors lie.

    Attributes:
        kind: what to call it in one line: "whole tensors", "FSDP2", "HSDP", "ZeRO-1/2" or "ZeRO-3".
        counts: the number of tensors of each group.
        reduce_over: the process groups whose members hold different pieces, each with the rows of the table that
            they share: `group * ... + position` counted over all groups. Empty where every tensor is whole.
        publish: copies updated holders to where the wrapper reads them; for wrappers that call `step` in parts.
    """

    kind: str
    counts: tuple[int, ...]
    reduce_over: Mapping[dist.ProcessGroup, tuple[int, ...]] = field(default_factory=dict)
    publish: Callable[[Sequence[Holder]], None] | None = None

    def describe(self) -> str:
        """One phrase: kind, tensors, and what a step adds to the communication.

        Example:
            >>> Layout("whole tensors", (2, 1)).describe()
            'whole tensors: 3 tensors in 2 groups; no communication in the step'
        """
        sizes = [str(group.size()) for group in self.reduce_over]
        extra = "; no communication in the step"
        if sizes:
            calls = "one all-reduce" if len(sizes) == 1 else f"{len(sizes)} all-reduces"
            extra = f", in {' or '.join(sizes)} shards each; {calls} of a few numbers per tensor in the step"
        tensors, groups = sum(self.counts), len(self.counts)
        return f"{self.kind}: {tensors} tensor{'s' * (tensors != 1)} in {groups} group{'s' * (groups != 1)}{extra}"

    def totals(self, table: Tensor) -> Tensor:
        """Each tensor's sums over all processes that hold pieces of it.

        Args:
            table: `[tensors, k]`, this process's sums; zeros for tensors of which it holds nothing. Tensors that are
                whole on every process keep their row.

        Returns:
            A table of the same shape, the same on every process bit for bit, on the device of `table`.

        Example:
            >>> Layout("whole tensors", (1,)).totals(torch.tensor([[1.0, 2.0]]))
            tensor([[1., 2.]])
        """
        for group, rows in self.reduce_over.items():
            if len(rows) == len(table):
                table = _all_reduce(table, group)
                continue
            lines = list(table.unbind())
            for row, line in zip(rows, _all_reduce(torch.stack([lines[row] for row in rows]), group), strict=True):
                lines[row] = line
            table = torch.stack(lines)
        return table

    def joined(self, parts: Mapping[dist.ProcessGroup | None, Tensor], shape: Sequence[int]) -> Tensor:
        """Sums over all tensors, from this process's sums over the pieces of those that it shares with each group.

        Args:
            parts: by the process group whose members hold different pieces of the tensors, as in `reduce_over`; None
                has those of whole tensors. A group of whose tensors nothing lies here may be left out.
            shape: of each.

        Returns:
            float64 on the CPU, the same on every process bit for bit.

        Example:
            >>> Layout("whole tensors", (1,)).joined({None: torch.ones(2)}, [2])
            tensor([1., 1.], dtype=torch.float64)
        """
        nothing = torch.zeros(*shape, dtype=torch.float64)
        total = parts.get(None, nothing).to("cpu", torch.float64)
        for group in self.reduce_over:  # all members call, also those that hold nothing
            total = total + _all_reduce(parts.get(group, nothing).to("cpu", torch.float64), group)
        return total


def _all_reduce(table: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `table` over `group`, by way of the accelerator if the group cannot take tensors of its device."""
    served = f"{table.device.type}:" in str(dist.get_backend_config(group))
    accelerator = torch.accelerator.current_accelerator()
    carried = table.clone() if served or accelerator is None else table.to(accelerator)
    dist.all_reduce(carried, group=group)
    return carried.to(table.device)


def lay_out(groups: Sequence[Mapping[str, Any]], known: Callable[[Tensor], bool]) -> Layout:
    """The layout of groups whose holders each have one tensor: plain tensors and DTensors.

    Args:
        groups: the optimizer's `param_groups`.
        known: whether a tensor was given by the user, and not put there by a wrapper.

    Raises:
        UnsupportedLayoutError: a tensor is an FSDP1 view, a DTensor cut in an untested way, or an unknown stranger.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> lay_out([{"params": [w]}], known=lambda tensor: tensor is w).kind
        'whole tensors'
    """
    shared: dict[dist.ProcessGroup, list[int]] = {}
    kinds, row = {"whole tensors"}, 0
    for group in groups:
        for param in group["params"]:
            if isinstance(param, DTensor):
                kind, process_group = _sharded_over(param)
                kinds.add(kind)
                if process_group is not None and process_group.size() > 1:
                    shared.setdefault(process_group, []).append(row)
            else:
                require_whole_tensor(param, known)
            row += 1
    kind = " and ".join(sorted(kinds - {"whole tensors"})) or "whole tensors"
    rows = {process_group: tuple(members) for process_group, members in shared.items()}
    return Layout(kind, tuple(len(group["params"]) for group in groups), rows)


def _sharded_over(param: DTensor) -> tuple[str, dist.ProcessGroup | None]:
    mesh, names = param.device_mesh, param.device_mesh.mesh_dim_names or ()
    sharded = [dim for dim, placement in enumerate(param.placements) if type(placement) is Shard]
    plain = all(type(placement) in (Shard, Replicate) for placement in param.placements)
    require_data_parallel(names)
    if not plain or len(sharded) > 1:
        raise UnsupportedLayoutError(
            f"a tensor of shape {tuple(param.shape)} is placed as {param.placements} on a mesh with the dimensions "
            f"{names or mesh.shape} (tensor, expert or pipeline parallelism)",
            "Use fully_shard over one mesh dimension, or two for HSDP",
        )
    kind = "HSDP" if mesh.ndim > 1 else "FSDP2"
    return kind, mesh.get_group(sharded[0]) if sharded else None


def require_data_parallel(names: Sequence[str]) -> None:
    """Raise unless a mesh cuts tensors for data parallelism alone.

    Raises:
        UnsupportedLayoutError: a dimension of the mesh has the name of another parallelism.

    Example:
        >>> require_data_parallel(["dp_shard"])
        >>> require_data_parallel(["tp"])
        Traceback (most recent call last):
        ...
        hf_momentum.sharding.layout.UnsupportedLayoutError: tensors are cut along the mesh dimension tp (tensor, ...
    """
    others = sorted(_NOT_DATA_PARALLEL & set(names))
    if others:
        raise UnsupportedLayoutError(
            f"tensors are cut along the mesh dimension {', '.join(others)} (tensor, expert or pipeline parallelism)",
            "Use fully_shard over one mesh dimension, or two for HSDP",
        )


def require_like(param: Tensor, grad: Tensor) -> None:
    """Raise unless a gradient is cut like its parameter.

    Raises:
        UnsupportedLayoutError: it is not, for example because it has not been summed over the processes yet.

    Example:
        >>> require_like(torch.zeros(2), torch.ones(2))
    """
    here = [(t.placements, t.device_mesh) if isinstance(t, DTensor) else None for t in (param, grad)]
    if here[0] != here[1]:
        raise UnsupportedLayoutError(
            f"the gradient of a tensor of shape {tuple(param.shape)} is not cut like the tensor itself "
            f"({here[1] and here[1][0]}, not {here[0] and here[0][0]})"
        )


def require_whole_tensor(param: Tensor, known: Callable[[Tensor], bool]) -> None:
    """Raise unless a tensor that is no DTensor is whole and was given to the optimizer by its user.

    Raises:
        UnsupportedLayoutError: FSDP1's flat parameters, and tensors that an unknown wrapper put there.

    Example:
        >>> require_whole_tensor(torch.zeros(3), known=lambda tensor: False)
        Traceback (most recent call last):
        ...
        hf_momentum.sharding.layout.UnsupportedLayoutError: a tensor of shape (3,) stands in the optimizer that ...
    """
    if getattr(param, "_fsdp_flattened", False):  # torch.distributed.fsdp marks FSDP1's views so
        raise UnsupportedLayoutError(
            f"a tensor of shape {tuple(param.shape)} is a piece of an FSDP1 flat parameter", "Set fsdp_version: 2"
        )
    if not known(param):
        raise UnsupportedLayoutError(
            f"a tensor of shape {tuple(param.shape)} stands in the optimizer that was not given to it: a wrapper that "
            "is not known here put it there (DeepSpeed's, for half-precision weights without ZeRO, is one)",
            "Under DeepSpeed, set the ZeRO stage to 1, 2 or 3",
        )
