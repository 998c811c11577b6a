"""The one registry of optimizer names: what `--optim`, `create_optimizer` and the command line offer."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_type_hints

import torch

from hf_momentum.errors import InputError
from hf_momentum.errors import nearest as nearest  # its old place
from hf_momentum.optim import (
    AHBSGD,
    TAM,
    AdaTAM,
    AdaTAMW,
    AHBAdam,
    AHBAdamW,
    CriticalAdamW,
    CriticalSGD,
    VRAdam,
    VRMomentum,
)

# Set by the learning-rate and weight-decay arguments that every caller has, so not offered a second time.
_SET_ELSEWHERE = ("self", "params", "lr", "weight_decay")


@dataclass(frozen=True)
class Argument:
    """One hyperparameter of an optimizer: its name, its type as annotated, and its default."""

    name: str
    type: Any
    default: Any

    def __str__(self) -> str:
        kind = self.type.__name__ if isinstance(self.type, type) else str(self.type).replace("typing.", "")
        return f"{self.name}: {kind} = {self.default!r}"


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer under its `--optim` name.

    Attributes:
        name: what users type.
        cls: the optimizer class.
        summary: one line for lists.
        source: where the method comes from.
        adam_arguments: whether `--adam_beta1`, `--adam_beta2` and `--adam_epsilon` mean its `betas` and `eps`; an
            optimizer whose first beta is not a constant has `beta2` alone.

    Example:
        >>> OPTIMIZERS["tam"].cls.__name__
        'TAM'
        >>> print(OPTIMIZERS["tam"].arguments["gamma"])
        gamma: float = 0.9
    """

    name: str
    cls: type[torch.optim.Optimizer]
    summary: str
    source: str
    adam_arguments: bool

    @property
    def arguments(self) -> dict[str, Argument]:
        """The hyperparameters beside lr and weight_decay, read off the constructor."""
        return arguments_of(self.cls.__init__, without=_SET_ELSEWHERE)

    def check(self, kwargs: Mapping[str, Any]) -> None:
        """Raise `InputError` unless the optimizer can be built with `kwargs`.

        Example:
            >>> OPTIMIZERS["tam"].check({"gamma": 1.5})
            Traceback (most recent call last):
            ...
            hf_momentum.errors.InputError: TAM: gamma must be a number in [0, 1), got 1.5; public code uses 0.9
        """
        unknown = sorted(set(kwargs) - set(self.arguments) - {"lr", "weight_decay"})
        if unknown:
            raise InputError(
                f"{self.name} has no argument {unknown[0]!r}{nearest(unknown[0], self.arguments)}. "
                f"Accepted: {self.accepted()}"
            )
        try:
            self.cls([torch.zeros(1, requires_grad=True)], **kwargs)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    def accepted(self) -> str:
        """All arguments with type and default, in one line."""
        return "; ".join(str(argument) for argument in self.arguments.values())


def arguments_of(function: Any, without: Iterable[str]) -> dict[str, Argument]:
    """The parameters of a function that has defaults and annotations, but for those named in `without`.

    Example:
        >>> def f(a: int = 1, b: float = 2.0): ...
        >>> print(arguments_of(f, without=["a"])["b"])
        b: float = 2.0
    """
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    return {name: Argument(name, hints[name], parameters[name].default) for name in parameters if name not in without}


def _table(*specs: OptimizerSpec) -> dict[str, OptimizerSpec]:
    table: dict[str, OptimizerSpec] = {}
    for spec in specs:
        _put(table, spec)
    return table


def _put(table: dict[str, OptimizerSpec], spec: OptimizerSpec) -> None:
    if spec.name in table:
        raise ValueError(f"two optimizers are registered under the name {spec.name!r}")
    table[spec.name] = spec


_TABLE = _table(
    OptimizerSpec(
        name="tam",
        cls=TAM,
        summary="Heavy ball whose gradients are damped by their angle to the momentum (torque-aware momentum).",
        source="arXiv 2412.18790",
        adam_arguments=False,
    ),
    OptimizerSpec(
        name="adatam",
        cls=AdaTAM,
        summary="Torque-aware momentum with Adam's second moment.",
        source="arXiv 2412.18790",
        adam_arguments=True,
    ),
    OptimizerSpec(
        name="adatamw",
        cls=AdaTAMW,
        summary="AdaTAM with decoupled weight decay, as AdamW is to Adam.",
        source="arXiv 2412.18790",
        adam_arguments=True,
    ),
    OptimizerSpec(
        name="ahb_sgd",
        cls=AHBSGD,
        summary="Heavy ball whose momentum follows from the curvature that successive gradients see.",
        source="arXiv 2110.09057",
        adam_arguments=False,
    ),
    OptimizerSpec(
        name="ahb_adam",
        cls=AHBAdam,
        summary="Adam whose first beta is the adaptive heavy ball's, in every step.",
        source="arXiv 2110.09057",
        adam_arguments=True,
    ),
    OptimizerSpec(
        name="ahb_adamw",
        cls=AHBAdamW,
        summary="AHBAdam with decoupled weight decay.",
        source="arXiv 2110.09057",
        adam_arguments=True,
    ),
    OptimizerSpec(
        name="critical_sgd",
        cls=CriticalSGD,
        summary="SGD whose momentum follows the learning rate: 1 - 2 sqrt(lr), critical damping.",
        source="arXiv 2603.28921",
        adam_arguments=False,
    ),
    OptimizerSpec(
        name="critical_adamw",
        cls=CriticalAdamW,
        summary="AdamW whose first beta follows the learning rate in the same way (ours).",
        source="arXiv 2603.28921",
        adam_arguments=True,
    ),
    OptimizerSpec(
        name="vradam",
        cls=VRAdam,
        summary="AdamW whose learning rate falls with the norm of the momentum (velocity regularisation).",
        source="arXiv 2505.13196",
        adam_arguments=True,
    ),
    OptimizerSpec(
        name="vrmomentum",
        cls=VRMomentum,
        summary="The same without the preconditioner: averaged momentum whose learning rate falls with its norm.",
        source="arXiv 2505.13196",
        adam_arguments=False,
    ),
)

OPTIMIZERS: Mapping[str, OptimizerSpec] = MappingProxyType(_TABLE)
"""All names, ours and those that `register` has added, as a view that cannot be written to."""


def add(spec: OptimizerSpec) -> None:
    """Put an optimizer into the table; `registration.register` checks it first and tells transformers.

    Raises:
        ValueError: the name is taken.
    """
    _put(_TABLE, spec)


def get_spec(name: str) -> OptimizerSpec:
    """The optimizer registered under `name`.

    Raises:
        InputError: there is none; the message gives the nearest names and all of them.

    Example:
        >>> get_spec("tamm")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: unknown optimizer 'tamm' (did you mean 'tam' ...?). Known: tam, ...
    """
    if name not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {name!r}{nearest(name, OPTIMIZERS)}. Known: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]
