"""The update rules: one short file per method; `reference.py` has them slow and in the papers' notation."""

from hf_momentum.optim.base import MomentumOptimizer
from hf_momentum.optim.tam import TAM, AdaTAM, AdaTAMW

__all__ = ["TAM", "AdaTAM", "AdaTAMW", "MomentumOptimizer"]
