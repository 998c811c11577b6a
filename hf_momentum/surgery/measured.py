"""Numbers that a surgery reports: averaged on the device, read once when they are logged."""

import torch
from torch import Tensor


class Averaged:
    """Means of 0-dim tensors by name, over what was added since the last `read`.

    Example:
        >>> measured = Averaged()
        >>> for value in (1.0, 2.0):
        ...     measured.add("aux_loss", torch.tensor(value))
        >>> measured.read(), measured.read()
        ({'aux_loss': 1.5}, {})
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Take one more value in."""
        value = value.detach().double() if value.device.type != "mps" else value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means; waits for the device once, and begins anew."""
        if not self._sums:
            return {}
        values = torch.stack([self._sums[name] / self._counts[name] for name in self._sums]).tolist()
        found = dict(zip(self._sums, values, strict=True))
        self._sums, self._counts = {}, {}
        return found
