"""Writes docs/claims.md and README's table from docs/claims.json, which the other programs of this folder leave there.

    python scripts/claims/page.py          rewrite them
    python scripts/claims/page.py --check  only say whether they are up to date (exit status 1 if not)

The JSON holds differences, seed by seed. Intervals, p-values and verdicts are formed from them here, each time.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT
from rows import Judged, Row, as_data, from_data, judged, shown, unbeaten, verdict

DATA, PAGE, README = ROOT / "docs" / "claims.json", ROOT / "docs" / "claims.md", ROOT / "README.md"
BEGIN, END = "<!-- claims from docs/claims.json: begin -->", "<!-- claims: end -->"


@dataclass(frozen=True)
class Program:
    """What a program found: its rows, and facts that belong beside them (selected learning rates, means)."""

    name: str
    size: str
    rows: Sequence[Row]
    facts: Sequence[str]


@dataclass(frozen=True)
class About:
    """What the page says of a program whatever it finds.

    Attributes:
        title: of its section.
        short: the claim in a few words, for README.
        claimed: the paper's words and figures, as far as we could read them.
        setting: what is run, and what the controls are.
        paper_scale: where the paper measured, which no size here is.
        picture: a file of docs/images, with its caption.
    """

    title: str
    short: str
    claimed: str
    setting: str
    paper_scale: str
    picture: tuple[str, str] | None = None


ABOUT: Mapping[str, About] = {
    "tam": About(
        "TAM and AdaTAMW",
        "TAM and AdaTAMW generalise better than SGD and AdamW, also under shift",
        "Torque-Aware Momentum (arXiv 2412.18790): generalises better than classical momentum and handles "
        "distribution shifts better, with SGD and with Adam. We could read no single headline figure.",
        "Shifted sets: 600 digits of other writers, and the test images with noise, blur, turned by 20 degrees, and "
        "with less contrast; the figure is the mean of the five. The angle is switched off by `fixed_damping=0.5` at "
        "the method's own learning rate; the matched rate is lr times the mean gain of the tuning runs.",
        "image classification with ResNets, fine-tuning of language models",
    ),
    "ahb": About(
        "AHB",
        "AHB bears larger learning rates than SGD with momentum, and generalises better",
        "Adaptive momentum from quadratics (arXiv 2110.09057): more robust to large learning rates, converges faster "
        "and generalises better than SGD with momentum.",
        "Fifteen learning rates, three to a decade. The two controls at a large learning rate are SGD with momentum "
        "0.9 at a tenth of it, which is 0.9's tuned rate, and at AHB's measured effective rate, lr / (1 - mean β). A "
        "range is as wide when all its learning rates are divided by ten, so its width needs no matching. AHB "
        "without its momentum is plain SGD. Minibatches are of 32, full batches of all 600 training images.",
        "image classification, language modelling, machine translation",
        (
            "claims_ahb.png",
            "Test accuracy over the learning rate, mean over seeds, of AHB, SGD with momentum 0.9 and plain SGD",
        ),
    ),
    "critical": About(
        "The critical law of momentum and its hybrid",
        "the critical law and its hybrid reach a level of accuracy sooner",
        "Beta-scheduling (arXiv 2603.28921), ResNet-18 on CIFAR-10, one seed: constant 0.9 takes 1.9 times as long "
        "as the critical law to 90 %, and the hybrid is the first of five schedules to reach 95 %. No gain in "
        "accuracy is claimed.",
        "Levels that mean here what 90 % and 95 % mean there: an error of 2 and of 1.2 times the final validation "
        "error of a tuned constant 0.9. Figures are ratios of optimizer steps, above 1 where the law is sooner; a "
        "run that never gets there counts with all its steps. The five controls: both of equal effective rate, "
        "constant 0.9 with a tuned rate, one-cycle and demon, tuned too (for the number of steps itself, on "
        "validation data).",
        "ResNet-18 on CIFAR-10, 90 % and 95 %",
        (
            "claims_critical.png",
            "Test accuracy over the steps at learning rate 0.1, mean over seeds, and the level in question",
        ),
    ),
    "vradam": About(
        "VRAdam",
        "VRAdam reaches a lower test loss than AdamW",
        "VRAdam (arXiv 2505.13196), single runs, test loss against AdamW's: WikiText-2 6.00 to 6.50, CIFAR-10 0.469 "
        "to 0.565, GPT-2 124M on FineWeb-Edu 3.447 to 3.511.",
        "β₃ = 1 and α₁ = 10 as published, weight decay 0.01 in all. Shifted sets as for TAM. The control, AdamW at "
        "VRAdam's mean effective rate, is VRAdam with its gate held still.",
        "WikiText-2, CIFAR-10, GPT-2 124M on FineWeb-Edu",
    ),
    "vradam_edge": About(
        "VRAdam at the edge of stability",
        "VRAdam settles where the loss is flatter (our question)",
        "VRAdam (arXiv 2505.13196) brakes when weights move fast, which is said to damp the oscillations at the edge "
        "of stability. Whether it then settles where the loss is flatter is what is asked here.",
        "Squared error, a tanh network of two hidden layers, float64, constant learning rate, chosen because AdamW "
        "reaches the edge with it; no weight decay. The figure is the mean over the last quarter of the steps. Adam "
        "is stable while its preconditioned sharpness is below 38 / lr (Cohen et al. 2022, arXiv 2207.14484). β₃ = 1 "
        "/ |m|² takes |m|² from runs without a gate: from their steps 50 to 100 (early) or their second half (late). "
        "Early was added when late was found to brake fully throughout: a braked run learns slowly and keeps a large "
        "m.",
        "networks of the size of a ResNet",
        (
            "claims_vradam_edge.png",
            "Sharpness, and preconditioned sharpness over 38 divided by the nominal learning rate, over the steps of "
            "AdamW, VRAdam with three gates, and AdamW at their effective learning rates",
        ),
    ),
    "bloop": About(
        "Bloop",
        "Bloop's front of main against auxiliary loss is better than the mixture's, PCGrad's and replay's",
        "Bloop (arXiv 2402.02998): better fronts of main against auxiliary loss than the mixture and PCGrad. The "
        "paper gives fronts only, no figures.",
        "From the report of `hf-momentum pareto` ([methods/bloop.md](methods/bloop.md)). All methods share the "
        "learning rate, which was tuned for none, so no verdict can be better than against an untuned baseline.",
        "a byte-level decoder of 12 layers on C4 and RCV-1",
    ),
    "layers": About(
        "Layer attribution: the same layers under SGD and Adam",
        "errors of models trained by SGD and by Adam point to the same layers",
        "Beta-scheduling (arXiv 2603.28921): the gradient on misclassified examples picks 3 of 7 layer groups of a "
        "ResNet, the same 3 whether SGD or Adam trained it. By chance alone that happens once in 35. How the paper "
        "normalises the gradient is not known to us, so five scores are tried.",
        "A ResNet of transformers (144 thousand weights, images enlarged to 32 by 32), from the same first weights and "
        "with the same batches under both optimizers; two tuning seeds, first grids of five learning rates. Errors are "
        "those on 600 digits of other writers. Groups are the blocks (embeddings, four stages, head) or the parts (a "
        "stage's two layers apart). The control: what each model's choice has in common with that of a model of other, "
        "random weights, by the same examples; mean of the two.",
        "ResNet-18 on CIFAR-10",
    ),
    "planted": About(
        "Layer attribution: a planted fault",
        "errors point to the layer in which a fault was planted, and retraining it mends most",
        "That errors point to the layers at fault is what the attribution of arXiv 2603.28921 is for. We know of no "
        "test of it with a fault that was planted; nine in ten and 90 % are our measure.",
        "One block of a trained model, another at each seed, gets noise on its weight matrices (in multiples of each "
        "one's standard deviation), or has their rows permuted. All groups are scored on held-out data. Where no right "
        "example is of a class that is wrong, there is no contrast, and raw ranks, as in `hf-momentum diagnose`. The "
        "repair trains on errors and as many right examples, with equal steps for both ways, each at the best of three "
        "learning rates and four mixtures with the old weights on validation; its figures are of a test split that "
        "nothing else has seen. ResNet as above, trained by SGD at 0.05, 60 steps of repair; encoder fine-tuned with "
        "AdamW, 20 steps of repair, and three seeds only, of which little follows.",
        "ResNet-18 on CIFAR-10",
    ),
    "repairs": About(
        "Targeted correction",
        "retraining the layers that errors point to fixes more than it breaks, and more than other layers do",
        "Beta-scheduling (arXiv 2603.28921): retraining the layers that errors point to, 18 % of the parameters, fixes "
        "62 errors; the best net gain is 22.",
        "From the reports of `hf-momentum repair --baselines`. Every way to retrain has the same steps and is tuned on "
        "validation over the same learning rates and mixtures with the old weights; a third part of the data decides. "
        "There is one old model; a seed decides how the data are cut, the samples of the diagnosis and the order. On "
        "digits the grid of learning rates was moved up once, when the first run had chosen its upper end; most "
        "chose the upper end again, so a longer grid might gain more.",
        "ResNet-18 on CIFAR-10",
    ),
}

INTRODUCTION = """# The papers' claims, put to the test

