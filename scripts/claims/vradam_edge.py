"""Does VRAdam settle where the loss is flatter than where AdamW settles, at the edge of stability (arXiv 2505.13196)?

    python scripts/claims/vradam_edge.py              500 digits, some minutes on one core
    python scripts/claims/vradam_edge.py --size gpu   5000 images of CIFAR-10

Full batch, constant learning rate, squared error, a tanh network, float64. Measured along the way: the sharpness, which
is the top eigenvalue of the Hessian H, and the preconditioned sharpness, that of P^(-1/2) H P^(-1/2) with Adam's
P = diag(sqrt(v_hat) + eps). Adam with b1 = 0.9 is stable while the latter is below 38 / lr (Cohen et al. 2022, arXiv
2207.14484).

VRAdam runs with beta3 = 1 as published, and with beta3 = 1 / |m|^2, to make the gate act: |m|^2 from steps 50 to
100, or from the second half, of runs without a gate. The former was added when the latter turned out to stay at its
floor throughout, which is AdamW at a fraction of the learning rate.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import METHODS, ROOT, TASKS, Lab, arguments, laboratory
from page import Program, keep
from pictures import Panel, draw
from rows import Row, means, versus
from torch import Tensor, nn
from torch.nn import functional

B1 = 0.9
THRESHOLD = (2 + 2 * B1) / (1 - B1)  # 38: Adam is stable below this over lr
SEEDS = 8
PICTURE = ROOT / "docs" / "images" / "claims_vradam_edge.png"


@dataclass(frozen=True)
class Edge:
    """All that such a run depends on; `beta3` is None for AdamW."""

    task: str
    examples: int
    width: int
    lr: float
    beta3: float | None
    steps: int
    every: int
    seed: int = 0


EDGES = {
    "small": Edge("digits", 500, 32, 0.003, None, 1000, 50),
    "gpu": Edge("cifar10", 5000, 200, 0.001, None, 4000, 100),
}


def top_eigenvalue(
    gradient: Callable[[], Sequence[Tensor]], params: Sequence[Tensor], weights: Sequence[Tensor], rounds: int
) -> float:
    """The largest eigenvalue, by magnitude, of S H S with S = diag(weights): power iteration by double backward.

    Args:
        gradient: the gradient with a graph, formed once.
        params: what it is the gradient of.
        weights: S, one tensor per parameter.
        rounds: iterations; the error falls as the square of the ratio of the first two eigenvalues to this power.
    """
    grads = gradient()
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in params]
    value = 0.0
    for _ in range(rounds):
        norm = math.sqrt(sum(part.square().sum().item() for part in vector))
        vector = [part / norm for part in vector]
        product = torch.autograd.grad(
            grads, params, [s * part for s, part in zip(weights, vector, strict=True)], retain_graph=True
        )
        image = [s * part for s, part in zip(weights, product, strict=True)]
        value = sum((a * b).sum().item() for a, b in zip(vector, image, strict=True))
        vector = image
    return value


def run(edge: Edge, device: str = "cpu") -> dict[str, Any]:
    """Train, and measure every `every` steps: `[step, loss, sharpness, preconditioned sharpness, lr_t / lr]`."""
    images, labels = (part[: edge.examples].to(device) for part in TASKS[edge.task](edge.seed).train)
    inputs, targets = images.flatten(1).double(), functional.one_hot(labels, 10).double()
    torch.manual_seed(edge.seed)
    width = edge.width
    layers = nn.Linear(inputs.shape[1], width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    net = nn.Sequential(*layers).double().to(device)
    params = list(net.parameters())
    common = {"lr": edge.lr, "betas": (B1, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    gated = edge.beta3 is not None
    optimizer = METHODS["vradam"](params, beta3=edge.beta3, **common) if gated else METHODS["adamw"](params, **common)

    def loss() -> Tensor:
        return (net(inputs) - targets).square().sum(1).mean() / 2

    def gradient() -> Sequence[Tensor]:
        return torch.autograd.grad(loss(), params, create_graph=True)

    table, ratios, squares = [], [], []
    for step in range(1, edge.steps + 1):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        ratio = 1.0
        if gated:
            inner = optimizer.dynamics()
            ratio = inner["lr_ratio"].item()
            squares.append(inner["momentum_norm"].item() ** 2)
        ratios.append(ratio)
        if step % edge.every == 0:
            second = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**step) for p in params]
            inverse = [(v.sqrt() + 1e-8).rsqrt() for v in second]
            plain = top_eigenvalue(gradient, params, [torch.ones_like(p) for p in params], 40)
            table.append([step, value.item(), plain, top_eigenvalue(gradient, params, inverse, 40), ratio])
    half = len(squares) // 2
    late = statistics.fmean(squares[half:]) if squares else None
    return {"table": table, "ratio": statistics.fmean(ratios), "late_square": late}


def settled(result: dict[str, Any], column: int) -> float:
    """The mean of a column over the last quarter of the run."""
    table = result["table"]
    return statistics.fmean(entry[column] for entry in table[3 * len(table) // 4 :])


def program(lab: Lab, edge: Edge) -> Program:
    """AdamW, VRAdam without a gate and with three, and AdamW at each gate's effective learning rate."""

    lab = lab.fewer(SEEDS)

    def results(one: Edge) -> list[dict[str, Any]]:
        settings = [replace(one, seed=seed) for seed in range(lab.size.seeds)]
        lab.say(f"lr {one.lr:.4g}, beta3 {one.beta3}")
        return [lab.records.kept({"edge": asdict(s)}, lambda s=s: run(s, lab.device)) for s in settings]

    setting = f"{edge.task}, {edge.examples} examples, full batch, {edge.steps} steps"
    adamw = results(edge)
    late = _square(results(replace(edge, beta3=0.0)))
    # As our own page advises: train a little without a gate, and read the norm.
    early = _square(results(replace(edge, beta3=0.0, steps=edge.steps // 10, every=edge.steps // 10)))
    relative = [settled(one, 3) * edge.lr / THRESHOLD for one in adamw]
    rows, drawn = [], {f"AdamW, lr {edge.lr:g}": (adamw, edge.lr)}
    facts = [
        f"AdamW's preconditioned sharpness over 38 / lr, last quarter: {statistics.fmean(relative):.2f}",
        f"Mean |m|² without a gate: {early:.3g} early, {late:.3g} late",
    ]
    gates = (
        ("β₃ = 1", 1.0),
        (f"β₃ = {1 / early:.3g}, 1 / early |m|²", 1 / early),
        (f"β₃ = {1 / late:.3g}, 1 / late |m|²", 1 / late),
    )
    for words, beta3 in gates:
        gated = results(replace(edge, beta3=beta3))
        gain = statistics.fmean(one["ratio"] for one in gated)
        matched = results(replace(edge, lr=edge.lr * gain))
        facts.append(f"VRAdam, {words}: mean lr_t / lr {gain:.3f}, in the last quarter {_late(gated, 4):.3f}")
        drawn[f"VRAdam, {words}"] = (gated, edge.lr)
        if gain < 0.95:  # else it could not be told from AdamW's own line
            drawn[f"AdamW, lr {edge.lr * gain:.3g}"] = (matched, edge.lr * gain)
        for name, column in (("sharpness", 2), ("preconditioned sharpness", 3)):
            values = {"VRAdam": gated, "AdamW, same learning rate": adamw, "AdamW, matched": matched}
            taken = {key: [settled(one, column) for one in found] for key, found in values.items()}
            facts.append(f"Settled {name}, {words}: {means('', taken)}")
            logs = {key: [math.log(value) for value in found] for key, found in taken.items()}
            others = {
                "AdamW at the matched effective learning rate": ("control", logs["AdamW, matched"]),
                "AdamW at the same learning rate": ("untuned", logs["AdamW, same learning rate"]),
            }
            claim = f"VRAdam settles at a lower {name} than AdamW, {words}"
            compared = versus(logs["VRAdam"], others, lower_is_better=True)
            rows.append(Row(claim, setting, f"AdamW's {name} over VRAdam's", "times", compared))
        losses = {key: [settled(one, 1) for one in found] for key, found in values.items()}
        facts.append(f"Training loss there, {words}: {means('', losses, 5)}")
    if edge == EDGES["small"]:
        draw(panels(drawn), PICTURE)
    return Program("vradam_edge", lab.size.name, rows, facts)


def _square(results: Sequence[dict[str, Any]]) -> float:
    return statistics.fmean(one["late_square"] for one in results)


def _late(results: Sequence[dict[str, Any]], column: int) -> float:
    return statistics.fmean(settled(one, column) for one in results)


def panels(runs: dict[str, tuple[list[dict[str, Any]], float]]) -> list[Panel]:
    """Both sharpnesses over the steps, geometric means over seeds; the second over its threshold at the nominal lr."""
    found = []
    for column, title in ((2, "sharpness"), (3, "preconditioned sharpness over 38 / lr")):
        series = {}
        for name, (results, lr) in runs.items():
            tables = [result["table"] for result in results]
            logs = [[math.log(max(entry[column], 1e-12)) for entry in at] for at in zip(*tables, strict=True)]
            scale = 1.0 if column == 2 else lr / THRESHOLD
            values = [scale * math.exp(statistics.fmean(at)) for at in logs]
            series[name] = ([entry[0] for entry in tables[0]], values)
        level = 1.0 if column == 3 else None
        found.append(Panel(title, "step", title, series, log_y=True, level=level))
    return found


if __name__ == "__main__":
    args = arguments("vradam_edge", None)
    lab = laboratory("vradam_edge", args)
    keep(program(lab, EDGES[args.size]), args.json)
