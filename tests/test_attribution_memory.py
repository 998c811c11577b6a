"""A diagnosis of many examples takes no more memory than one of few: one gradient, and sketches of 64 stretches."""

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hf_momentum.diagnosis.attribution import Gradients, collect
from hf_momentum.sharding import WholeGradients

INPUTS, WIDTH = 30, 400
# The weights of `network` in bytes, and what the sketches of 64 stretches may take: twice, when they are put in a row.
GRADIENT = 4 * (INPUTS * WIDTH + WIDTH + WIDTH * 3 + 3)
SKETCHES = 2 * 64 * 2 * 1021 * 8
SIGNS = 256 * 1021 * 12  # drawn as whole numbers, kept in float32


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive, each storage once, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return found

    def gone(self, size: int) -> None:
        self.now -= size


class Hoarding(WholeGradients):
    """A fault: it keeps the gradient of every batch."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.kept: list[list[torch.Tensor]] = []

    def keep(self) -> None:
        self.kept.append([piece.grad.clone() for piece in self.pieces(lambda holder: False)])


def collected(batches: int, kind: type[WholeGradients] = WholeGradients) -> tuple[int, Gradients]:
    """The peak of live bytes while the gradient of so many batches of one example is collected."""
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    inputs, labels = torch.randn(400, INPUTS), torch.randint(3, (400,))  # as large for few batches as for many
    gradients = kind(torch.optim.SGD(model.parameters(), lr=0.0))

    def loss_of(batch: int) -> tuple[torch.Tensor, int]:
        return functional.cross_entropy(model(inputs[batch : batch + 1]), labels[batch : batch + 1]), 1

    with Live() as live:
        found = collect(range(batches), loss_of, gradients, [0, 0, 1, 1], 2)
    return live.peak, found


def test_live_bytes_are_counted():
    with Live() as live:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1
        del first
        assert (live.now, live.peak) == (4000, 8000)
        del second
        assert live.now == 0


def test_ten_times_the_batches_take_no_more_memory():
    """Up to 64 batches each has a sketch; beyond that, 100, 200 and 400 batches all come to 50 stretches."""
    few, _ = collected(20)
    more, one = collected(100)
    many, two = collected(200)
    most, three = collected(400)
    assert [len(found.counts) for found in (one, two, three)] == [50, 50, 50]
    assert more == many == most
    assert many - few <= SKETCHES
    assert few <= SKETCHES + SIGNS + 10 * GRADIENT


@pytest.mark.parametrize("batches", [100, 400])
def test_a_gradient_kept_of_every_batch_would_be_seen(batches):
    assert collected(batches, Hoarding)[0] - collected(100)[0] > 0.8 * batches * GRADIENT
