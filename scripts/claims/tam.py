"""TAM against SGD with momentum, AdaTAMW against AdamW, in distribution and under shift (arXiv 2412.18790).

    python scripts/claims/tam.py                 digits, some minutes on one core
    python scripts/claims/tam.py --size gpu      CIFAR-10 and ResNet-18

Four candidates are tuned with equal budgets. Then, with other seeds: the two methods, their baselines, and three runs
each that have everything of the method but its angle.
"""

from dataclasses import replace

from common import Lab, arguments, in_distribution, laboratory, tuning_facts, under_shift
from page import Program, keep
from rows import Row, means, versus

# AdaTAMW's learning rate is about 0.2 of AdamW's, so with these decays lr wd is about equal.
CANDIDATES = {
    "TAM": ("tam", 0.1, {}),
    "SGD 0.9": ("sgd", 0.05, {"momentum": 0.9}),
    "AdaTAMW": ("adatamw", 4e-4, {"weight_decay": 0.05}),
    "AdamW": ("adamw", 2e-3, {"weight_decay": 0.01}),
}
# Each method with its baseline, and the latter's effective learning rate in units of its learning rate.
PAIRS = (("TAM", "SGD 0.9", 10.0), ("AdaTAMW", "AdamW", 1.0))


def program(lab: Lab) -> Program:
    """Tune, run, and compare."""
    settings = {name: lab.size.setting(method, lr, **given) for name, (method, lr, given) in CANDIDATES.items()}
    tuned = lab.tuned(settings)
    rows, facts = [], tuning_facts(tuned)
    for method, baseline, unit_gain in PAIRS:
        ours = replace(settings[method], lr=tuned[method].lr)
        theirs = replace(settings[baseline], lr=tuned[baseline].lr)
        matched = replace(theirs, lr=ours.lr * lab.mean_gain(ours) / unit_gain)
        found = lab.results(ours)
        opponents = {
            f"{baseline}, tuned": ("baseline", lab.results(theirs)),
            "the angle off (d = 0.5), same learning rate": (
                "control",
                lab.results(replace(ours, options={**ours.options, "fixed_damping": 0.5})),
            ),
            f"{baseline} at the matched effective learning rate": ("control", lab.results(matched)),
            f"{baseline} at {method}'s learning rate": ("untuned", lab.results(replace(theirs, lr=ours.lr))),
        }
        damping = [run["dynamics"]["damping"] for run in found]
        facts.append(
            f"{method}: mean damping d {sum(damping) / len(damping):.3f}; matched {baseline}: {matched.lr:.4g}"
        )
        for where, take in (("in distribution", in_distribution), ("under shift", under_shift)):
            values = [take(run, "accuracy") for run in found]
            others = {name: (role, [take(run, "accuracy") for run in runs]) for name, (role, runs) in opponents.items()}
            claim = f"{method} generalises better than {baseline} {where}"
            rows.append(Row(claim, lab.size.words, "accuracy at the end", "points", versus(values, others)))
            listed = {method: values} | {name: other for name, (_, other) in others.items()}
            facts.append(f"Accuracy {where}: {means('percent', listed)}")
    return Program("tam", lab.size.name, rows, facts)


if __name__ == "__main__":
    args = arguments("tam", None)
    keep(program(laboratory("tam", args)), args.json)
