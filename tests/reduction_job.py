"""A program for `python -m torch.distributed.run`: exact reductions and refusals on real process groups.

Every check runs on every process; an AssertionError ends the run. The last line of the main process says so.
"""

import re
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hf_momentum import TAM, VRAdam
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.kernels import alignment_sums
from hf_momentum.optim import MomentumOptimizer
from hf_momentum.optim.piece_state import PieceState
from hf_momentum.sharding import UnsupportedLayoutError, lay_out

# More processes than rows in some, and sizes that nothing divides evenly.
SHAPES = [(7, 3), (1, 5), (2,), (128,), (5, 1, 2)]


def integers(seed: int) -> list[torch.Tensor]:
    """Tensors of small integers, whose products and sums float64 holds exactly, in whatever order they are added."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-50, 50, shape, generator=generator).float() for shape in SHAPES]


def reductions_are_exact(mesh: Any) -> None:
    """Per tensor, per group and over the model: bitwise the sums over the whole tensors."""
    xs, ys = integers(1), integers(2)
    placed = [[distribute_tensor(x, mesh, placements_on(mesh)) for x in tensors] for tensors in (xs, ys)]
    layout = lay_out([{"params": placed[0][:2]}, {"params": placed[0][2:]}], known=lambda tensor: False)
    here = alignment_sums([x.to_local() for x in placed[0]], [y.to_local() for y in placed[1]])
    with CommDebugMode() as communication:
        table = layout.totals(here)
    assert communication.get_total_counts() == 1, communication.get_comm_counts()
    whole = alignment_sums(xs, ys)
    assert torch.equal(table, whole)
    assert torch.equal(table[2:].sum(0), whole[2:].sum(0)) and torch.equal(table.sum(0), whole.sum(0))
    if mesh.size() > 1:
        assert not torch.equal(here, whole), "a process alone must not know the sums"


def placements_on(mesh: Any) -> list[Any]:
    return [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]


def plain_tensors_among_shards_keep_their_own_sums(mesh: Any) -> None:
    whole, cut = integers(3)[0], integers(4)[0]
    params = [torch.nn.Parameter(whole), torch.nn.Parameter(distribute_tensor(cut, mesh, placements_on(mesh)))]
    layout = lay_out([{"params": params}], known=lambda tensor: tensor is params[0])
    here = alignment_sums([whole, params[1].to_local()], [whole, params[1].to_local()])
    assert torch.equal(layout.totals(here), alignment_sums([whole, cut], [whole, cut]))


def steps_are_those_of_whole_tensors(mesh: Any) -> None:
    """One collective per step, however many groups; nothing else in it communicates."""
    cases: list[tuple[type[MomentumOptimizer], dict[str, Any]]] = [
        (TAM, {"lr": 0.1}),
        (TAM, {"lr": 0.1, "max_grad_norm": 1.0}),
        (VRAdam, {"lr": 0.1, "norm_scope": "group"}),
        (VRAdam, {"lr": 0.1, "norm_scope": "tensor", "max_grad_norm": 1.0}),
    ]
    for cls, kwargs in cases:
        torch.manual_seed(0)
        start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        single = [torch.nn.Parameter(w.clone()) for w in start]
        cut = [torch.nn.Parameter(distribute_tensor(w, mesh, placements_on(mesh))) for w in start]
        optimizers = [cls([{"params": p[:1]}, {"params": p[1:3]}, {"params": p[3:]}], **kwargs) for p in (single, cut)]
        for _ in range(5):
            for one, other in zip(single, cut, strict=True):
                one.grad = torch.randn_like(one)
                other.grad = distribute_tensor(one.grad, mesh, placements_on(mesh))
            optimizers[0].step()
            with CommDebugMode() as communication:
                optimizers[1].step()
            assert communication.get_total_counts() == 1
            if "max_grad_norm" in kwargs:
                norms = [float(optimizer.grad_norm) for optimizer in optimizers]
                assert norms[0] > 2 and abs(norms[0] - norms[1]) < 1e-12 * norms[0], norms
        for one, other in zip(single, cut, strict=True):
            assert (one - other.full_tensor()).abs().max() < 1e-14


def eight_bits_where_a_process_holds_nothing(mesh: Any) -> None:
    """A large tensor of fewer rows than processes: its state is packed on some, empty on others; so is a checkpoint."""
    shapes, generator = [(2, 4096), (8191,), (3, 5)], torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(6)]
    for name, spec in OPTIMIZERS.items():
        ends = []
        for state_dtype in ("float32", "int8", "int8 through a checkpoint"):
            params = [torch.nn.Parameter(distribute_tensor(w.clone(), mesh, placements_on(mesh))) for w in start]
            options = {"lr": 1e-3, "max_grad_norm": 1.0, "state_dtype": state_dtype.split()[0]}
            optimizer = spec.cls(params, **options)
            for t, step in enumerate(grads):
                for param, grad in zip(params, step, strict=True):
                    param.grad = distribute_tensor(grad + start[1].mean(), mesh, placements_on(mesh))
                optimizer.step()
                if "checkpoint" in state_dtype and t == 2:
                    saved, optimizer = optimizer.state_dict(), spec.cls(params, **options)
                    optimizer.load_state_dict(saved)
            for param, state in optimizer.state.items():
                packed = [value for value in state.values() if isinstance(value, PieceState)]
                assert bool(packed) == (state_dtype != "float32" and param.numel() >= 4096), name
            for param, entry in zip(params, optimizer.state_dict()["state"].values(), strict=True):
                assert all(isinstance(v, DTensor) and v.shape == param.shape for v in entry.values())
            ends.append(torch.cat([param.full_tensor().detach().view(-1) for param in params]))
        moved = (ends[0] - torch.cat([w.view(-1) for w in start])).norm()
        assert 0 < (ends[1] - ends[0]).norm() < 0.05 * moved, f"{name}: {(ends[1] - ends[0]).norm() / moved}"
        assert torch.equal(ends[1], ends[2]), name


def cuts_that_are_not_data_parallel_are_refused() -> None:
    world = dist.get_world_size()
    linear = parallelize_module(
        torch.nn.Linear(4, 4 * world), init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), ColwiseParallel()
    )
    refused(TAM(linear.parameters()), "tensor, expert or pipeline parallelism")
    flat = FullyShardedDataParallel(torch.nn.Linear(4, 4 * world), use_orig_params=True, device_id=torch.device("cpu"))
    refused(TAM(flat.parameters()), "FSDP1 flat parameter.*fsdp_version: 2")


def refused(optimizer: Any, message: str, call: Any = None) -> None:
    try:
        (call or optimizer.layout)()
    except UnsupportedLayoutError as error:
        assert re.search(message, str(error)), error
        assert "Supported: one process" in str(error)
    else:
        raise AssertionError(f"not refused: {message}")


def a_gradient_that_is_not_summed_yet_is_refused(mesh: Any) -> None:
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, placements_on(mesh)))
    optimizer = TAM([weight])
    weight.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()] * mesh.ndim)
    refused(optimizer, "is not cut like the tensor itself", optimizer.step)


def the_tensors_that_fsdp_replaces_are_let_go() -> None:
    """An optimizer that held them would keep the whole model in every process's memory."""
    import weakref

    model = torch.nn.Linear(8, 8)
    optimizer = TAM(model.parameters())
    old = [weakref.ref(p) for p in model.parameters()]
    optimizer.param_groups[0]["params"] = []
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    assert all(reference() is None for reference in old)
    assert all(isinstance(p, DTensor) for p in optimizer.tensors()[0])
    assert optimizer.layout().kind == "FSDP2"


def main() -> None:
    """All checks in turn."""
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (world,))]
    if world == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")))
    for mesh in meshes:
        reductions_are_exact(mesh)
        plain_tensors_among_shards_keep_their_own_sums(mesh)
        steps_are_those_of_whole_tensors(mesh)
        if mesh.ndim == 1:
            eight_bits_where_a_process_holds_nothing(mesh)
        a_gradient_that_is_not_summed_yet_is_refused(mesh)
    cuts_that_are_not_data_parallel_are_refused()
    the_tensors_that_fsdp_replaces_are_let_go()
    if dist.get_rank() == 0:
        print(f"all reductions exact on {world} processes", file=sys.stdout, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
