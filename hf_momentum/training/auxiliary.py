"""Batches of auxiliary examples whose order depends on nothing but a seed and how many examples came before."""

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_momentum.errors import InputError


class GlobalOrder:
    """The indices of an endless walk over a dataset: one permutation after another, cut into per-process batches.

    Sample number s of all processes together is the same whatever the number of processes: a micro-batch of all of them
    is a stretch of the walk, and each process takes its part of the stretch.

    Args:
        length: number of examples.
        batch: examples per process and micro-batch.
        processes, process: how many there are, and which this is.
        seed: of the permutations; each pass has another one.
        shuffled: False walks in the dataset's own order.
        start: samples of all processes that came before.

    Example:
        >>> one = GlobalOrder(5, batch=4, processes=1, process=0, seed=0, shuffled=True)
        >>> halves = [GlobalOrder(5, batch=2, processes=2, process=p, seed=0, shuffled=True) for p in (0, 1)]
        >>> first, *parts = (next(iter(order)) for order in (one, *halves))
        >>> first == parts[0] + parts[1]
        True
    """

    def __init__(
        self, length: int, batch: int, processes: int, process: int, seed: int, shuffled: bool, start: int = 0
    ) -> None:
        self.length, self.batch, self.processes, self.process = length, batch, processes, process
        self.seed, self.shuffled, self.start = seed, shuffled, start
        self._pass: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of this process, without end."""
        at = self.start + self.process * self.batch
        while True:
            yield [self.index(sample) for sample in range(at, at + self.batch)]
            at += self.processes * self.batch

    def index(self, sample: int) -> int:
        """The example that sample number `sample` is."""
        number, place = divmod(sample, self.length)
        if not self.shuffled:
            return place
        if self._pass[0] != number:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            self._pass = (number, torch.randperm(self.length, generator=generator).tolist())
        return self._pass[1][place]


def auxiliary_loader(
    dataset: Dataset[Any],
    collator: Callable[[list[Any]], Any],
    order: GlobalOrder,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A loader of one auxiliary dataset in a global order.

    Example:
        >>> order = GlobalOrder(3, batch=2, processes=1, process=0, seed=0, shuffled=False)
        >>> next(iter(auxiliary_loader([1, 2, 3], torch.tensor, order)))
        tensor([1, 2])
    """
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=pin_memory,  # type: ignore[arg-type]
    )


def check_auxiliary(name: str, dataset: Any) -> None:
    """Refuse a dataset that cannot be walked in a global order.

    Raises:
        InputError: it is empty, or has no length.

    Example:
        >>> check_auxiliary("code", [])
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: auxiliary dataset 'code' is empty; give it examples, or leave it out
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise InputError(
            f"auxiliary dataset {name!r} is a stream ({type(dataset).__name__}); its order would depend on the number "
            "of processes. Load it with streaming=False"
        )
    if len(dataset) == 0:
        raise InputError(f"auxiliary dataset {name!r} is empty; give it examples, or leave it out")


def named(given: Any, names: Sequence[str], default: Any) -> list[Any]:
    """One value for each name, from a dictionary by name, one for all, or None for `default`.

    Example:
        >>> named({"a": 1}, ["a", "b"], default=0), named(None, ["a"], default=0)
        ([1, 0], [0])
    """
    if isinstance(given, dict):
        return [given.get(name, default) for name in names]
    return [default if given is None else given] * len(names)