One small program per claim, in [`scripts/claims/`](../scripts/claims), with the controls that
[which_optimizer.md](which_optimizer.md) names. Everything measured here is small: where a verdict says "holds", it
holds on this task at this size. Settings were fixed first, and everything was run once.

- **Figures** are differences or ratios between two optimizers, seed by seed (a seed decides the split of the data, the
  first weights and the order), with a 95 % t-interval over seeds and a p-value after Holm's correction over all
  comparisons of a program. Above 0 (for "times", above 1) is what the claim says. On layer attribution and targeted
  correction they are between two choices of layers.
- **baseline**: what the paper compares with, tuned with the same number of runs as the method: a grid of learning rates
  in steps of 2 that widens until the best is interior, by mean validation loss over 4 seeds, unless it says otherwise.
  Seeds of the tuning are not seeds of the figures.
- **control**: all of the method but its idea. **untuned**: the baseline at the method's own learning rate.
- **Verdicts** follow from the figures by a rule (`verdict` in `scripts/claims/rows.py`): *holds*, significantly better
  than every baseline and every control; *holds only against the untuned baseline*, and not against the tuned one;
  *does not hold*, significantly worse than one of them; *no significant difference*, to what stands beside it;
  *not tested at the paper's scale*. A method that beats its tuned baseline but not its controls owes that to the
  learning rate: they have the same rate without the idea, and the one that noisy validation selected for the baseline
  was not its best. The rule was corrected twice when the first rows were there and its words were false of them: a
  tuned baseline that is beaten is not called untuned, and who is worse than an untuned one does not hold.
