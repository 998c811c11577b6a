"""Gradient surgery: a main objective and auxiliary ones, on reduced gradients, in any layout, for any optimizer."""

from typing import Any, Protocol

import torch

from hf_momentum.sharding import GradientPiece, ReducedGradients
from hf_momentum.surgery.baselines import Combination
from hf_momentum.surgery.bloop import Bloop
from hf_momentum.surgery.measured import Averaged
from hf_momentum.surgery.noise import SURVIVES, TOLERATED, survives
from hf_momentum.surgery.passes import Passes, absorb_, project_and_lend_
from hf_momentum.surgery.regulariser import Regulariser
from hf_momentum.surgery.settings import SURGERIES, Settings, weights_of

__all__ = [
    "SURGERIES",
    "SURVIVES",
    "TOLERATED",
    "Bloop",
    "Combination",
    "Passes",
    "Regulariser",
    "Settings",
    "Surgery",
    "absorb_",
    "make_surgery",
    "project_and_lend_",
    "survives",
    "weights_of",
]


class Surgery(Protocol):
    """What a trainer needs of any surgery; see `Bloop`."""

    measured: Averaged

    @property
    def sequence(self) -> list[int]:
        """The order in which the objectives' backward passes are to be made; 0 is the main one."""

    def weight(self, objective: int) -> float:
        """What an objective's loss is multiplied by."""

    def after(self, objective: int, gradients: ReducedGradients) -> bool:
        """Work an objective's gradient in; whether it is finite."""

    def give(self, objective: int, pieces: list[GradientPiece]) -> None:
        """Hand in an auxiliary gradient that no backward pass made."""

    def noise(self) -> dict[str, float]:
        """What is known of the noise."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from them."""


def make_surgery(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> Surgery:
    """The surgery that `settings` name.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> type(make_surgery(torch.optim.SGD([w]), Settings(lam=(0.1,), surgery="mixed"), steps=10)).__name__
        'Combination'
    """
    return Bloop(optimizer, settings, steps) if settings.surgery == "bloop" else Combination(settings)
