"""Look at a model's gradients and leave no trace: weights, buffers, gradients, flags and random states as they were."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module, differentiated: Sequence[Tensor] = ()) -> Iterator[None]:
    """Put a model into evaluation mode, with gradients for some of its parameters alone, and put everything back.

    Gradients that the parameters had are set aside without a copy, and are there again afterwards, also if an error is
    raised inside. Buffers, which a forward pass may change even in evaluation mode, are copied. Weights are not: no
    forward or backward pass moves them.

    Args:
        model: not wrapped; what wraps it may be made and dropped inside.
        differentiated: the parameters that get gradients.

    Example:
        >>> layer = nn.Linear(2, 1).train()
        >>> with untouched(layer, [layer.weight]):
        ...     layer(torch.ones(1, 2)).sum().backward()
        ...     layer.training, layer.weight.grad is not None, layer.bias.grad is not None
        (False, True, False)
        >>> layer.training, layer.weight.grad, layer.bias.requires_grad
        (True, None, True)
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = torch.get_device_module(accelerator).get_rng_state_all() if accelerator is not None else None
    wanted = {id(parameter) for parameter in differentiated}
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required, gradient in parameters:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices is not None:
            torch.get_device_module(accelerator).set_rng_state_all(devices)
