"""The papers behind the methods, for citing: one entry for each number that a `source` names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv.

    Attributes:
        key: what BibTeX calls it.
        arxiv: its number.
        year: of its first version.

    Example:
        >>> print(PAPERS["2603.28921"].bibtex())
        @misc{pasichnyk2026beta,
          title = {{Beta-Scheduling: Momentum from Critical Damping ...}},
          author = {Ivan Pasichnyk},
          year = {2026},
          eprint = {2603.28921},
          archivePrefix = {arXiv},
          url = {https://arxiv.org/abs/2603.28921}
        }
    """

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        """Where it is read."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self) -> str:
        """The entry for a bibliography."""
        fields = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(self.authors),
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
            "url": self.url,
        }
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{self.key},\n{lines}\n}}"


PAPERS: Mapping[str, Paper] = MappingProxyType(
    {
        paper.arxiv: paper
        for paper in (
            Paper(
                key="malviya2024torque",
                title="Torque-Aware Momentum",
                authors=(
                    "Pranshu Malviya",
                    "Goncalo Mordido",
                    "Aristide Baratin",
                    "Reza Babanezhad Harikandeh",
                    "Gintare Karolina Dziugaite",
                    "Razvan Pascanu",
                    "Sarath Chandar",
                ),
                year=2024,
                arxiv="2412.18790",
            ),
            Paper(
                key="sun2021training",
                title="Training Deep Neural Networks with Adaptive Momentum Inspired by the Quadratic Optimization",
                authors=("Tao Sun", "Huaming Ling", "Zuoqiang Shi", "Dongsheng Li", "Bao Wang"),
                year=2021,
                arxiv="2110.09057",
            ),
            Paper(
                key="pasichnyk2026beta",
                title="Beta-Scheduling: Momentum from Critical Damping as a Diagnostic and Correction Tool for Neural "
                "Network Training",
                authors=("Ivan Pasichnyk",),
                year=2026,
                arxiv="2603.28921",
            ),
            Paper(
                key="vaidhyanathan2025physics",
                title="A Physics-Inspired Optimizer: Velocity Regularized Adam",
                authors=("Pranav Vaidhyanathan", "Lucas Schorling", "Natalia Ares", "Michael A. Osborne"),
                year=2025,
                arxiv="2505.13196",
            ),
            Paper(
                key="hsieh2024careful",
                title="Careful with that Scalpel: Improving Gradient Surgery with an EMA",
                authors=(
                    "Yu-Guan Hsieh",
                    "James Thornton",
                    "Eugene Ndiaye",
                    "Michal Klein",
                    "Marco Cuturi",
                    "Pierre Ablin",
                ),
                year=2024,
                arxiv="2402.02998",
            ),
        )
    }
)

BLOOP = PAPERS["2402.02998"]
BETA_SCHEDULING = PAPERS["2603.28921"]


def paper_of(source: str) -> Paper:
    """The paper that a `source` such as "arXiv 2412.18790" names.

    Raises:
        KeyError: it names none that is listed here.

    Example:
        >>> paper_of("arXiv 2412.18790").title
        'Torque-Aware Momentum'
    """
    found = re.search(r"arXiv (\d{4}\.\d{5})", source)
    if found is None:
        raise KeyError(source)
    return PAPERS[found[1]]
