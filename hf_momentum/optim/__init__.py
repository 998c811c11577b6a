"""The update rules: one short file per method; `reference.py` has them slow and in the papers' notation."""

from hf_momentum.optim.ahb import AHBSGD, AHBAdam, AHBAdamW
from hf_momentum.optim.base import MomentumOptimizer
from hf_momentum.optim.critical import CriticalAdamW, CriticalSGD
from hf_momentum.optim.momentum_laws import MomentumSchedule
from hf_momentum.optim.tam import TAM, AdaTAM, AdaTAMW
from hf_momentum.optim.vradam import VRAdam, VRMomentum

__all__ = [
    "AHBSGD",
    "TAM",
    "AHBAdam",
    "AHBAdamW",
    "AdaTAM",
    "AdaTAMW",
    "CriticalAdamW",
    "CriticalSGD",
    "MomentumOptimizer",
    "MomentumSchedule",
    "VRAdam",
    "VRMomentum",
]
