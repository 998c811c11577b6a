"""The update rules in the papers' notation: slow, tensor by tensor, in the dtype they are given. The truth.

Every function performs one step on lists of tensors and returns new ones. Nothing is shared with the fast
versions: no import of theirs, no tricks, so that the tests compare two independent writings of one formula.

Example:
    >>> w, m, s = tam([torch.ones(2)], [torch.ones(2)], [torch.zeros(2)], [torch.zeros(())],
    ...               lr=0.1, beta=0.9, gamma=0.9, eps=0.0)
    >>> w[0], m[0]
    (tensor([0.9500, 0.9500]), tensor([0.5000, 0.5000]))
"""

from math import sqrt

import torch
from torch import Tensor

Tensors = list[Tensor]


def flat(tensors: Tensors) -> Tensor:
    """All tensors as one vector.

    Example:
        >>> flat([torch.ones(1, 2), torch.tensor(3.0)])
        tensor([1., 1., 3.])
    """
    return torch.cat([x.reshape(-1) for x in tensors])


def S_of(m: Tensor, g: Tensor) -> Tensor:
    """S = <m, g> / (|m| |g|), 0 where either norm is 0.

    Example:
        >>> S_of(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0]))
        tensor(0.6000)
    """
    norms = torch.linalg.vector_norm(m) * torch.linalg.vector_norm(g)
    return (m * g).sum() / norms if norms > 0 else torch.zeros_like(norms)


def torque(m: Tensors, g: Tensors, s: Tensors, gamma: float, granularity: str) -> tuple[Tensors, Tensors]:
    """New s, and d = (1 + s) / 2 for each tensor; s has one element if global, else one per tensor.

    Example:
        >>> torque([torch.ones(2)], [torch.ones(2)], [torch.zeros(())], 0.5, "global")
        ([tensor(0.5000)], [tensor(0.7500)])
    """
    S = [S_of(flat(m), flat(g))] if granularity == "global" else [S_of(mi, gi) for mi, gi in zip(m, g, strict=True)]
    s = [gamma * si + (1 - gamma) * Si for si, Si in zip(s, S, strict=True)]
    d = [(1 + si) / 2 for si in s]
    return s, d * len(g) if granularity == "global" else d


def tam(
    w: Tensors,
    g: Tensors,
    m: Tensors,
    s: Tensors,
    *,
    lr: float,
    beta: float,
    gamma: float,
    eps: float,
    wd: float = 0.0,
    decoupled: bool = True,
    granularity: str = "global",
) -> tuple[Tensors, Tensors, Tensors]:
    """One step of TAM: the new w, m and s.

    Example:
        >>> tam([torch.ones(1)], [torch.ones(1)], [torch.zeros(1)], [torch.zeros(())], lr=1.0, beta=0.9, gamma=0.9,
        ...     eps=0.0)[0]
        [tensor([0.5000])]
    """
    if not decoupled:
        g = [gi + wd * wi for gi, wi in zip(g, w, strict=True)]
    s, d = torque(m, g, s, gamma, granularity)
    m = [beta * mi + (eps + di) * gi for mi, di, gi in zip(m, d, g, strict=True)]
    shrink = 1 - lr * wd if decoupled else 1
    w = [shrink * wi - lr * mi for wi, mi in zip(w, m, strict=True)]
    return w, m, s


def adatam(
    w: Tensors,
    g: Tensors,
    m: Tensors,
    v: Tensors,
    s: Tensors,
    t: int,
    *,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    gamma: float,
    torque_eps: float,
    wd: float = 0.0,
    decoupled: bool = True,
    ema: bool = False,
    bias_correction: bool = False,
    granularity: str = "global",
) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """One step t (from 1) of AdaTAM, and with decoupled decay of AdaTAMW: the new w, m, v and s.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> adatam([one], [one], [zero], [zero], [torch.zeros(())], 1, lr=1.0, b1=0.9, b2=0.99, eps=0.0, gamma=0.9,
        ...        torque_eps=0.0)[0]
        [tensor([-4.])]
    """
    if not decoupled:
        g = [gi + wd * wi for gi, wi in zip(g, w, strict=True)]
    s, d = torque(m, g, s, gamma, granularity)
    gain = 1 - b1 if ema else 1
    m = [b1 * mi + gain * (torque_eps + di) * gi for mi, di, gi in zip(m, d, g, strict=True)]
    v = [b2 * vi + (1 - b2) * gi**2 for vi, gi in zip(v, g, strict=True)]
    c1, c2 = (1 - b1**t, 1 - b2**t) if bias_correction else (1.0, 1.0)
    if decoupled:
        w = [(1 - lr * wd) * wi for wi in w]
    w = [wi - lr * (mi / c1) / (torch.sqrt(vi) / sqrt(c2) + eps) for wi, mi, vi in zip(w, m, v, strict=True)]
    return w, m, v, s
