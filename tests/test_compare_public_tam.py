"""The comparison with pytorch_optimizer measures what it says: our d is the paper's, theirs is never summed."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from hf_momentum.optim import TAM

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "compare_public_tam.py"
PAGE = ROOT / "docs" / "comparison_public_tam.md"
SHAPES = [(64,), (32, 16), (8, 3, 3, 3), (1,), ()]
PAPER = {"parallel, 3 m": 1.0, "opposed, -2 m": 0.0, "orthogonal": 0.5, "cosine 0.5": 0.75}
# The share that eps adds to d is 1e-8, and it enters twice: in the momentum and in the measured step.
TOLERANCE = 1e-7


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_public_tam", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def public(script):
    pytest.importorskip(
        "pytorch_optimizer", reason="the public TAM is compared only where pytorch_optimizer is installed"
    )
    return script.public_candidates()


# ---- ours, always ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TAM", "AdaTAM"])
def test_ours_gives_the_papers_damping_at_every_angle(script, name):
    rows = script.compare({name: script.our_candidates()[name]}, SHAPES)
    assert len(rows) == 3 * 4 + 2 * 2
    for row in rows:
        d = row.measured[name]
        assert row.paper == pytest.approx(PAPER[row.angle], abs=1e-12)
        assert row.cosine == pytest.approx(2 * PAPER[row.angle] - 1, abs=1e-12)
        assert (d.mean, d.low, d.high, d.by_norm) == pytest.approx((row.paper,) * 4, abs=TOLERANCE)
        assert d.from_paper < TOLERANCE


def test_ours_is_not_the_unsummed_formula(script):
    rows = script.compare(script.our_candidates(), SHAPES)
    for row in rows:
        if row.angle == "parallel, 3 m" and row.shape not in ((1,), ()):
            assert all(d.from_unsummed > 0.4 for d in row.measured.values())


@pytest.mark.parametrize("fixed", [0.25, 1.0])
def test_the_measurement_sees_a_wrong_damping(script, fixed):
    """An optimizer with another d must not come out as the paper's: its momentum before the step is refused."""
    wrong = script.Candidate(lambda w: TAM(w, momentum=script.BETA, fixed_damping=fixed), "momentum_buffer")
    m = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not the chosen one"):
        script.elementwise_damping(wrong, m, 3 * m)
    half = script.Candidate(lambda w: TAM(w, momentum=script.BETA, fixed_damping=0.5), "momentum_buffer")
    assert script.elementwise_damping(half, m, 3 * m).tolist() == pytest.approx([0.5] * 3, abs=TOLERANCE)


# ---- theirs, where installed ----------------------------------------------------------------------------------------


def test_public_ones_multiply_element_by_element_and_never_sum(script, public):
    for row in script.compare(public, SHAPES):
        assert all(d.from_unsummed < TOLERANCE for d in row.measured.values())


def test_public_ones_stay_near_a_half_where_the_paper_gives_one_or_zero(script, public):
    for row in script.compare(public, [(64,), (32, 16)]):
        share = {"parallel, 3 m": 1 / row.shape[0], "opposed, -2 m": -1 / row.shape[0]}.get(row.angle)
        if share is not None:
            for d in row.measured.values():
                assert d.mean == pytest.approx((1 + share) / 2, abs=TOLERANCE)
                assert d.from_paper > 0.4


def test_all_agree_with_the_paper_on_a_single_element(script, public):
    for row in script.compare(public, [(1,), ()]):
        assert all(d.from_paper < TOLERANCE for d in row.measured.values())


def test_the_page_holds_what_the_script_gives(script, public, capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    assert script.main(["--json", "--output", str(page)]) == 0
    report = json.loads(capsys.readouterr().out)
    if report["versions"]["pytorch_optimizer"] not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page was written with another version of pytorch_optimizer")

    def figures(text: str) -> list[float]:
        """All numbers with four decimals: the table of d, without the versions and the sizes of the rounding."""
        return [float(x) for x in re.findall(r"-?\d\.\d{4}\b", text.split(script.BEGIN)[1].split(script.END)[0])]

    written, now = figures(PAGE.read_text(encoding="utf-8")), figures(page.read_text(encoding="utf-8"))
    assert len(written) > 50
    assert written == pytest.approx(now, abs=2e-4)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_without_pytorch_optimizer_it_says_how_to_install_it(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert script.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err.strip() == script.HOW_TO_INSTALL
    assert captured.out == ""


def test_only_what_stands_between_the_markers_is_replaced(script):
    page = PAGE.read_text(encoding="utf-8")
    changed = script.replace_table(page, "new")
    assert changed.split(script.BEGIN)[0] == page.split(script.BEGIN)[0]
    assert changed.split(script.END)[1] == page.split(script.END)[1]
    assert script.replace_table(changed, "new") == changed
    for broken in ("no markers", f"{script.END} {script.BEGIN}", page + page):
        with pytest.raises(ValueError, match="the page needs"):
            script.replace_table(broken, "new")
