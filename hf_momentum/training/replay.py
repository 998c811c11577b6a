"""Replay: auxiliary examples among the main ones, the oldest remedy against forgetting."""

from typing import Any, Protocol

import numpy as np
import torch

from hf_momentum.errors import InputError


class Examples(Protocol):
    """Anything with a length and examples by their position: a `datasets.Dataset`, a list, a torch Dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class ReplayMixture(torch.utils.data.Dataset[Any]):
    """Main examples, of which each gives its place to an auxiliary one with probability `share`.

    Whether position i is auxiliary follows from (seed, i) alone: it is so when the i-th number drawn uniformly from
    [0, 1) is below `share`, so that a larger share keeps the auxiliary positions of a smaller one. The k-th auxiliary
    position holds example permutation[k mod len(auxiliary)] of a seeded permutation: every auxiliary example is seen
    before one comes again. Nothing is drawn while examples are read, so workers and processes agree, and a second pass
    is like the first.

    Args:
        main: examples by position; those that give way are not seen at all.
        auxiliary: examples by position.
        share: expected share of auxiliary examples, in [0, 1]; lam / (1 + lam) weighs them like `mixed` with lam.
        seed: of the positions and the permutation.

    Raises:
        InputError: the share is not in [0, 1], or one of the two holds no example.

    Example:
        >>> mixture = ReplayMixture(["main"] * 8, ["first", "second"], share=0.3, seed=0)
        >>> [mixture[i] for i in range(len(mixture))]
        ['main', 'main', 'main', 'first', 'main', 'main', 'second', 'main']
    """

    def __init__(self, main: Examples, auxiliary: Examples, share: float, seed: int) -> None:
        if not 0 <= share <= 1:
            raise InputError(f"share must be in [0, 1], got {share}; for a weight lam it is lam / (1 + lam)")
        for name, examples in (("main", main), ("auxiliary", auxiliary)):
            if len(examples) == 0:
                raise InputError(f"the {name} data of a replay mixture hold no example")
        self.main, self.auxiliary = main, auxiliary
        positions, order = np.random.SeedSequence(seed).spawn(2)
        self._places = np.flatnonzero(np.random.default_rng(positions).random(len(main)) < share)
        self._order = np.random.default_rng(order).permutation(len(auxiliary))

    def __len__(self) -> int:
        """As many as there are main examples."""
        return len(self.main)

    def __getitem__(self, index: int) -> Any:
        """The main example at this position, or the auxiliary one that stands there instead."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"position {index} of {len(self)} examples")
        index %= len(self)
        count = int(np.searchsorted(self._places, index))
        if count < len(self._places) and self._places[count] == index:
            return self.auxiliary[int(self._order[count % len(self._order)])]
        return self.main[index]
