"""TAM and AdaTAM of this package and of `pytorch_optimizer`, on gradients whose angle to the momentum is known.

python scripts/compare_public_tam.py                                             # print the table
python scripts/compare_public_tam.py --json                                      # print all figures as JSON
python scripts/compare_public_tam.py --output docs/comparison_public_tam.md      # also rewrite the table in the page

Each optimizer takes two steps that give it a chosen momentum m, then one step with a chosen gradient g. The damping
is read from what that step does to the momentum buffer: d = (m_new - beta m) / g, element by element. Smoothing is
off in both (gamma and decay_rate are 0), so d is a function of m and g alone, and the paper's is (1 + S) / 2.

`pytorch_optimizer` is no dependency of this package. Without it the script says how to install it and exits with 2.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_momentum.optim import TAM, AdaTAM
from hf_momentum.optim.reference import S_of

BETA = 0.9
SHAPES = [(768,), (768, 768), (64, 3, 3, 3), (1,), ()]
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HOW_TO_INSTALL = "pytorch_optimizer is not installed: pip install pytorch_optimizer"

Build = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Candidate:
    """An optimizer to be measured: how to build it with smoothing off, and which state holds its momentum."""

    build: Build
    buffer: str


@dataclass(frozen=True)
class Damping:
    """The damping of one step.

    Attributes:
        mean: mean over the elements.
        low: least element.
        high: largest element.
        by_norm: |m_new - beta m| / |g|.
        from_paper: largest |d - (1 + S) / 2| of an element.
        from_unsummed: largest |d - (1 + m_hat g_hat) / 2| of an element, m_hat and g_hat normalised along dimension 0.
    """

    mean: float
    low: float
    high: float
    by_norm: float
    from_paper: float
    from_unsummed: float


@dataclass(frozen=True)
class Row:
    """One shape and angle: what the paper's formula gives, and what each optimizer did."""

    shape: tuple[int, ...]
    angle: str
    cosine: float
    paper: float
    measured: dict[str, Damping]


# ---- the optimizers --------------------------------------------------------------------------------------------------


def our_candidates() -> dict[str, Candidate]:
    """TAM and AdaTAM of this package, with gamma 0: s = S."""

    def quietly(cls: type, **kwargs: object) -> Build:
        def build(params: list[Tensor]) -> torch.optim.Optimizer:
            with warnings.catch_warnings():
                # gamma 0 can lock the momentum in over many steps; here a single one is measured.
                warnings.filterwarnings("ignore", message=r".*below beta / \(2 - beta\)")
                return cls(params, lr=0.1, gamma=0.0, **kwargs)

        return build

    return {
        "TAM": Candidate(quietly(TAM, momentum=BETA), "momentum_buffer"),
        "AdaTAM": Candidate(quietly(AdaTAM, betas=(BETA, 0.999)), "exp_avg"),
    }


def public_candidates() -> dict[str, Candidate]:
    """TAM and AdaTAM of `pytorch_optimizer`, with decay_rate 0: s is the alignment of this step.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    import pytorch_optimizer as public

    return {
        "TAM": Candidate(lambda w: public.TAM(w, lr=0.1, momentum=BETA, decay_rate=0.0), "momentum_buffer"),
        "AdaTAM": Candidate(lambda w: public.AdaTAM(w, lr=0.1, betas=(BETA, 0.999), decay_rate=0.0), "exp_avg"),
    }


# ---- momentum, gradient and damping ----------------------------------------------------------------------------------


def gradients(m: Tensor, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Gradients at a known angle to `m`, with their names; a single element has only the two directions.

    Example:
        >>> m = torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> [name for name, _ in gradients(m, torch.Generator())]
        ['parallel, 3 m', 'opposed, -2 m', 'orthogonal', 'cosine 0.5']
    """
    yield "parallel, 3 m", 3 * m
    yield "opposed, -2 m", -2 * m
    if m.numel() == 1:
        return
    across = torch.randn(m.shape, generator=generator, dtype=m.dtype)
    # Twice, because the rounding of the first projection leaves a little of m.
    for _ in range(2):
        across = across - (across * m).sum() / (m * m).sum() * m
    yield "orthogonal", across
    # cos 60 degrees along m, sin 60 degrees across it
    yield "cosine 0.5", 0.5 * m / m.norm() + 0.75**0.5 * across / across.norm()


def elementwise_damping(candidate: Candidate, m: Tensor, g: Tensor) -> Tensor:
    """(m_new - beta m) / g of one step of the optimizer from momentum `m` with gradient `g`.

    Raises:
        RuntimeError: the two steps before it did not give the momentum `m`.
    """
    w = torch.nn.Parameter(torch.zeros_like(m))
    optimizer = candidate.build([w])

    def step(gradient: Tensor) -> Tensor:
        w.grad = gradient.clone()
        optimizer.step()
        return optimizer.state[w][candidate.buffer].clone()

    # A zero gradient leaves zero momentum, also where the buffer starts as a copy of the first gradient. Against zero
    # momentum the alignment is 0 and d is 1/2, so twice m gives m, up to eps.
    step(torch.zeros_like(m))
    before = step(2 * m)
    if not torch.allclose(before, m, rtol=1e-6, atol=0):
        raise RuntimeError(f"{type(optimizer).__name__}: the momentum before the measured step is not the chosen one")
    return (step(g) - BETA * before) / g


