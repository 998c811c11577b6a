"""A program for `accelerate launch`: reduced gradients of two losses, written between backward and step.

`plan.json` holds a list of cases; what each found goes to `facts.json` beside it: for every claim the largest relative
difference, over all processes and steps, from one process that has all the data and computes in float64.
"""

import json
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from hf_momentum.errors import TrainingStopped
from hf_momentum.sharding.gradients import GradientPiece, total
from hf_momentum.sharding.zero_gradients import reduced_gradients

FEATURES, WIDTH, ROWS, RATE, MAX_NORM = 7, 5, 4, 0.1, 1.0


class Block(torch.nn.Module):
    """Sizes that neither two nor three processes divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(WIDTH, 2 * WIDTH + 1), torch.nn.Linear(2 * WIDTH + 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class TwoLosses(torch.nn.Module):
    """A body with a head for each loss, a frozen tensor, and one that no loss reaches."""

    _no_split_modules: ClassVar = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.enter = torch.nn.Linear(FEATURES, WIDTH)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.main, self.auxiliary = torch.nn.Linear(WIDTH, 1), torch.nn.Linear(WIDTH, 3)
        frozen = torch.nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.others = torch.nn.ParameterDict({"frozen": frozen, "unreached": torch.nn.Parameter(torch.randn(3))})

    def forward(self, x: Tensor, loss: str) -> Tensor:
        rows = x.to(self.enter.weight.dtype)
        x = self.enter(rows) + self.others["frozen"]
        for block in self.blocks:
            x = block(x)
        # Targets that cannot be learnt: the gradients stay large, and are always clipped.
        if loss == "main":
            return (self.main(x) - 10 * rows[:, :1].square()).square().mean()
        return (self.auxiliary(x) + 10 * rows[:, :3].square()).square().mean()


def groups_of(model: torch.nn.Module) -> list[list[Tensor]]:
    return [[p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]]


def rows_of(loss: str, step: int, micro: int, rank: int) -> Tensor:
    seed = hash((["main", "auxiliary"].index(loss), step, micro, rank)) % 2**31
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed))


class OneProcess:
    """The same model with all processes' data; its weights are exact, and rounded to the dtype that is trained in."""

    def __init__(self, model: TwoLosses, dtype: torch.dtype, processes: int, micros: int) -> None:
        self.processes, self.micros = processes, micros
        self.model = TwoLosses().to(torch.float64 if dtype == torch.float32 else dtype)
        self.model.load_state_dict(model.state_dict())
        self.params = [p for group in groups_of(self.model) for p in group]
        self.weights = [p.detach().double() for p in self.params]
        self.applied = [torch.zeros_like(w) for w in self.weights]

    def gradient(self, loss: str, step: int) -> list[Tensor]:
        """By row; zeros for what the loss does not reach."""
        found = [torch.zeros_like(w) for w in self.weights]
        for rank in range(self.processes):
            for micro in range(self.micros):
                self.model.zero_grad()
                (self.model(rows_of(loss, step, micro, rank), loss) / self.micros).backward()
                for grad, param in zip(found, self.params, strict=True):
                    if param.grad is not None:
                        grad += param.grad.double() / self.processes
        return found

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> float:
        """Clipped gradient descent; the norm."""
        norm = float(torch.cat([g.view(-1) for g in grads]).norm())
        self.applied = [grad * min(1.0, MAX_NORM / (norm + 1e-6)) for grad in grads]
        for weight, grad, param in zip(self.weights, self.applied, self.params, strict=True):
            weight -= RATE * grad
            param.copy_(weight)
        return norm


def everything(holder: Tensor) -> bool:
    return True


