"""Gradient surgery: a main and an auxiliary gradient made into one."""

from hf_momentum.surgery.passes import Passes, absorb_, project_and_lend_

__all__ = ["Passes", "absorb_", "project_and_lend_"]