- **Digits**: scikit-learn's 1797 images of 8 by 8 pixels, cut by seed into 600 for training, 250 for validation and 347
  for the test; 600 of other writers are only a shifted set. Linear warm-up over 5 % of the steps, then a cosine to 0;
  everything is measured at the end of it. A run that diverged counts as one that guesses.

All of it again: `make claims`, or one program, such as `python scripts/claims/tam.py`; `--size gpu` is CIFAR-10 with a
ResNet-18 (at the edge of stability: 5000 of its images). The differences, seed by seed, are in
[claims.json](claims.json).
"""


def keep(program: Program, path: Path) -> None:
    """Put a program's rows of one size into the JSON file, whole or not at all, and rewrite the page beside it."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {"rows": [as_data(row) for row in program.rows], "facts": [*program.facts]}
    data.setdefault(program.name, {})[program.size] = found
    for file, text in ((path, json.dumps(data, indent=1) + "\n"), (path.with_suffix(".md"), page(data))):
        partial = file.with_suffix(file.suffix + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)


def page(data: Mapping[str, Any]) -> str:
    """The page as Markdown: a summary of all verdicts, then a section for each program."""
    sections, summary = [], ["| claim | setting | seeds | verdict | not better than |", "|---|---|---:|---|---|"]
    for name, about in ABOUT.items():
        if name not in data:
            continue
        tables, facts = ["| claim | figure | baselines and controls | seeds | verdict |", "|---|---|---|---:|---|"], []
        for found in data[name].values():
            rows = [from_data(row) for row in found["rows"]]
            for row, compared in zip(rows, judged(rows), strict=True):
                said = f"**{verdict(compared)}**"
                missed = unbeaten(compared)
                cells = f"{row.figure} | {_cell(row, compared)} | {row.seeds} | {said}"
                claim = escaped(row.claim)
                tables.append(f"| {claim}<br>({row.setting}) | {cells} |")
                summary.append(f"| {claim} | {row.setting} | {row.seeds} | {said} | {'; '.join(missed)} |")
            facts += found["facts"]
        untested = Row(f"The same where the paper measured: {about.paper_scale}", "", "", "")
        said = f"**{verdict(judged([untested])[0])}**"
        tables.append(f"| {untested.claim} | | | 0 | {said} |")
        picture = [f"![{about.picture[1]}](images/{about.picture[0]})", ""] if about.picture else []
        sections += [f"## {about.title}", "", f"**Claimed.** {about.claimed}", "", f"**Run.** {about.setting}", ""]
        sections += [*tables, "", *picture, *(f"- {fact}" for fact in facts), ""]
    return "\n".join([INTRODUCTION, *summary, "", *sections]).rstrip() + "\n"