class Run:
    """One prepared model, beside the single process that it is compared with."""

    def __init__(self, case: dict[str, Any]) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        dtype = getattr(torch, case.get("dtype", "float32"))
        self.micros = case["micros"]
        # The launcher's file says "auto", which Accelerate takes for a number outside of the Trainer.
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(self.micros)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "false":
            PartialState(cpu=True)
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
        self.rank = self.accelerator.process_index
        torch.manual_seed(0)
        model = TwoLosses().to(dtype)
        self.truth = OneProcess(model, dtype, self.accelerator.num_processes, self.micros)
        given = [[weakref.ref(p) for p in group] for group in groups_of(model)]
        # The momentum changes nothing, but its buffer is the gradient of the last step, by holder.
        base = torch.optim.SGD([{"params": group} for group in groups_of(model)], lr=RATE, momentum=1e-12)
        self.base = base
        if self.accelerator.state.deepspeed_plugin is not None:
            self._configure(case, dtype)
        self.model, self.optimizer = self.accelerator.prepare(model, base)
        self.engine = self.model if self.accelerator.state.deepspeed_plugin is not None else None
        self.gradients = reduced_gradients(self.engine, base, given)
        if "loss_scale" in case:
            self.engine.optimizer.override_loss_scale(case["loss_scale"])
        self.places = self.gradients.pieces(everything)
        self.gradients.drop()
        for method in case.get("faults", []):
            setattr(self.gradients, method, lambda: None)
        if self.engine is not None:
            assert type(self.engine.basic_optimizer) is torch.optim.SGD, "DeepSpeed put its own optimizer in place"
        self.claims: dict[str, float] = {}
        self.norms: list[float] = []

    def _configure(self, case: dict[str, Any], dtype: torch.dtype) -> None:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": self.micros,
            "gradient_clipping": MAX_NORM,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        config["zero_optimization"] |= {"stage": case.get("stage", config["zero_optimization"]["stage"])}
        # Small, so that there are several buckets, sub-groups, and weights that are cut.
        config["zero_optimization"] |= {"reduce_bucket_size": 60, "sub_group_size": 40} | case.get("zero", {})
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 10, "stage3_prefetch_bucket_size": 100}
        if dtype != torch.float32:
            from deepspeed.accelerator import get_accelerator

            config[{torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]] = {"enabled": True}
            # A scale at which nothing overflows, so that no step is skipped.
            config.get("fp16", {})["initial_scale_power"] = 4
            get_accelerator().is_fp16_supported = lambda: True  # tiny products do work on a CPU
        config |= case.get("deepspeed", {})

    def backward(self, loss: str, step: int, boundary: bool = True) -> None:
        """All micro-batches of one loss; each process has its own rows."""
        for micro in range(self.micros):
            last = micro == self.micros - 1
            rows = rows_of(loss, step, micro, self.rank).to(self.accelerator.device)
            if self.engine is not None:
                wanted = self.gradients.boundary if loss == "auxiliary" else True
                self.engine.set_gradient_accumulation_boundary(boundary and wanted and last)
                self.engine.backward(self.model(rows, loss) / self.micros, scale_wrt_gas=False)
            else:
                with nullcontext() if last and boundary else self.accelerator.no_sync(self.model):
                    (self.model(rows, loss) / self.micros).backward()

    def scale(self, factor: float) -> None:
        """Overwrite in place."""
        for piece in self.gradients.pieces(everything):
            piece.grad.mul_(factor)

    def claim(self, name: str, difference: float) -> None:
        self.claims[name] = max(self.claims.get(name, 0.0), difference)

    def compare(self, name: str, wanted: Sequence[Tensor], pieces: Sequence[GradientPiece] | None = None) -> None:
        """Pieces are the stretches of the whole gradient, and their sums over all processes those of the whole."""
        pieces = self.gradients.pieces(everything) if pieces is None else pieces
        grads = [piece.grad.double() / float(self.gradients.loss_scale()) for piece in pieces]
        self.claim(name, difference(pieces, grads, wanted))
        sums = torch.tensor([[float((g * g).sum()), float(g.sum())] for g in grads], dtype=torch.float64).view(-1, 2)
        whole = torch.cat([grad.view(-1) for grad in wanted])
        expected = torch.stack([(whole * whole).sum(), whole.sum()])
        found = total(self.gradients.layout, pieces, sums)
        self.claim("sums", float((found - expected).abs().max() / whole.norm() ** 2))

    def step(self, grads: Sequence[Tensor]) -> None:
        """One step of both; the weights that the optimizer holds are then the same."""
        self.gradients.settle()
        if self.engine is not None:
            self.engine.step()
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
        self.norms.append(self.truth.step(grads))
        self.compare_weights("weights")

    def compare_weights(self, name: str) -> None:
        held = [piece.piece.of(piece.holder.detach()).double() for piece in self.places]
        self.claim(name, difference(self.places, held, self.truth.weights))

    def compare_state(self) -> None:
        """A piece cuts the optimizer's state as it cuts the gradient."""
        held = [piece.piece.of(self.base.state[piece.holder]["momentum_buffer"]).double() for piece in self.places]
        self.claim("state", difference(self.places, held, self.truth.applied))


