"""Comparisons cover what is true, call equal what is equal, tune all alike, and say it in words that follow from it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_momentum.evaluation import tuning
from hf_momentum.evaluation.comparison import ComparisonReport, Control, differences
from hf_momentum.evaluation.comparison_document import document
from hf_momentum.evaluation.results import RunScores, SplitFacts

SPLITS = [
    SplitFacts("code", "in distribution", None, "stdlib:code@test"),
    SplitFacts("prose", "shifted", "domain", "stdlib:prose@test"),
    SplitFacts("json", "must not forget", None, "stdlib:json@test"),
]


# ---- simulated optimizers --------------------------------------------------------------------------------------------


class Simulated:
    """An optimizer whose loss is a bowl over the logarithm of the learning rate, with noise of seed and run.

    Seeds move all optimizers alike (an easy or a hard order of the data), which pairing takes out.
    """

    def __init__(self, floor: float, best: float, random: np.random.Generator, noise: float = 0.02) -> None:
        self.floor, self.best, self.random, self.noise = floor, best, random, noise

    def expected(self, lr: float) -> float:
        return self.floor + 0.1 * math.log10(lr / self.best) ** 2

    def run(self, lr: float, seed_effect: float) -> float:
        return self.expected(lr) + seed_effect + self.random.normal(0, self.noise)


def tune(optimizers: dict[str, Simulated], starts: dict[str, float]) -> dict[str, dict[float, float]]:
    finished: dict[str, dict[float, float]] = {name: {} for name in optimizers}
    while any(wanted := tuning.proposals(finished, starts, math.sqrt(10), 3, 12).values()):
        for name, rates in zip(optimizers, wanted, strict=True):
            finished[name].update({lr: optimizers[name].run(lr, 0.0) for lr in rates})
    return finished


def simulate(number: int, gain: float, seeds: int = 5, others: int = 1, each_seed: bool = False, noise: float = 0.02):
    """One whole comparison of a baseline with optimizers that are better by `gain`.

    Returns:
        The differences, and the expected difference of each at the learning rates that were chosen.
    """
    random = np.random.default_rng(number)
    names = ["adamw_torch", *(f"other{index}" for index in range(others))]
    best = 10 ** random.uniform(-4, -1)  # the same bowl for all: with a gain of 0 they are the same optimizer
    made = {name: Simulated(1.0 - (gain if index else 0.0), best, random, noise) for index, name in enumerate(names)}
    starts, effects = dict.fromkeys(names, 1e-3), random.normal(0, 0.2, seeds)
    tunings = [tune(made, starts) for _ in range(seeds if each_seed else 1)]
    scores: dict[str, dict[str, dict[int, float]]] = {name: {"code": {}} for name in names}
    expected: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(seeds):
        for name, one in made.items():
            lr = tuning.best(tunings[seed if each_seed else 0][name])
            scores[name]["code"][seed] = one.run(lr, effects[seed])
            expected[name].append(one.expected(lr))
    found = differences(scores, [(name, "adamw_torch") for name in names[1:]], lower_is_better=True)
    means = {name: float(np.mean(values)) for name, values in expected.items()}
    return found, [means[name] - means["adamw_torch"] for name in names[1:]]


@pytest.fixture(scope="module")
def thousand():
    return [simulate(number, gain=0.03) for number in range(1000)]


def covered(simulations, truth: float | None = None) -> float:
    inside = [
        one.size.low <= (at_chosen if truth is None else truth) <= one.size.high
        for found, truths in simulations
        for one, at_chosen in zip(found, truths, strict=True)
    ]
    return sum(inside) / len(inside)


def called_different(simulations) -> float:
    """How often a comparison names any winner or loser, so that five optimizers have no more false ones than one."""
    named = [any(one.words in ("better", "worse") for one in found) for found, _ in simulations]
    return sum(named) / len(named)


LUCK = 2 * math.sqrt(0.05 * 0.95 / 1000)  # two standard errors of a rate of 5 % in 1000 simulations


def test_intervals_cover_the_true_difference_in_93_to_97_of_100_comparisons(thousand):
    assert 0.93 <= covered(thousand) <= 0.97


def test_with_each_seed_tuned_by_itself_the_interval_is_about_the_optimizers_not_their_settings():
    """Then the luck of tuning is inside: it covers the difference of the bowls themselves."""
    assert 0.93 <= covered([simulate(n, gain=0.03, each_seed=True) for n in range(1000)], truth=-0.03) <= 0.97


@pytest.mark.parametrize("others", [1, 5])
def test_identical_optimizers_are_called_different_in_at_most_5_of_100_comparisons(others):
    simulations = [simulate(n, gain=0.0, others=others, each_seed=True) for n in range(1000)]
    assert called_different(simulations) <= 0.05 + LUCK


def test_what_one_tuning_for_all_seeds_leaves_out_is_seen():
    """The harness is sensitive: without `each_seed` the luck of tuning parts equal optimizers, as the report says."""
    assert called_different([simulate(n, gain=0.0) for n in range(300)]) > 0.05 + LUCK


def test_intervals_that_forget_the_pairing_would_be_seen(thousand):
    def unpaired(found):
        return [replace(one, size=replace(one.size, low=one.size.low - 0.2, high=one.size.high + 0.2)) for one in found]

    assert covered([(unpaired(found), truths) for found, truths in thousand]) > 0.97


def test_equal_differences_of_counts_are_no_proof():
    """Three seeds that each differ by one example of 300: a t-test on them would be certain."""
    scores = {"a": {"code": {seed: (240 + seed) / 300 for seed in range(3)}}}
    scores["b"] = {"code": {seed: (241 + seed) / 300 for seed in range(3)}}
    (found,) = differences(scores, [("b", "a")], lower_is_better=False)
    assert found.words == "no significant difference" and found.p_value == 0.25


# ---- tuning ----------------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(-6, 1), min_size=1),
    st.floats(-4, -1),
    st.integers(3, 7),
    st.floats(2, 10),
)
def test_every_grid_ends_interior_and_no_optimizer_is_tuned_with_more_runs(bowls, start, trials, ratio):
    """Bowls whose bottom may lie far from the start, on either side."""
    finished: dict[str, dict[float, float]] = {name: {} for name in bowls}
    starts = {name: 10**start for name in bowls}
    while any(wanted := tuning.proposals(finished, starts, ratio, trials, 100).values()):
        for name, rates in zip(bowls, wanted, strict=True):
            assert not set(rates) & set(finished[name]), "no run twice"
            finished[name].update({lr: (math.log10(lr) - bowls[name]) ** 2 for lr in rates})
    assert not tuning.at_the_edge(finished)
    assert len({len(scores) for scores in finished.values()}) == 1
    for name, scores in finished.items():
        assert abs(math.log10(tuning.best(scores)) - bowls[name]) <= math.log10(ratio) / 2 + 1e-6


def test_a_grid_that_reaches_its_limit_says_so():
    finished: dict[str, dict[float, float]] = {"tam": {}}
    while wanted := tuning.proposals(finished, {"tam": 1.0}, 10.0, 3, 5)["tam"]:
        finished["tam"].update({lr: -lr for lr in wanted})  # the larger the better, without end
    assert len(finished["tam"]) == 5 and tuning.at_the_edge(finished) == ["tam"]


def test_where_all_diverge_lower_rates_are_tried():
    diverged = {"tam": dict.fromkeys([0.1, 1.0, 10.0], math.inf)}
    assert tuning.proposals(diverged, {"tam": 1.0}, 10.0, 3, 9) == {"tam": [0.01]}
    assert tuning.best(diverged["tam"]) is None


def test_what_comes_next_does_not_depend_on_the_order_in_which_runs_ended():
    scores = {0.1: 3.0, 1.0: 1.0, 10.0: 2.0, 100.0: 5.0}
    other = {"sgd": {0.1: 1.0, 1.0: 0.5, 10.0: 2.0}}
    starts = {"tam": 1.0, "sgd": 1.0}
    forwards = tuning.proposals({"tam": scores, **other}, starts, 10.0, 3, 9)
    assert tuning.proposals({"tam": dict(reversed(scores.items())), **other}, starts, 10.0, 3, 9) == forwards


# ---- the report ------------------------------------------------------------------------------------------------------


def run(method: str, seed: int, scores: dict[str, float], role: str = "test", lr: float = 0.01, **more) -> RunScores:
    fields = {"validation": scores.get("code"), "seconds": 2.0, "peak_memory": 2**20, "status": "finished", **more}
    measured = {split: {"loss": value} for split, value in scores.items()} if fields["status"] == "finished" else {}
    return RunScores(method=method, role=role, learning_rate=lr, seed=seed, scores=measured, **fields)


def report(**changed) -> ComparisonReport:
    """tam is better on code by 0.1, worse on prose by 0.2, and differs on json by noise; its control is itself."""
    runs = []
    for seed in (1, 2, 3):
        at = {"code": 1.0 + seed / 10, "prose": 2.0 + seed / 10, "json": 3.0 + seed / 10}
        wobble = {1: 0.001, 2: -0.002, 3: 0.001}[seed]
        runs.append(run("adamw_torch", seed, at))
        tam = {"code": at["code"] - 0.1 + wobble, "prose": at["prose"] + 0.2 + wobble, "json": at["json"] + 50 * wobble}
        runs.append(run("tam", seed, tam, seconds=3.0))
        runs.append(run("tam, frozen gate", seed, tam))
    for method in ("adamw_torch", "tam"):
        for lr, loss in ((0.001, 2.0), (0.01, 1.0), (0.1, 3.0)):
            runs.append(run(method, 0, {"code": loss, "prose": 2 * loss}, "tuning", lr))
    fields = {
        "title": "simulated",
        "unit": "byte",
        "metric": "loss",
        "selection": "loss",
        "methods": ["adamw_torch", "tam"],
        "baseline": "adamw_torch",
        "controls": [Control("tam, frozen gate", "tam", "the same")],
        "learning_rates": {name: dict.fromkeys([1, 2, 3], 0.01) for name in ("adamw_torch", "tam", "tam, frozen gate")},
        "seeds": [1, 2, 3],
        "splits": SPLITS,
        "runs": runs,
        "base": {"json": {"loss": 2.5}},
        "command": "hf-momentum compare",
        "recipe": "a: 1",
    }
    return ComparisonReport(**{**fields, **changed})


def test_words_follow_from_the_figures():
    against, control = report().verdict()
    assert against.startswith("tam against adamw_torch: better on code (loss -0.1")
    assert "; worse on prose (loss +0.2" in against and against.endswith("no significant difference on json.")
    assert control == "tam against tam, frozen gate: no significant difference on any split."
    assert "better on one split and worse on another: tam" in report().headline()


def test_with_accuracy_more_is_better():
    """The same numbers under another name turn the words around."""
    same = report()
    renamed = [
        replace(one, scores={split: {"accuracy": x["loss"] / 10} for split, x in one.scores.items()})
        for one in same.runs
    ]
    turned = replace(same, metric="accuracy", selection="accuracy", runs=renamed)
    assert turned.verdict()[0].startswith("tam against adamw_torch: better on prose (accuracy +0.02")


def test_shift_figures_are_those_of_a_hand_calculation():
    figures = report().shift_figures()
    assert figures["adamw_torch"]["gap"].mean == pytest.approx(1.0)
    assert figures["tam"]["gap"].mean == pytest.approx(1.3)
    assert figures["tam"]["change on must not forget"].mean == pytest.approx(3.2 - 2.5)
    line = report().line.line
    assert line.points == 6, "all runs of the baseline, the tuning ones too"
    expected = np.mean([line.at(1.0 + s / 10 - 0.1) - (2.0 + s / 10 + 0.2) for s in (1, 2, 3)])
    assert figures["tam"]["effective robustness"].mean == pytest.approx(expected, abs=0.005)


def test_cost_is_relative_to_the_baseline_seed_by_seed():
    seconds, ratio, memory = report().costs()["tam"]
    assert (seconds, memory) == (3.0, 1.0) and ratio.mean == pytest.approx(1.5)


def test_lost_seeds_are_told_and_do_not_pair():
    runs = [
        run("tam", 2, {}, status="diverged", validation=None, message="nan")
        if (one.method, one.seed) == ("tam", 2)
        else one
        for one in report().runs
    ]
    broken = report(runs=runs)
    assert "1 of 3 seeds of tam did not finish" in broken.verdict()[0]
    assert all(2 not in one.seeds for one in broken.against_baseline)


def test_a_best_point_at_the_end_of_a_grid_is_told():
    runs = [
        one for one in report().runs if not (one.role == "tuning" and one.method == "tam" and one.learning_rate == 0.1)
    ]
    assert report(runs=runs).edges == ["tam"] and report().edges == []
    assert "no, at an end" in document(report(runs=runs)).to_markdown()


def test_json_reads_back_to_the_same_report():
    made = report()
    again = ComparisonReport.from_json(made.to_json())
    assert again.to_json() == made.to_json() and again.verdict() == made.verdict()
    assert json.loads(made.to_json())["differences"][0]["words"] == "better"


def test_the_document_holds_every_method_split_and_run(tmp_path):
    made = report()
    page = made.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert page.read_text().count("<svg") == 3 and {p.name for p in (tmp_path / "plots").iterdir()} == {
        "differences.png",
        "shift.png",
        "tuning.png",
    }
    assert all(f"| `{name}` |" in text for name in made.everyone)
    assert text.count("| tuning |") == 6 and text.count("| test |") == 9
    assert "no significant difference" in text and "Holm" in text


def test_nothing_to_compare_is_said():
    alone = report(methods=["adamw_torch"], controls=[])
    assert alone.headline() == "adamw_torch was run alone, so there is nothing to compare."
    assert "report" not in document(alone).to_markdown()[:20]
