"""Targeted correction against other choices of what to retrain (arXiv 2603.28921), from `hf-momentum repair`.

    python scripts/claims/repairs.py --make FOLDER   train a ResNet on clean digits; save it and corrupted digits there
    hf-momentum repair --baselines ...               as `--make` prints it; its report goes to docs/repair_digits
    python scripts/claims/repairs.py                 the rows of all reports that are in docs

All ways to retrain are tuned over the same learning rates and mixtures on validation and make the same steps, from the
same old model. A seed decides how the data are cut into three, the samples of the diagnosis and the order.
"""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from common import ROOT, SHIFTS, Enlarged, Setting, digit_images, fitted
from page import DATA, Program, keep
from rows import Row, means, versus

from hf_momentum.diagnosis.baselines_report import BASELINES, CHOSEN, SINGLE, BaselinesReport

REPORTS = {"small": ROOT / "docs" / "repair_digits", "reviews": ROOT / "docs" / "repair_reviews"}
TASKS = {
    "small": "a ResNet trained on clean digits, repaired on digits with noise and less contrast",
    "reviews": "a MiniLM encoder fine-tuned on films, repaired on reviews of products",
}
MODEL = Setting("digits", "resnet", "sgd", 0.05, 400, 32, options={"momentum": 0.9})
NAMES = {
    "full": "all weights",
    "head": "the head",
    "random": "as many random groups",
    "relative_lr": "all weights, rates by relative gradient",
}


def program(reports: Mapping[str, BaselinesReport]) -> list[Program]:
    """One for each report, by size."""
    found = []
    for size, report in reports.items():
        rows, facts = _found(report, TASKS[size])
        place = REPORTS[size].name
        found.append(Program("repairs", size, rows, [*facts, f"The whole report: [{place}]({place}/report.md)"]))
    return found


def _found(report: BaselinesReport, task: str) -> tuple[list[Row], list[str]]:
    seeds, unit = report.seeds, f"{report.unit}s"
    net = {method: [report.net(method)[seed] for seed in seeds] for method in (CHOSEN, *BASELINES)}
    opponents = {NAMES[method]: ("baseline", net[method]) for method in BASELINES}
    known = [seed for seed in seeds if all(seed in by_seed for by_seed in report.correlations.values())]
    rho = {name: [by_seed[seed] for seed in known] for name, by_seed in report.correlations.items()}
    own = {name for by_score in report.scores.values() for name in by_score}  # the others know nothing of the errors
    others = {name: ("control", values) for name, values in rho.items() if name not in own}
    chosen = f"the groups that the {report.score} chooses"
    none = {"no repair": ("baseline", [0.0] * len(seeds))}
    rows = [
        Row(f"Retraining {chosen} fixes more cases than it breaks", task, "net gain", unit, versus(net[CHOSEN], none)),
        Row(f"Retraining {chosen} gains more than others", task, "net gain", unit, versus(net[CHOSEN], opponents)),
        Row(f"The {report.score} foretells which groups are worth retraining", task,
            "rank correlation with the net gain of single groups", "in rank correlation",
            versus(rho[report.score], {"0": ("baseline", [0.0] * len(known))} | others)),
    ]  # fmt: skip
    return rows, _facts(report, net, rho, task)


def _facts(
    report: BaselinesReport, net: Mapping[str, Sequence[float]], rho: Mapping[str, Sequence[float]], task: str
) -> list[str]:
    runs = {method: [run for run in report.runs if run.method == method] for method in net}
    whole = max(run.parameters for run in report.runs)
    cases = runs[CHOSEN][0].flips.total
    shown = [
        f"{'the chosen groups' if method == CHOSEN else NAMES[method]} "
        f"{_mean([run.flips.fixed for run in found]):.1f} fixed, {_mean([run.flips.broken for run in found]):.1f} "
        f"broken, on {100 * _mean([run.parameters / whole for run in found]):.3g} % of the parameters"
        for method, found in runs.items()
    ]
    singles = [method for method in report.methods if method.startswith(SINGLE)]
    by_group = {method.removeprefix(SINGLE): list(report.net(method).values()) for method in singles}
    return [
        f"{task}: of {cases} test cases on average: {'; '.join(shown)}",
        f"Net gain of single groups: {means('', by_group, 1)}; of the best one at each seed, known only afterwards, "
        f"{_mean(list(report.oracle.values())):.1f}",
        f"Rank correlation with the net gain of single groups: {means('', rho)}",
        f"{task}: {', '.join(f'{name} {value}' for name, value in report.facts.items())}",
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- the model and the data ------------------------------------------------------------------------------------------


def make(folder: Path, setting: Setting = MODEL) -> str:
    """Train a model on clean digits, and corrupt those it did not see; returns the command that repairs it."""
    import datasets
    from PIL import Image
    from transformers import ViTImageProcessorPil

    net, result = fitted(setting)
    assert isinstance(net, Enlarged)
    net.model.save_pretrained(folder / "model")
    side = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=side, image_mean=[0.0], image_std=[1.0]).save_pretrained(folder / "model")
    known = digit_images()
    images, labels = known[0][1197:], known[1][1197:]  # of writers that are in no training set
    generator = torch.Generator().manual_seed(0)
    corrupted = SHIFTS["contrast"](SHIFTS["noise"](images, generator), generator)
    rows = datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(one) for one in (255 * corrupted[:, 0]).round().to(torch.uint8).numpy()],
            "label": labels.tolist(),
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    rows.to_parquet(folder / "digits.parquet")
    print(f"accuracy on clean digits: {100 * result['scores']['test']['accuracy']:.1f} %")
    words = ["hf-momentum", "repair", "--model", str(folder / "model"), "--data", str(folder / "digits.parquet")]
    words += ["--baselines", "--seeds", "5", "--learning_rates", "0.03,0.1,0.3", "--cut", "0.4,0.2,0.4"]
    words += ["--max_steps", "60", "--eval_steps", "10", "--batch_size", "32", "--device", "cpu"]
    return shlex.join([*words, "--output_dir", str(folder / "repair")])


def main(given: Sequence[str] | None = None) -> None:
    """Make the model and its data, or put the rows of the reports on the page."""
    parser = argparse.ArgumentParser(prog="scripts/claims/repairs.py")
    parser.add_argument(
        "--make", metavar="FOLDER", type=Path, help="only make the model and the corrupted digits there"
    )
    parser.add_argument("--json", type=Path, default=DATA, help="where the rows go")
    args = parser.parse_args(given)
    if args.make is not None:
        torch.set_num_threads(1)
        print(make(args.make))
        return
    files = {size: folder / "report.json" for size, folder in REPORTS.items()}
    found = {
        size: BaselinesReport.from_json(file.read_text(encoding="utf-8"), str(file))
        for size, file in files.items()
        if file.is_file()
    }
    for one in program(found):
        keep(one, args.json)


if __name__ == "__main__":
    main()
