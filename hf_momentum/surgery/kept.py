"""Tensors that a surgery keeps for every parameter, carried by the optimizer's state.

There they are cut like the parameters, saved in every checkpoint of every layout, and loaded again bit for bit. Before
an optimizer's first step its state must stay empty (Adam takes an empty dictionary as the sign of it), so until then
the tensors wait here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_momentum.sharding import GradientPiece


class Kept:
    """Named tensors shaped like the optimizer's own, in `optimizer.state[holder][name]` after its first step.

    Args:
        optimizer: the innermost one, whose `step` is called.
        dtypes: dtype of each name; float64 tensors have all of them in float64.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([w])
        >>> kept = Kept(optimizer, {"bloop_ema": torch.float32})
        >>> kept.get("bloop_ema", w), kept.make("bloop_ema", w)
        (None, tensor([0., 0.]))
        >>> w.grad = torch.ones(2)
        >>> optimizer.step()
        >>> sorted(optimizer.state[w])
        ['bloop_ema', 'exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(self, optimizer: torch.optim.Optimizer, dtypes: dict[str, torch.dtype]) -> None:
        self.dtypes = dtypes
        self._optimizer = optimizer
        self._waiting: dict[str, dict[Tensor, Tensor]] = {name: {} for name in dtypes}
        self._cut: dict[tuple[str, int, int | None], tuple[Tensor, Tensor]] = {}
        self._loading: dict[str, Any] = {}
        optimizer.register_step_post_hook(self._hand_over)
        optimizer.register_load_state_dict_pre_hook(self._before_loading)
        optimizer.register_load_state_dict_post_hook(self._after_loading)

    def get(self, name: str, holder: Tensor) -> Tensor | None:
        """What is kept for a holder; None before anything is."""
        found = self._waiting[name].get(holder)
        if found is None and holder in self._optimizer.state:
            found = self._optimizer.state[holder].get(name)
        return found

    def make(self, name: str, holder: Tensor, value: Tensor | None = None) -> Tensor:
        """What is kept for a holder, begun as a copy of `value`, or as zeros."""
        found = self.get(name, holder)
        if found is None:
            like = holder.detach() if value is None else value.detach()
            dtype = like.dtype if like.dtype == torch.float64 else self.dtypes[name]
            found = torch.zeros_like(like, dtype=dtype) if value is None else like.to(dtype, copy=True)
            self._waiting[name][holder] = found
        return found

    def of(self, name: str, pieces: Sequence[GradientPiece]) -> list[Tensor]:
        """The part that belongs to each piece; begun as zeros."""
        return [self._part(name, piece) for piece in pieces]

    def _part(self, name: str, piece: GradientPiece) -> Tensor:
        whole = self.make(name, piece.holder)
        key = (name, id(piece.holder), piece.piece.start)
        known = self._cut.get(key)
        if known is None or known[0] is not whole:  # the same object every time lets a pass know its list again
            known = (whole, piece.piece.of(whole))
            self._cut[key] = known
        return known[1]

    def _hand_over(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A holder that has just been stepped without anything kept for it: sharded checkpoints are loaded into
        # whatever state one step on zero gradients has made, so it must have all its tensors.
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for name in self.dtypes:
            for holder in stepped:
                optimizer.state[holder][name] = self.make(name, holder)
                self._waiting[name].pop(holder, None)

    def _before_loading(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        self._loading = state_dict

    def _after_loading(self, optimizer: torch.optim.Optimizer) -> None:
        # torch casts every floating state to its parameter's dtype, which would round what is kept for bf16 weights.
        saved = [key for group in self._loading["param_groups"] for key in group["params"]]
        holders = [holder for group in optimizer.param_groups for holder in group["params"]]
        for key, holder in zip(saved, holders, strict=True):
            state = self._loading["state"].get(key, {})
            for name in self.dtypes.keys() & state.keys():
                if optimizer.state[holder][name].dtype != state[name].dtype:
                    optimizer.state[holder][name] = state[name].to(holder.device, copy=True)
        self._loading = {}
        self._waiting = {name: {} for name in self.dtypes}
        self._cut = {}
