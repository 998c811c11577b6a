"""The registry of optimizer names and the small files that make other libraries know them."""

from hf_momentum.integrations.factory import create_optimizer, decay_groups, optimizer_cls_and_kwargs
from hf_momentum.integrations.registration import load_plugins, register
from hf_momentum.integrations.registry import OPTIMIZERS, Argument, OptimizerSpec, get_spec

__all__ = [
    "OPTIMIZERS",
    "Argument",
    "OptimizerSpec",
    "create_optimizer",
    "decay_groups",
    "get_spec",
    "load_plugins",
    "optimizer_cls_and_kwargs",
    "register",
]