def summary(d: Tensor, m: Tensor, g: Tensor) -> Damping:
    """Mean and range of `d`, and how far it is from the paper's formula and from products that are never summed.

    Example:
        >>> summary(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
        Damping(mean=0.75, low=0.5, high=1.0, by_norm=0.5, from_paper=0.5, from_unsummed=0.5)
    """
    unsummed = (1 + normalize(m, dim=0) * normalize(g, dim=0)) / 2
    return Damping(
        mean=d.mean().item(),
        low=d.min().item(),
        high=d.max().item(),
        by_norm=((d * g).norm() / g.norm()).item(),
        from_paper=(d - (1 + S_of(m, g)) / 2).abs().max().item(),
        from_unsummed=(d - unsummed).abs().max().item(),
    )


def states(shapes: Sequence[tuple[int, ...]] = SHAPES) -> Iterator[tuple[tuple[int, ...], str, Tensor, Tensor]]:
    """Shape, name of the angle, momentum and gradient, in float64 and the same at every call."""
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        m = torch.randn(shape, generator=generator, dtype=torch.float64)
        for angle, g in gradients(m, generator):
            yield shape, angle, m, g


def compare(candidates: dict[str, Candidate], shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Row]:
    """Measure all candidates at all shapes and angles."""
    rows = []
    for shape, angle, m, g in states(shapes):
        cosine = S_of(m, g).item()
        measured = {name: summary(elementwise_damping(c, m, g), m, g) for name, c in candidates.items()}
        rows.append(Row(shape, angle, cosine, (1 + cosine) / 2, measured))
    return rows


# ---- the report ------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The versions of the packages that were compared, without the build tag of torch."""
    return {name: version(name).split("+")[0] for name in ("hf-momentum", "pytorch_optimizer", "torch")}


def fixed(x: float) -> str:
    """Four decimals, and no minus sign before a rounded zero.

    Example:
        >>> fixed(-1e-17), fixed(-0.5)
        ('0.0000', '-0.5000')
    """
    return f"{round(x, 4) + 0.0:.4f}"


def cell(d: Damping) -> str:
    """The mean, and the least and largest element in brackets unless they round to the mean.

    Example:
        >>> cell(Damping(0.5, 0.25, 0.75, 0.5, 0.0, 0.0)), cell(Damping(0.5, 0.5, 0.5, 0.5, 0.0, 0.0))
        ('0.5000 [0.2500, 0.7500]', '0.5000')
    """
    mean, low, high = fixed(d.mean), fixed(d.low), fixed(d.high)
    return mean if mean == low == high else f"{mean} [{low}, {high}]"


def table_line(cells: Sequence[str]) -> str:
    """One line of a Markdown table.

    Example:
        >>> table_line(["a", "b"])
        '| a | b |'
    """
    return f"| {' | '.join(cells)} |"


def markdown(rows: list[Row]) -> str:
    """The versions, the table of d, and the table of the largest differences from the two formulas."""
    names = list(rows[0].measured)
    lines = [", ".join(f"{name} {number}" for name, number in versions().items()) + ".", ""]
    lines += [table_line(["shape", "gradient", "S, paper", "d, paper", *names])]
    lines += ["|---|---|" + "---:|" * (2 + len(names))]
    for row in rows:
        cells = [cell(row.measured[name]) for name in names]
        lines.append(table_line([str(row.shape), row.angle, fixed(row.cosine), fixed(row.paper), *cells]))
    lines += [
        "",
        "Largest difference of an element of d, over all rows, from the paper's formula and from products that",
    ]
    lines += ["are never summed (m̂ and ĝ are m and g normalised along dimension 0):", ""]
    lines += [table_line(["optimizer", "from (1 + S) / 2", "from (1 + m̂ ĝ) / 2"]), "|---|---:|---:|"]
    for name in names:
        from_paper = max(row.measured[name].from_paper for row in rows)
        from_unsummed = max(row.measured[name].from_unsummed for row in rows)
        lines.append(table_line([name, f"{from_paper:.1e}", f"{from_unsummed:.1e}"]))
    return "\n".join(lines)


def replace_table(page: str, table: str) -> str:
    """`page` with what stands between the markers replaced by `table`.

    Example:
        >>> replace_table(f"Above. {BEGIN} old {END} Below.", "new")
        'Above. <!-- table: begin -->\\n\\nnew\\n\\n<!-- table: end --> Below.'

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs {BEGIN} and, after it, {END}, once each")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 2 if `pytorch_optimizer` is not installed."""
    summary_line, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary_line, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, metavar="PAGE", help="rewrite the table between the markers of this page"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON in place of the table")
    arguments = parser.parse_args(argv)
    try:
        public = public_candidates()
    except ModuleNotFoundError as error:
        if error.name != "pytorch_optimizer":
            raise
        print(HOW_TO_INSTALL, file=sys.stderr)
        return 2
    candidates = {f"{name}, ours": c for name, c in our_candidates().items()}
    candidates |= {f"{name}, pytorch_optimizer": c for name, c in public.items()}
    rows = compare(candidates)
    table = markdown(rows)
    if arguments.output:
        page = arguments.output.read_text(encoding="utf-8")
        arguments.output.write_text(replace_table(page, table), encoding="utf-8")
    if arguments.json:
        report = {"versions": versions(), "rows": [asdict(row) for row in rows]}
        print(json.dumps(report, indent=2))
    else:
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
