"""VRAdam against AdamW, with clipping and without, in distribution and under shift (arXiv 2505.13196).

    python scripts/claims/vradam.py              digits, some minutes on one core
    python scripts/claims/vradam.py --size gpu   CIFAR-10 and ResNet-18

Both are tuned with equal budgets, with and without clipping. AdamW at VRAdam's effective learning rate is VRAdam with
its gate held still, and so the control. beta3 = 1 and alpha1 = 10 as published; weight decay 0.01 in all.
"""

from dataclasses import replace

from common import Lab, arguments, in_distribution, laboratory, tuning_facts, under_shift
from page import Program, keep
from rows import Row, means, versus

CLIPPING = {"without clipping": None, "clipped at 1": 1.0}


def program(lab: Lab) -> Program:
    """Tune, run, and compare."""
    candidates = {
        f"{name} {words}": lab.size.setting(method, 2e-3, clip=clip, weight_decay=0.01)
        for words, clip in CLIPPING.items()
        for name, method in (("VRAdam", "vradam"), ("AdamW", "adamw"))
    }
    tuned = lab.tuned(candidates)
    rows, facts = [], tuning_facts(tuned)
    for words in CLIPPING:
        ours, theirs = (replace(candidates[name], lr=tuned[name].lr) for name in (f"VRAdam {words}", f"AdamW {words}"))
        gain = lab.mean_gain(ours)
        found = lab.results(ours)
        opponents = {
            "AdamW, tuned": ("baseline", lab.results(theirs)),
            "AdamW at the matched effective learning rate": (
                "control",
                lab.results(replace(theirs, lr=ours.lr * gain)),
            ),
            "AdamW at VRAdam's learning rate": ("untuned", lab.results(replace(theirs, lr=ours.lr))),
        }
        norms = [run["dynamics"]["momentum_norm"] for run in found]
        facts.append(f"VRAdam {words}: mean lr_t / lr {gain:.3f}, mean norm of m {sum(norms) / len(norms):.3f}")
        for where, take in (("in distribution", in_distribution), ("under shift", under_shift)):
            values = [take(run, "loss") for run in found]
            others = {name: (role, [take(run, "loss") for run in runs]) for name, (role, runs) in opponents.items()}
            claim = f"VRAdam reaches a lower test loss than AdamW {where}, {words}"
            compared = versus(values, others, lower_is_better=True)
            rows.append(Row(claim, lab.size.words, "AdamW's loss minus VRAdam's", "nats", compared))
            listed = {"VRAdam": values} | {name: other for name, (_, other) in others.items()}
            facts.append(f"Loss {where}, {words}: {means('nats', listed, 4)}")
    return Program("vradam", lab.size.name, rows, facts)


if __name__ == "__main__":
    args = arguments("vradam", None)
    keep(program(laboratory("vradam", args)), args.json)