def difference(pieces: Sequence[GradientPiece], found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    scale = max(float(value.abs().max()) for value in wanted)
    largest = 0.0
    for piece, value in zip(pieces, found, strict=True):
        whole = wanted[piece.row].reshape(-1)
        assert piece.offset is not None and piece.numel == whole.numel()
        stretch = whole[piece.offset : piece.offset + value.numel()]
        if value.numel():
            largest = max(largest, float((value.cpu().reshape(-1) - stretch).abs().max()) / scale)
    return largest if largest == largest else float("inf")


def combined(*terms: tuple[float, Sequence[Tensor]]) -> list[Tensor]:
    return [sum(factor * grads[i] for factor, grads in terms) for i in range(len(terms[0][1]))]


def auxiliary_first(run: Run, t: int) -> None:
    a, b = run.truth.gradient("auxiliary", t), run.truth.gradient("main", t)
    run.gradients.drop()
    run.backward("auxiliary", t)
    run.compare("the reduced auxiliary gradient", a)
    run.scale(0.7)
    run.gradients.keep()
    run.backward("main", t)
    run.compare("what was written and the main gradient", combined((0.7, a), (1, b)))
    run.scale(1.3)
    run.step(combined((0.91, a), (1.3, b)))


def main_only(run: Run, t: int) -> None:
    b = run.truth.gradient("main", t)
    run.gradients.drop()
    run.backward("main", t)
    run.step(b)


def main_first(run: Run, t: int) -> None:
    a, b = run.truth.gradient("auxiliary", t), run.truth.gradient("main", t)
    run.gradients.drop()
    run.backward("main", t)
    run.compare("the reduced main gradient", b)
    run.scale(0.6)
    run.gradients.keep()
    run.backward("auxiliary", t)
    run.compare("what was written and the auxiliary gradient", combined((1, a), (0.6, b)))
    run.step(combined((1, a), (0.6, b)))


def taking(run: Run, t: int) -> None:
    a, b = run.truth.gradient("auxiliary", t), run.truth.gradient("main", t)
    run.gradients.drop()
    run.backward("auxiliary", t)
    taken = run.gradients.take(everything)
    run.backward("main", t)
    run.compare("the taken gradient", a, taken)
    run.compare("the main gradient after it", b)
    pieces = run.gradients.pieces(everything)
    assert [piece.row for piece in pieces] == [piece.row for piece in taken]
    for piece, other in zip(pieces, taken, strict=True):
        piece.grad.add_(other.grad, alpha=0.5)
    run.step(combined((0.5, a), (1, b)))


def two_auxiliaries(run: Run, t: int) -> None:
    first, second = run.truth.gradient("auxiliary", t), run.truth.gradient("auxiliary", t + 100)
    b = run.truth.gradient("main", t)
    run.gradients.drop()
    run.backward("auxiliary", t)
    run.scale(0.7)
    run.gradients.keep()
    run.backward("auxiliary", t + 100)
    run.compare("two auxiliary gradients", combined((0.7, first), (1, second)))
    run.scale(0.5)
    run.gradients.keep()
    run.backward("main", t)
    run.step(combined((0.35, first), (0.5, second), (1, b)))


def dropped(run: Run, t: int) -> None:
    run.gradients.drop()
    run.backward("auxiliary", t)
    run.scale(50.0)
    run.gradients.keep()
    run.backward("main", t)
    run.scale(50.0)
    run.gradients.drop()
    run.compare_weights("weights after a drop")
    a = run.truth.gradient("auxiliary", t + 1)
    run.backward("auxiliary", t + 1)
    run.compare("the gradient after a drop", a)
    run.gradients.drop()
    if run.engine is not None:  # DDP does not allow to drop what it has not reduced yet
        run.backward("main", t, boundary=False)
        run.gradients.drop()
    auxiliary_first(run, t + 2)


def boundary_later(run: Run, t: int) -> None:
    """No pass is declared a boundary; for wrappers that reduce all the same."""
    if run.gradients.boundary:
        return
    a, b = run.truth.gradient("auxiliary", t), run.truth.gradient("main", t)
    run.gradients.drop()
    run.backward("auxiliary", t)
    run.gradients.keep()
    run.backward("main", t, boundary=False)
    run.compare("two gradients without a boundary", combined((1, a), (1, b)))
    run.step(combined((1, a), (1, b)))


def nothing_yet(run: Run, t: int) -> None:
    """Before any backward pass, what is needed is zero, can be written to, and is added to."""
    b = run.truth.gradient("main", t)
    run.gradients.drop()
    pieces = run.gradients.pieces(everything)
    assert pieces and not any(piece.grad.any() for piece in pieces)
    for piece in pieces:
        piece.grad.fill_(0.01 * float(run.gradients.loss_scale()))
    run.gradients.keep()
    run.backward("main", t)
    constant = [torch.full_like(w, 0.01 * p.requires_grad) for w, p in zip(b, run.truth.params, strict=True)]
    run.compare("what was written before any pass", combined((1, constant), (1, b)))
    run.step(combined((1, constant), (1, b)))


FORMS: list[Callable[[Run, int], None]] = [
    *[auxiliary_first] * 3,
    main_only,
    main_first,
    taking,
    two_auxiliaries,
    main_only,
    dropped,
    boundary_later,
    nothing_yet,
    auxiliary_first,
]


def facts_of(case: dict[str, Any]) -> dict[str, Any]:
    """All forms of a step, one after the other on one model."""
    run = Run(case)
    forms = [globals()[name] for name in case["forms"]] if "forms" in case else FORMS
    for t, form in enumerate(forms):
        form(run, 10 * t)
    run.compare_state()
    found = {
        "claims": run.claims,
        "rows": sorted({piece.row for piece in run.places}),
        "pieces": sum(piece.grad.numel() < piece.numel for piece in run.places),
    }
    everywhere: list[Any] = [found]
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
    wrapper = None if run.engine is None else type(run.engine.optimizer).__name__
    return {
        "label": case["label"],
        "num_processes": run.accelerator.num_processes,
        "distributed_type": run.accelerator.distributed_type.value,
        "wrapper": wrapper,
        "gradients": type(run.gradients).__name__,
        "kind": run.gradients.layout.kind,
        "loss_scale": float(run.gradients.loss_scale()),
        "claims": {name: max(process["claims"][name] for process in everywhere) for name in run.claims},
        "rows": sorted({row for process in everywhere for row in process["rows"]}),
        "cut": max(process["pieces"] for process in everywhere),
        "frozen": [p.requires_grad for p in run.truth.params].index(False),
        "boundary": run.gradients.boundary,
        "steps": len(run.norms),
        "least_clipped": min(run.norms, default=0.0) / MAX_NORM,
    }


def main() -> None:
    """Run the plan."""
    path = Path(sys.argv[1])
    facts = []
    for case in json.loads(path.read_text()):
        try:
            facts.append(facts_of(case))
        except TrainingStopped as error:
            facts.append({"label": case["label"], "error": str(error)})
    if not dist.is_initialized() or dist.get_rank() == 0:
        (path.parent / "facts.json").write_text(json.dumps(facts, indent=1))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
