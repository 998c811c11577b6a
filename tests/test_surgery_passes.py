"""The passes of a surgery: an average of main gradients in one buffer, projections that are exact, and the choice."""

from weakref import ref

import pytest
import torch
from torch import Tensor

from hf_momentum.errors import InputError
from hf_momentum.kernels import choice, cpu, seeds
from hf_momentum.surgery import Passes, absorb_, passes, project_and_lend_

SIZES = [0, 1, 3, 35, 1000, 16385, 70001]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RHO = 0.01


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator, dtype=torch.float64) + 0.3).to(dtype) for size in SIZES]


def averages(dtype: torch.dtype) -> list[Tensor]:
    return tensors(2, torch.float64 if dtype == torch.float64 else torch.float32)


def joined(found: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1).double() for x in found])


@pytest.fixture(params=["kernels", "plain torch"])
def path(request, monkeypatch) -> str:
    if request.param == "plain torch":
        monkeypatch.setitem(choice._BACKENDS, "cpu", Unavailable)
    elif not cpu.available()[0]:
        pytest.skip(f"no CPU kernels here: {cpu.available()[1]}")
    return request.param


class Unavailable:
    """Kernels that cannot be had."""

    @staticmethod
    def available() -> tuple[bool, str]:
        return False, "not in this test"


