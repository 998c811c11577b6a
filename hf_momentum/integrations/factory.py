"""Optimizers for loops without a Trainer: `create_optimizer("tam", model, lr=...)`."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_momentum.errors import InputError
from hf_momentum.integrations.registry import get_spec

# transformers' Trainer spares biases and normalisation layers from weight decay by the same patterns, so that a
# loop of one's own and a Trainer make the same groups.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def create_optimizer(
    name: str,
    model_or_params: nn.Module | Iterable[Any],
    *,
    lr: float,
    weight_decay: float | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Build a registered optimizer.

    Args:
        name: a registered name, such as "tam" (`hf-momentum optimizers` lists them).
        model_or_params: a model, whose trainable parameters are split into a group with weight decay and one
            without (biases and normalisation layers); or parameters or groups, which are taken as they are.
        lr: learning rate.
        weight_decay: None (default) for the optimizer's own default.
        **kwargs: the optimizer's further arguments.

    Returns:
        The optimizer, without any state yet.

    Raises:
        InputError: unknown name or argument, a value out of range, a model without trainable parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> optimizer = create_optimizer("tam", model, lr=0.1, weight_decay=0.01, gamma=0.95)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.01), (3, 0.0)]
    """
    spec = get_spec(name)
    kwargs["lr"] = lr
    if weight_decay is not None:
        kwargs["weight_decay"] = weight_decay
    spec.check(kwargs)
    if not isinstance(model_or_params, nn.Module):
        return spec.cls(model_or_params, **kwargs)
    groups = decay_groups(model_or_params)
    if not groups:
        raise InputError(f"{type(model_or_params).__name__} has no parameter that requires a gradient")
    return spec.cls(groups, **kwargs)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in one group to decay and one with `weight_decay` 0; empty ones left out.

    Example:
        >>> [len(group["params"]) for group in decay_groups(nn.Linear(2, 3))]
        [1, 1]
    """
    in_norm = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    decay, no_decay = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            spared = name in in_norm or _NO_DECAY.search(name.lower())
            (no_decay if spared else decay).append(param)
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def optimizer_cls_and_kwargs(
    name: str, *, lr: float, **kwargs: Any
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What `transformers.Trainer(optimizer_cls_and_kwargs=...)` takes: the public road, without any hook.

    Weight decay is the Trainer's own argument: it makes the groups.

    Raises:
        InputError: unknown name or argument, or a value out of range.

    Example:
        >>> cls, kwargs = optimizer_cls_and_kwargs("tam", lr=0.1, gamma=0.95)
        >>> cls.__name__, kwargs
        ('TAM', {'lr': 0.1, 'gamma': 0.95})
    """
    spec = get_spec(name)
    kwargs = {"lr": lr, **kwargs}
    spec.check(kwargs)
    return spec.cls, kwargs
