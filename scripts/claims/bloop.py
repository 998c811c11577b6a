"""Bloop's fronts against those of the mixture, PCGrad and replay (arXiv 2402.02998), from `hf-momentum pareto`.

    python scripts/claims/bloop.py

Nothing was tuned for one method there, so all others are untuned baselines: the claim cannot hold by this report
alone.
"""

import json
from pathlib import Path
from typing import Any

from common import ROOT
from page import DATA, Program, keep
from rows import Row, means, versus

REPORT = ROOT / "docs" / "bloop_fronts.json"


def program(report: dict[str, Any]) -> Program:
    """Hypervolumes, seed by seed: larger is better."""
    unit = report["unit"]
    volumes = {
        name: [1000 * by_seed[str(seed)] for seed in report["seeds"]]
        for name, by_seed in report["hypervolumes"].items()
    }
    surgeries = {f"{name}, at its learning rate": ("untuned", volumes[name]) for name in ("mixed", "pcgrad")}
    replay = {"replay, at its learning rate": ("untuned", volumes["replay"])}
    setting = f"{report['title']}, {report['facts']['optimizer']}"
    figure = "area under the front (hypervolume)"
    rows = [
        Row(claim, setting, figure, f"10⁻³ (nats per {unit})²", versus(volumes["bloop"], others))
        for claim, others in (
            ("Bloop's front is better than those of the mixture and of PCGrad", surgeries),
            ("Bloop's front is better than that of plain replay", replay),
        )
    ]
    facts = [
        f"λ in {', '.join(f'{lam:g}' for lam in report['lambdas'])}; {report['facts']['model']}",
        f"Hypervolumes: {means(f'10⁻³ (nats per {unit})²', volumes)}",
    ]
    return Program("bloop", "small", rows, facts)


def main(path: Path = REPORT, data: Path = DATA) -> None:
    """Read the report and put its rows on the page."""
    keep(program(json.loads(path.read_text(encoding="utf-8"))), data)


if __name__ == "__main__":
    main()