# ---- the algebra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_left_is_orthogonal_to_the_average(path, dtype):
    b, e = tensors(1, dtype), averages(dtype)
    passes, old = Passes(), joined(e)
    be, ee, bb = passes.sums(b, e).sum(0)
    assert (be / (ee * bb).sqrt()).item() > 0.05, "there must be something to remove"
    passes.project_and_lend(b, e, be / ee, 1 - RHO, RHO)
    left = joined(b) @ old / (old.norm() * joined(b).norm())
    assert abs(left.item()) < {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_average_is_that_of_main_gradients_as_if_there_were_no_other(path, dtype):
    """What half-precision buffers take up is rounded to their last bit; it is known to the first claim."""
    b, e, g = tensors(1, dtype), averages(dtype), tensors(3, dtype)
    passes, old = Passes(), joined(e)
    be, ee, _ = passes.sums(b, e).sum(0)
    passes.project_and_lend(b, e, be / ee, 1 - RHO, RHO)
    lent = joined(b)
    torch._foreach_add_(b, g)
    passes.absorb(b, e, 1.0, RHO)
    exact = (1 - RHO) * old + RHO * (joined(b) - lent)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-7
    assert (joined(e) - exact).norm() < tolerance * exact.norm()
    main = (1 - RHO) * old + RHO * joined(g)
    rounding = {torch.bfloat16: 1e-4, torch.float16: 1e-5}.get(dtype, tolerance)
    assert (joined(e) - main).norm() < rounding * main.norm()


def test_numbers_may_be_floats_or_tensors(path):
    results = []
    for kind in (float, lambda x: torch.tensor(x, dtype=torch.float64)):
        b, e = tensors(1), tensors(2)
        passes = Passes()
        passes.project_and_lend(b, e, kind(0.7), kind(0.9), kind(0.2))
        passes.absorb(b, e, kind(0.9), kind(0.3))
        results.append(joined([*b, *e]))
    assert torch.equal(*results)


def test_the_coefficient_is_not_read_back(monkeypatch):
    def read(*args):
        raise AssertionError("the host waits for the device here")

    b, e, number = tensors(1), tensors(2), torch.tensor(0.5, dtype=torch.float64)
    for name in ("item", "__float__", "__bool__", "tolist"):
        monkeypatch.setattr(Tensor, name, read)
    passes = Passes()
    passes.project_and_lend(b, e, number, number, number)
    passes.absorb(b, e, number, number)


# ---- averages in bfloat16 -------------------------------------------------------------------------------------------


def test_averages_in_bfloat16_are_not_biased(path):
    """Rounded to nearest, an average of 1 would never move by steps of 1/1000."""
    passes, steps, size = Passes(), 64, 4096
    g, e = [torch.full((size,), 0.1)], [torch.ones(size, dtype=torch.bfloat16)]
    for t in range(steps):
        own = seeds(torch.tensor([float(t)]), 0)
        b = [torch.full((size,), -0.4)]
        passes.project_and_lend(b, e, 0.0, 1 - 1e-3, 1e-3, seeds=own)
        b[0] += g[0]
        passes.absorb(b, e, 1.0, 1e-3, seeds=own)
    exact = 0.1 + 0.9 * (1 - 1e-3) ** steps
    spread = 2**-8 * (2 * steps) ** 0.5 / 2  # at most, of one element
    assert abs(e[0].float().mean().item() - exact) < 4 * spread / size**0.5
    assert e[0].float().std() > 0


def test_both_passes_of_a_step_take_other_random_bits(path):
    passes, own, size = Passes(), torch.tensor([5.0], dtype=torch.float64), 4096
    found = []
    for run in (
        lambda b, e: passes.project_and_lend(b, e, 0.0, 1.0, -1.0, seeds=own),
        lambda b, e: passes.absorb(b, e, 1.0, 1.0, seeds=own),
    ):
        e = [torch.ones(size, dtype=torch.bfloat16)]
        run([torch.full((size,), 2.0**-8)], e)
        found.append(e[0] > 1)
    assert [round(up.float().mean().item(), 1) for up in found] == [0.5, 0.5]
    assert 0.45 < (found[0] == found[1]).float().mean() < 0.55


def test_kernels_and_plain_torch_round_by_the_same_bits(monkeypatch):
    if not cpu.available()[0]:
        pytest.skip(f"no CPU kernels here: {cpu.available()[1]}")
    results = []
    for _ in range(2):
        b, e = tensors(1), tensors(2, torch.bfloat16)
        own = seeds(torch.arange(len(e)), 7)
        passes = Passes()
        passes.project_and_lend(b, e, 0.5, 0.75, 0.25, seeds=own)
        passes.absorb(b, e, 1.0, 0.25, seeds=own)
        results.append(joined(e))
        monkeypatch.setitem(choice._BACKENDS, "cpu", Unavailable)
    assert (results[0] != results[1]).float().mean() < 1e-3, "only where a fused product decides"


def test_averages_in_bfloat16_want_seeds():
    with pytest.raises(InputError, match="seeds is None, but there are averages in bfloat16; give one float64 seed"):
        Passes().absorb([torch.ones(3)], [torch.ones(3, dtype=torch.bfloat16)], 1.0, 0.1)
    e = [torch.ones(3), torch.ones(3, dtype=torch.bfloat16)]
    with pytest.raises(InputError, match="seeds is None"):
        Passes().absorb([torch.ones(3), torch.ones(3)], e, 1.0, 0.1)
    assert e[0].eq(1).all(), "nothing is written before all is known to be there"


# ---- mixed lists ----------------------------------------------------------------------------------------------------


def mixed(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Entries of every kind that kernels take, and of some that they do not, mixed up."""
    b = [x.view(1, -1) for x in tensors(seed)[1:]]
    b[1] = b[1].double()
    b[2] = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).t()
    b[3], b[4] = b[3].bfloat16(), b[4].half()
    b += [torch.tensor(2.0), torch.ones(5, 7)]
    generator = torch.Generator().manual_seed(seed + 1)
    e = [torch.randn(x.shape, generator=generator, dtype=x.dtype if x.dtype == torch.float64 else None) for x in b]
    e[4] = e[4].bfloat16()
    e[6] = torch.ones(2, 1)[1, 0]
    e[7] = e[7].t().contiguous().t()
    return b, e


def test_lists_of_all_kinds_are_done_entry_by_entry():
    (b, e), (alone_b, alone_e) = mixed(1), mixed(1)
    own = seeds(torch.arange(len(b)), 0)
    many, sums = Passes(), []
    assert len({(part.fused, len(part.places)) for part in passes._parts(b, e)}) > 1
    for i in range(len(b)):
        one, x, y, seed = Passes(), [alone_b[i]], [alone_e[i]], own[i : i + 1]
        sums.append(one.sums(x, y)[0])
        one.project_and_lend(x, y, 0.5, 0.9, 0.1, seeds=seed)
        one.absorb(x, y, 1.0, 0.1, seeds=seed)
    assert torch.equal(many.sums(b, e), torch.stack(sums))
    many.project_and_lend(b, e, 0.5, 0.9, 0.1, seeds=own)
    many.absorb(b, e, 1.0, 0.1, seeds=own)
    for found, expected in zip([*b, *e], [*alone_b, *alone_e], strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    for x, y, old_x, old_y in zip(b, e, *mixed(1), strict=True):
        rounding = {torch.float32: 1e-6, torch.float64: 1e-14}
        exact = (old_x.double() - 0.5 * old_y.double(), 0.9 * old_y.double())
        for found, truth in zip((x, y), exact, strict=True):
            tolerance = max(rounding.get(dtype, 1e-2) for dtype in {found.dtype, y.dtype})
            assert (found.double() - truth).norm() <= tolerance * truth.norm()


def test_tensor_subclasses_and_what_kernels_do_not_read_are_left_to_plain_torch():
    class Own(Tensor):
        pass

    plain, own, e = torch.ones(5, 7), torch.ones(5, 7).as_subclass(Own), torch.ones(5, 7)
    fused = cpu.available()[0]
    across = e.t().contiguous().t()
    for b, average, expected in (
        (plain, e, fused), (own, e, False), (plain, e.as_subclass(Own), False), (plain, across, False),
        (plain.t(), e.t(), False), (plain, e.double(), False), (plain.half(), e.bfloat16(), fused),
    ):  # fmt: skip
        (part,) = passes._parts([b], [average])
        assert part.fused == expected
    many = Passes()
    for b in (plain, own):  # alike but for their class
        many.sums([b], [e])
    assert [parts[0].fused for *_, parts in many._known] == [False, fused]


def test_skip_writes_nothing(path):
    for skip, same in ((torch.tensor(1.0), True), (torch.tensor(0.0), False)):
        (b, e), (old_b, old_e) = mixed(1), mixed(1)
        b[0].fill_(torch.inf), old_b[0].fill_(torch.inf)
        own, found = seeds(torch.arange(len(b)), 0), Passes()
        found.project_and_lend(b, e, 0.5, 0.9, 0.1, seeds=own, skip=skip)
        found.absorb(b, e, 0.9, 0.1, seeds=own, skip=skip)
        for new, old in zip([*b[1:], *e], [*old_b[1:], *old_e], strict=True):
            assert torch.equal(new, old) == same


def test_parts_for_plain_torch_are_bounded(monkeypatch):
    monkeypatch.setattr(passes, "_PART_ELEMENTS", 100)
    b = [torch.ones(size, dtype=torch.float64) for size in (60, 30, 20, 200, 5, 5)]
    parts = passes._parts(b, b)
    assert [part.places for part in parts] == [(0, 1), (2,), (3,), (4, 5)]


def test_the_sorting_is_remembered_and_follows_what_changes(monkeypatch):
    sorted_, parts = [], passes._parts
    monkeypatch.setattr(passes, "_parts", lambda *lists: sorted_.append(1) or parts(*lists))
    many, e = Passes(), [torch.ones(3), torch.ones(4)]
    for _ in range(3):
        many.sums([torch.ones(3), torch.ones(4)], e)
    assert len(sorted_) == 1
    for n, b in enumerate(
        (
            [torch.ones(3).bfloat16(), torch.ones(4)],
            [torch.ones(6)[::2], torch.ones(4)],
            [torch.ones(3), torch.ones(4).double()],
        )
    ):
        for _ in range(2):
            assert many.sums(b, e)[:, 2].tolist() == [3, 4]
            assert len(sorted_) == n + 2
    for other in ([e[0].clone(), e[1]], [e[0].double(), e[1]], [torch.ones(6)[::2], e[1]]):
        assert many.sums(b, other)[:, 0].tolist() == [3, 4]
    assert len(sorted_) == 7
    many.sums([torch.ones(3), torch.ones(4)], e)
    assert len(sorted_) == 7, "several lists are known at a time"
    with pytest.raises(InputError, match=r"grads\[1\] has shape \(5,\) on cpu and emas\[1\] \(4,\) on cpu; make each"):
        many.sums([torch.ones(3), torch.ones(5)], e)
    with pytest.raises(ValueError, match="zip"):
        many.sums([torch.ones(3)], e)


def test_averages_of_other_dtypes_are_refused():
    with pytest.raises(InputError, match=r"emas\[0\] is torch.float16; keep averages in float32, float64 or bfloat16"):
        Passes().absorb([torch.ones(3)], [torch.ones(3).half()], 1.0, 0.1)


def test_gradients_of_every_dtype_have_products_with_each_other():
    """Baselines need those, and DeepSpeed's float16 keeps gradients in it."""
    for dtype in DTYPES:
        a, b = [torch.full((5000,), 0.5, dtype=dtype)], [torch.full((5000,), 2.0, dtype=dtype)]
        assert Passes().sums(a, b).tolist() == [[5000.0, 20000.0, 1250.0]]
        assert Passes().squares(b).tolist() == [20000.0]


def test_no_tensor_is_kept_alive():
    many, b, e = Passes(), [torch.ones(3)], [torch.ones(3)]
    seen = [ref(b[0]), ref(e[0])]
    many.sums(b, e)
    many.project_and_lend(b, e, 0.5, 0.9, 0.1)
    many.absorb(b, e, 1.0, 0.1)
    del b, e
    assert [tensor() for tensor in seen] == [None, None]


def test_lists_without_entries_and_entries_without_elements():
    many = Passes()
    assert many.sums([], []).shape == (0, 3)
    many.project_and_lend([], [], 0.5, 0.9, 0.1)
    project_and_lend_([], [], 0.5, 0.9, 0.1)
    absorb_([], [], 0.9, 0.1)
    assert many.sums([torch.zeros(0)], [torch.zeros(0)]).tolist() == [[0, 0, 0]]