def short_table(data: Mapping[str, Any]) -> str:
    """README's table: a line for each program, with how often it came to which verdict."""
    lines = ["| claim | measured on | seeds | verdicts |", "|---|---|---:|---|"]
    for name, about in ABOUT.items():
        if name not in data:
            continue
        rows = [from_data(row) for found in data[name].values() for row in found["rows"]]
        verdicts = [
            verdict(one) for found in data[name].values() for one in judged(list(map(from_data, found["rows"])))
        ]
        counted = "; ".join(f"**{said}** ({number} of {len(rows)})" for said, number in Counter(verdicts).most_common())
        seeds = sorted({row.seeds for row in rows})
        shown_seeds = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        settings = ", ".join(dict.fromkeys(re.split("[,:]", row.setting)[0] for row in rows))
        link = f"[{about.short}](docs/claims.md#{re.sub('[^a-z0-9 ]', '', about.title.lower()).replace(' ', '-')})"
        lines.append(f"| {link} | {escaped(settings)} | {shown_seeds} | {counted} |")
    return "\n".join(lines)


def readme(text: str, data: Mapping[str, Any]) -> str:
    """README with the table between its two markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, found, rest = text.partition(BEGIN)
    _, also, after = rest.partition(END)
    if not found or not also:
        raise ValueError(f"no markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{short_table(data)}\n\n{END}{after}"


def escaped(text: str) -> str:
    """Fit for a cell of a table.

    Example:
        >>> print(escaped("1 / |m|"))
        1 / \\|m\\|
    """
    return text.replace("|", "\\|")


def _cell(row: Row, compared: Sequence[Judged]) -> str:
    return "<br>".join(f"{one.role}, {one.opponent}: {shown(one, row.unit)}" for one in compared)


def main(given: Sequence[str]) -> int:
    """Write page and table, or with --check only say whether they are what the JSON gives."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    texts = {PAGE: page(data), README: readme(README.read_text(encoding="utf-8"), data)}
    if "--check" in given:
        return int(any(text != file.read_text(encoding="utf-8") for file, text in texts.items()))
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
