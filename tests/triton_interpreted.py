"""The Triton kernels in Triton's interpreter, which takes CPU tensors; test_triton_kernels.py gives it a process.

The truth is float64 (`exact`), or the plain torch of rounding.py where bits are compared.
"""

import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_momentum.kernels import choice, cuda, rules
from hf_momentum.kernels.rounding import packed_zeros, random_bits, to_bfloat16
from hf_momentum.kernels.rules import How
from hf_momentum.kernels.work import Gradients, Reduced, Work
from hf_momentum.surgery import Passes

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="only in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),  # numpy's
]

SIZES = [0, 1, 3, 35, 127, 128, 129, 5000, 8192, 8193, 20001]
N = len(SIZES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 4.1e-3, torch.float16: 5e-4}
WIDTHS = {
    "alignment_sums": 3,
    "squared_norms": 1,
    "squared_changes": 3,
    "momentum_step": 0,
    "momentum_advance": 1,
    "momentum_apply": 0,
    "momentum_project": 0,
    "adam_step": 0,
    "adam_advance": 2,
    "adam_apply": 0,
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """A program takes the interpreter ten milliseconds, whatever its size."""
    monkeypatch.setattr(cuda, "_CHUNK", 8192)
    monkeypatch.setattr(cuda, "_TILE", 8192)


def numbers(seed: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Fragments(list):
    """Pieces of one flat tensor: apart by a gap and beginning at odd places, or aligned and close together."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, odd: bool = True, positive: bool = False) -> None:
        self.places, end = [], 16
        for size in SIZES:
            self.places.append(end + 1 if odd else -(-end // 16) * 16)
            end = self.places[-1] + size + 2 * odd
        flat = numbers(seed, end + 16)
        self.flat = (flat.square() if positive else flat).to(dtype)
        super().__init__(self.flat.narrow(0, place, size) for place, size in zip(self.places, SIZES, strict=True))

    def gaps(self) -> Tensor:
        inside = torch.zeros(len(self.flat), dtype=torch.bool)
        for place, size in zip(self.places, SIZES, strict=True):
            inside[place : place + size] = True
        return self.flat[~inside].clone()


def per_tensor(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, N, dtype=torch.float64)


def work_for(kernel: str, dtype=torch.float32, odd=True, each=True, **fields) -> Work:
    """Work in which every number counts, one for each tensor or one for all."""
    w, g, m = Fragments(1, dtype, odd), Fragments(2, dtype, odd), Fragments(3, odd=odd)
    v, old = Fragments(4, odd=odd, positive=True), Fragments(5, odd=odd)
    sums, adam = kernel.startswith(("alignment", "squared")), kernel.startswith("adam")
    whole = {"keep": 0.9, "enter": torch.tensor(0.3), "rate": torch.tensor(0.1), "shrink": 0.99, "unbias": 1.25}
    lists = {"keep": per_tensor(0.5, 0.9), "enter": per_tensor(-0.3, 0.9), "rate": per_tensor(0.01, 0.1)}
    lists |= {"shrink": per_tensor(0.9, 1.0), "unbias": per_tensor(1, 3)}
    signs = {"sign": -1.0, "decay": 0.1, "factor": torch.tensor(0.7)} if each else {}
    given = {
        "grads": None if kernel.endswith(("apply", "project")) else Gradients(g, w, **signs),
        "weights": None if sums else w,
        "first": m,
        "squares": v if adam or kernel == "squared_changes" else None,
        "previous": old if kernel == "squared_changes" else None,
        "beta2": 0.99,
        "eps": 1e-6,
        "written": not (sums or kernel.endswith("apply")),
        **(lists if each else whole),
    }
    return Work(**{**given, **fields})


def lists_of(work: Work) -> dict[str, list[Tensor]]:
    found = {"weights": work.weights, "first": work.first, "squares": work.squares, "previous": work.previous}
    found["raw"] = None if work.grads is None else work.grads.raw
    return {name: tensors for name, tensors in found.items() if tensors is not None}


def exact(kernel: str, work: Work, t: int, x: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What tensor t of a pass becomes, and its sums, in the precision of what it was."""

    def number(name: str) -> float:
        value = getattr(work, name)
        return value if isinstance(value, float) else value.double().expand(N)[t].item()

    def denominator() -> Tensor:
        return x["squares"].sqrt() * number("unbias") + work.eps

    grads = work.grads
    if grads is not None:
        g = grads.sign * float(grads.factor) * x["raw"]
        if kernel != "squared_changes" and grads.decay:
            g = g + grads.decay * (x["weights"] if "weights" in x else grads.weights[t].to(g))
    m = x["first"]
    if kernel in ("alignment_sums", "squared_norms"):
        return {}, [m @ g, m @ m, g @ g] if kernel == "alignment_sums" else [g @ g]
    if kernel == "momentum_project":
        w = x["weights"] - number("rate") * m
        return {"weights": w, "first": number("keep") * m + number("enter") * x.get("stored", w)}, []
    if kernel == "squared_changes":
        change, step = g - x["previous"], m
        if work.squares is not None:
            step = m / denominator()
            change = change / denominator() if work.divide_change else change
        return {"previous": g}, [change @ change, step @ step, g @ g]
    after = {}
    if not kernel.endswith("apply"):
        m = after["first"] = number("keep") * m + number("enter") * g
        if work.squares is not None:
            x["squares"] = after["squares"] = work.beta2 * x["squares"] + (1 - work.beta2) * g.square()
    if work.squares is not None:
        lost = number("rate") * m / denominator()
    else:
        direction = number("enter") * g + number("keep") * m if work.nesterov else m
        lost = number("rate") * direction
        if work.nesterov == 2:
            after["previous"] = direction
    if kernel.endswith("advance"):
        return after, [m @ m, lost @ lost][: WIDTHS[kernel]]
    return {**after, "weights": number("shrink") * x["weights"] - lost}, []


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Relative to the result and to terms of order one, which may have cancelled."""
    return bool((a.double() - b).norm() <= tolerance * (b.norm() + len(b) ** 0.5))


def check(kernel: str, work: Work) -> None:
    """The pass writes and sums what float64 does, and nothing else."""
    lists = lists_of(work)
    before = [{name: tensors[t].double() for name, tensors in lists.items()} for t in range(N)]
    untouched = {name: tensors.gaps() for name, tensors in lists.items()}
    truth = [exact(kernel, work, t, dict(x)) for t, x in enumerate(before)]
    versions = {name: [x._version for x in tensors] for name, tensors in lists.items()}
    sums = cuda.launch(kernel, work, WIDTHS[kernel])
    assert sums.shape == (N, WIDTHS[kernel])
    if kernel == "momentum_project":  # what enters is what is stored, however it was rounded
        stored = [{**x, "stored": w.double()} for x, w in zip(before, work.weights, strict=True)]
        truth = [exact(kernel, work, t, x) for t, x in enumerate(stored)]
    for t, (after, expected) in enumerate(truth):
        for name, tensors in lists.items():
            if name in after:
                assert close(tensors[t], after[name], ROUNDING[tensors[t].dtype]), (name, SIZES[t])
                assert tensors[t]._version > versions[name][t]
            else:
                assert torch.equal(tensors[t].double(), before[t][name]), (name, SIZES[t])
        for found, total in zip(sums[t], expected, strict=True):
            assert found.item() == pytest.approx(total.item(), rel=2e-6, abs=1e-7 * SIZES[t])
    for name, tensors in lists.items():
        assert torch.equal(tensors.gaps(), untouched[name]), "what lies between the pieces is not the kernels'"


# ---- every kernel ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [True, False], ids=["misaligned, a number each", "aligned, one number"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", WIDTHS)
def test_a_pass_is_that_of_float64(kernel, dtype, odd):
    check(kernel, work_for(kernel, dtype, odd, each=odd))


@pytest.mark.parametrize("nesterov", [1, 2])
def test_nesterov_s_form(nesterov):
    check("momentum_step", work_for("momentum_step", nesterov=nesterov, previous=Fragments(6)))


@pytest.mark.parametrize("fields", [{"divide_change": True}, {"squares": None}], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_changes_are_divided_as_told_and_the_gradient_kept_in_either_storage(kept, fields):
    check("squared_changes", work_for("squared_changes", torch.bfloat16, previous=Fragments(5, kept), **fields))


def test_aligned_and_misaligned_tensors_in_one_list(monkeypatch):
    """Several chunks to a tensor, several tiles to a chunk, and some tensors on each side of the split."""
    monkeypatch.setattr(cuda, "_CHUNK", 2048)
    monkeypatch.setattr(cuda, "_TILE", 1024)
    work = work_for("adam_advance", odd=False, weights=None)
    for t, piece in enumerate(Fragments(2)):
        if t % 2:
            work.grads.raw[t] = piece
    truth = [exact("adam_advance", work, t, {k: x[t].double() for k, x in lists_of(work).items()}) for t in range(N)]
    sums = cuda.launch("adam_advance", work, 2)
    for row, (_, expected) in zip(sums, truth, strict=True):
        assert row.tolist() == pytest.approx([x.item() for x in expected], rel=2e-6)
    for t, (after, _) in enumerate(truth):
        assert close(work.squares[t], after["squares"], 3e-7)
    table, _ = cuda._tables(list(cuda._roles(work).values()), tuple(SIZES), torch.device("cpu"))
    assert set(table.aligned) == {True, False}


# ---- fewer bits -----------------------------------------------------------------------------------------------------


SEEDS = torch.tensor([float(2**32 - 1 - 12345 * t) for t in range(N)], dtype=torch.float64)


def reduced(values: list[Tensor], bits: int, positive: bool) -> Reduced:
    if bits == 16:
        parts = [x.bfloat16() for x in values]
    else:
        parts = [packed_zeros(x.numel(), positive, x.device) for x in values]
    found = Reduced(parts, [x.shape for x in values], SEEDS, positive)
    found.encode_(values)
    return found


def same_codes(found: Reduced, expected: Reduced) -> bool:
    """Equal up to the last bit of a scale, which may move a code to its neighbour, rarely."""
    moved = 0
    for a, b in zip(found.parts, expected.parts, strict=True):
        if isinstance(a, Tensor):
            steps = (a.view(torch.int16).int() - b.view(torch.int16)).abs()
        else:
            assert torch.allclose(a.scales.double(), b.scales.double(), rtol=1e-6)
            steps = (a.codes.int() - b.codes).abs()
        assert not (steps > 1).any()
        moved += int(steps.sum())
    return moved <= 1e-3 * sum(SIZES)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kernel", WIDTHS)
def test_state_in_fewer_bits_is_rounded_as_rounding_py_does(kernel, bits):
    work = work_for(kernel, torch.float32)
    first, second = reduced(work.first, bits, False), reduced(Fragments(4, positive=True), bits, True)
    adam = work.squares is not None
    work = replace(work, first=first, squares=second if adam else None)
    expected = reduced(work_for(kernel).first, bits, False), reduced(Fragments(4, positive=True), bits, True)
    values = {"first": expected[0].decoded(), **({"squares": expected[1].decoded()} if adam else {})}
    lists = {**lists_of(replace(work, **values)), **values}
    before = [{name: tensors[t].clone() for name, tensors in lists.items()} for t in range(N)]
    truth = [exact(kernel, work, t, x) for t, x in enumerate(before)]
    sums = cuda.launch(kernel, work, WIDTHS[kernel])
    for state, name in zip(expected, ("first", "squares"), strict=True):
        if name in truth[0][0]:
            state.encode_([after[name] for after, _ in truth])
    assert same_codes(first, expected[0])
    assert same_codes(second, expected[1])
    for t, (after, total) in enumerate(truth):
        assert "weights" not in after or close(work.weights[t], after["weights"].double(), 3e-7)
        assert sums[t].tolist() == pytest.approx([x.item() for x in total], rel=1e-5, abs=1e-6 * SIZES[t])


def test_bfloat16_weights_are_rounded_by_the_bits_of_rounding_py():
    work = replace(work_for("momentum_apply", torch.bfloat16, each=False), shrink=1.0, rate=-0.5, seeds=SEEDS)
    before = [x.float() for x in work.weights]
    cuda.launch("momentum_apply", work, 0)
    for w, old, m, seed in zip(work.weights, before, work.first, SEEDS, strict=True):
        assert torch.equal(w, to_bfloat16(old + 0.5 * m, random_bits(seed, len(m), m.device)))


def test_broken_blocks_and_blocks_of_zeros():
    """What is not finite in a block makes NaN of it and of no other; zeros stay zeros, whatever the rest is."""
    g = torch.cat([torch.tensor([torch.inf]), torch.ones(127), torch.zeros(128), torch.full((100,), torch.nan)])
    state = [
        Reduced([packed_zeros(356, positive, g.device)], [g.shape], SEEDS[:1], positive) for positive in (False, True)
    ]
    w = [torch.zeros(356)]
    cuda.launch("adam_step", Work(Gradients([g], w), w, *state, enter=1.0, eps=1e-8), 0)
    for moment in state:
        (value,) = moment.decoded()
        assert value[:128].isnan().all()
        assert value[128:256].eq(0).all()
        assert value[256:].isnan().all()


def every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_as_torch_does(dtype):
    every = every_value(dtype)
    if dtype == torch.bfloat16:  # the interpreter takes subnormal ones for 0, a GPU does not
        every = every[~(every.float().abs() < 2.0**-126)]
    m = [torch.zeros(len(every))]
    cuda.launch("momentum_advance", Work(Gradients([every], [every]), first=m, enter=1.0), 1)
    assert torch.equal(m[0].nan_to_num(nan=7.0), every.float().nan_to_num(nan=7.0))


def test_float16_is_rounded_as_torch_does():
    """Every value, the halfway points between neighbours, and a little to each side of them.

    To bfloat16 the interpreter does not round, it cuts off; what a GPU does there is in the test of the compiled code.
    """
    every = every_value(torch.float16)
    bits = every.float()[every.isfinite()].view(torch.int32)[::3]
    values = torch.cat([bits + shift for shift in (0, 2**12, 2**12 - 1, 2**12 + 1)]).view(torch.float32)
    target = [torch.zeros(len(values), dtype=torch.float16)]
    cuda.launch("momentum_apply", Work(weights=target, first=[values], rate=-1.0, written=False), 0)
    assert torch.equal(target[0], values.half())


# ---- sums -----------------------------------------------------------------------------------------------------------


def test_squares_neither_overflow_nor_vanish():
    huge, tiny = [torch.full((100,), 1e30)], [torch.full((100,), 1e-30)]
    sums = cuda.launch("alignment_sums", Work(Gradients(huge, huge), first=tiny, written=False), 3)
    assert sums[0].tolist() == pytest.approx([100, 1e-58, 1e62], rel=1e-6)


def test_sums_are_the_same_bits_again_and_do_not_depend_on_the_other_tensors():
    work = work_for("alignment_sums", torch.bfloat16)
    sums = cuda.launch("alignment_sums", work, 3)
    assert torch.equal(sums, cuda.launch("alignment_sums", work, 3))
    alone = Work(Gradients(work.grads.raw[-1:], [], -1.0, 0.0), first=work.first[-1:], written=False)
    again = replace(alone, grads=replace(alone.grads, raw=work.grads.raw[-2:]), first=work.first[-2:])
    assert torch.equal(cuda.launch("alignment_sums", alone, 3)[0], cuda.launch("alignment_sums", again, 3)[1])


def test_more_chunks_than_are_added_at_a_time(monkeypatch):
    monkeypatch.setattr(cuda, "_ROWS", 2)
    monkeypatch.setattr(cuda, "_CHUNK", 2048)
    check("squared_norms", work_for("squared_norms"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_not_hidden(bad, dtype):
    g, w = [torch.ones(100, dtype=dtype)], [torch.ones(100, dtype=dtype)]
    g[0][57] = bad
    m, v = [torch.zeros(100)], [torch.zeros(100)]
    work = Work(Gradients(g, w), w, m, v, keep=0.9, enter=0.1, rate=0.1, beta2=0.9, eps=1e-8)
    assert not cuda.launch("alignment_sums", replace(work, weights=None, squares=None, written=False), 3)[
        0, 2
    ].isfinite()
    sums = cuda.launch("adam_advance", work, 2)
    assert not sums[0, 0].isfinite()
    cuda.launch("momentum_apply", replace(work, squares=None), 0)
    for tensors in (w, m, v):
        assert (~tensors[0].isfinite()).nonzero().tolist() == [[57]]


def test_what_is_computed_where_a_tensor_has_no_elements_does_not_reach_the_sums():
    """Outside, 0 / (0 + eps) is NaN when eps is 0."""
    m, v = [torch.ones(3)], [torch.ones(3)]
    work = Work(Gradients(m, m), first=m, squares=v, keep=1.0, rate=1.0, beta2=1.0, eps=0.0)
    assert cuda.launch("adam_advance", work, 2).tolist() == [[3, 3]]


# ---- the launch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", WIDTHS)
def test_skip_writes_nothing(kernel):
    work = work_for(kernel, seeds=SEEDS)
    before = {name: tensors.flat.clone() for name, tensors in lists_of(work).items()}
    sums = cuda.launch(kernel, replace(work, skip=torch.tensor(1.0)), WIDTHS[kernel])
    assert sums.eq(0).all()
    assert all(torch.equal(tensors.flat, before[name]) for name, tensors in lists_of(work).items())


@pytest.mark.parametrize("skip", [torch.tensor(0.0), torch.tensor(False), torch.tensor(0)], ids=str)
def test_skip_at_zero_does_not_skip(skip):
    check("adam_advance", work_for("adam_advance", skip=skip))


def test_lists_without_elements():
    nothing = [torch.zeros(0), torch.zeros(0, 3)]
    assert (
        cuda.launch("alignment_sums", Work(Gradients(nothing, nothing), first=nothing), 3).tolist() == [[0.0] * 3] * 2
    )
    assert cuda.launch("momentum_apply", Work(weights=nothing, first=nothing), 0).shape == (2, 0)
    assert cuda.launch("squared_norms", Work(Gradients([], [])), 1).shape == (0, 1)


def test_tensors_on_several_devices_are_refused():
    one, other = [torch.zeros(3)], [torch.zeros(3, device="meta")]
    with pytest.raises(ValueError, match=r"one pass takes tensors on one device, got \['cpu', 'meta'\]"):
        cuda.launch("alignment_sums", Work(Gradients(one, one), first=other), 3)
    with pytest.raises(ValueError, match="CPU tensors under TRITON_INTERPRET=1 and no others, got some on meta"):
        cuda.launch("squared_norms", Work(Gradients(other, other)), 1)


def test_the_tables_have_the_rows_that_programs_read():
    from hf_momentum.kernels import rounding
    from hf_momentum.kernels import triton_kernels as programs

    assert programs._Addresses._fields == cuda._ROLES
    assert programs._Numbers._fields[: len(cuda._NUMBERS)] == cuda._NUMBERS
    assert programs._BLOCK.value == rounding.BLOCK
    assert programs._OCTAVES.value == rounding.OCTAVES << 23


def test_why_they_are_not_available_is_told(monkeypatch):
    def broken(*args):
        raise RuntimeError("Failed to find C compiler\nsecond line")

    assert cuda.available() == (True, "")
    monkeypatch.setattr(cuda, "_made", broken)
    told = "Triton does not run here (RuntimeError: Failed to find C compiler)"
    assert cuda.available.__wrapped__() == (False, told)
    monkeypatch.setitem(sys.modules, "triton", None)
    there, why_not = cuda.available.__wrapped__()
    assert not there
    assert re.fullmatch(r"Triton cannot be imported \(.*triton.*\); install triton", why_not)
    monkeypatch.setattr(cuda, "available", cuda.available.__wrapped__)
    with pytest.raises(RuntimeError, match="the Triton kernels are not available: Triton cannot be imported"):
        cuda.launch("squared_norms", Work(Gradients([], [])), 1)


@pytest.fixture
def copies(monkeypatch):
    """The tables that were copied to the device."""
    found, copied = [], cuda._copied
    monkeypatch.setattr(cuda, "_copied", lambda host, device: found.append(host) or copied(host, device))
    cuda._table.cache_clear()
    cuda._chunks.cache_clear()
    return found


def test_an_unchanged_list_is_not_copied_again(copies):
    g, m = [torch.ones(3)], [torch.ones(3)]
    for _ in range(2):
        cuda.launch("alignment_sums", Work(Gradients(g, g), first=m), 3)
        assert len(copies) == 5  # addresses, owners, begins, numels, starts
    moved = [torch.full((3,), 2.0)]
    assert cuda.launch("alignment_sums", Work(Gradients(moved, moved), first=m), 3).tolist() == [[6, 3, 12]]
    assert len(copies) == 6


def test_only_tensors_at_multiples_of_16_bytes_are_said_to_be_aligned(monkeypatch):
    """The interpreter does not mind; a GPU faults on a wide load elsewhere."""
    from hf_momentum.kernels import triton_kernels as programs

    told, one_pass = {}, programs.one_pass

    class Recorder:
        def __getitem__(self, grid):
            def launch(owners, *arguments, ALIGNED, **forms):
                base = arguments[8]
                told.setdefault(ALIGNED, []).extend(owners[base : base + grid[0]].tolist())
                return one_pass[grid](owners, *arguments, ALIGNED=ALIGNED, **forms)

            return launch

    monkeypatch.setattr(programs, "one_pass", Recorder())
    flat = numbers(1, 20000)
    g = [flat[shift : shift + 9000] for shift in range(6)]
    m = [numbers(2, 9000) for _ in g]
    m[4] = numbers(2, 9001)[1:]
    cuda.launch("alignment_sums", Work(Gradients(g, g), first=m), 3)
    assert told == {True: [0, 0], False: [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]}


def test_a_captured_graph_has_tables_of_its_own(copies, monkeypatch):
    g = [torch.ones(3)]
    launches = []
    monkeypatch.setattr(cuda, "_capturing", lambda device: bool(launches))
    for _ in range(3):
        launches.append(cuda.launch("squared_norms", Work(Gradients(g, g)), 1))
        assert len(copies) == 5 * len(launches)
    assert launches[0].tolist() == launches[2].tolist() == [[3]]


def test_the_rules_run_on_them(monkeypatch):
    monkeypatch.setitem(choice._BACKENDS, "cpu", cuda)
    results = []
    for _ in range(2):
        w, g, m = Fragments(1, torch.bfloat16), Fragments(2, torch.bfloat16), Fragments(3)
        step = rules.tam_update_
        step(
            w,
            Gradients(g, w),
            m,
            per_tensor(0.1, 0.9),
            lr=0.1,
            momentum=0.9,
            weight_decay=0.1,
            how=How(SEEDS),
        )
        results.append([*w, *m])
        monkeypatch.undo()
    for found, expected in zip(*results, strict=True):
        assert close(found, expected.double(), 1e-3 if found.dtype == torch.bfloat16 else 3e-7)


def test_a_surgery_runs_on_them(monkeypatch):
    """What is left of b is orthogonal to e; e becomes the average of g alone."""
    monkeypatch.setitem(choice._BACKENDS, "cpu", cuda)
    b, e, g = Fragments(1), Fragments(2), Fragments(3)
    e.flat += 0.5 * b.flat  # so that there is something to remove
    passes, old = Passes(), torch.cat(e).double()
    be, ee, _ = passes.sums(b, e).sum(0)
    passes.project_and_lend(b, e, be / ee, 0.9, 0.1)
    left = torch.cat(b).double()
    assert abs(left @ old) < 1e-6 * left.norm() * old.norm()
    torch._foreach_add_(list(b), list(g))
    passes.absorb(b, e, 1.0, 0.1)
    exact = 0.9 * old + 0.1 * torch.cat(g).double()
    assert (torch.cat(e).double() - exact).norm() < 1e-7 * exact.norm()
