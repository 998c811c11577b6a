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


def beta_of(dg: Tensor, dw: Tensor, lr: float, delta: float, cap_root: bool) -> Tensor:
    """beta = clip((1 - sqrt(lr l))^2, 0, 1 - delta) with l = |dg| / |dw|, and 0 where dw is 0.

    Example:
        >>> beta_of(torch.tensor([2.0]), torch.tensor([0.5]), lr=0.01, delta=0.0, cap_root=False)
        tensor(0.6400)
    """
    norm = torch.linalg.vector_norm(dw)
    if norm == 0:
        return torch.zeros_like(norm)
    root = torch.sqrt(lr * torch.linalg.vector_norm(dg) / norm)
    if cap_root:
        root = torch.clamp(root, max=1.0)
    return torch.clamp((1 - root) ** 2, 0, 1 - delta)


def betas_of(dg: Tensors, dw: Tensors, granularity: str, lr: float, delta: float, cap_root: bool) -> Tensors:
    """One beta per tensor; all the same if global.

    Example:
        >>> betas_of([torch.ones(1)], [torch.ones(1)], "global", lr=0.25, delta=0.0, cap_root=False)
        [tensor(0.2500)]
    """
    if granularity == "global":
        return [beta_of(flat(dg), flat(dw), lr, delta, cap_root)] * len(dg)
    return [beta_of(a, b, lr, delta, cap_root) for a, b in zip(dg, dw, strict=True)]


def ahb_sgd(
    w: Tensors,
    g: Tensors,
    g_prev: Tensors,
    dw: Tensors,
    *,
    lr: float,
    delta: float,
    cap_root: bool = False,
    wd: float = 0.0,
    decoupled: bool = True,
    granularity: str = "global",
) -> tuple[Tensors, Tensors]:
    """One step of AHB-SGD: the new w and dw. For the first step of a tensor give g_prev = g and dw = 0.

    Example:
        >>> ahb_sgd([torch.ones(1)], [torch.ones(1)], [torch.ones(1)], [torch.zeros(1)], lr=0.5, delta=1e-3)[0]
        [tensor([0.5000])]
    """
    dg = [a - b for a, b in zip(g, g_prev, strict=True)]
    beta = betas_of(dg, dw, granularity, lr, delta, cap_root)
    if not decoupled:
        g = [gi + wd * wi for gi, wi in zip(g, w, strict=True)]
    dw = [bi * di - lr * gi for bi, di, gi in zip(beta, dw, g, strict=True)]
    shrink = 1 - lr * wd if decoupled else 1
    return [shrink * wi + di for wi, di in zip(w, dw, strict=True)], dw


def ahb_adam(
    w: Tensors,
    g: Tensors,
    g_prev: Tensors,
    dw: Tensors,
    m: Tensors,
    v: Tensors,
    product: Tensors,
    t: list[int],
    *,
    lr: float,
    b2: float,
    eps: float,
    delta: float,
    cap_root: bool = False,
    difference: str = "plain",
    wd: float = 0.0,
    decoupled: bool = True,
    granularity: str = "global",
) -> tuple[Tensors, Tensors, Tensors, Tensors, Tensors]:
    """One step of AHB-Adam: the new w, dw, m, v and product of betas. t counts each tensor's steps from 1.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> ahb_adam([one], [one], [one], [zero], [zero], [zero], [torch.ones(())], [1], lr=0.5, b2=0.9, eps=0.0,
        ...          delta=1e-3)[0]
        [tensor([0.5000])]
    """
    dg = [a - b for a, b in zip(g, g_prev, strict=True)]
    if difference == "preconditioned":
        D = [torch.sqrt(vi / (1 - b2 ** max(ti - 1, 1))) + eps for vi, ti in zip(v, t, strict=True)]
        dg = [x if ti == 1 else x / Di for x, Di, ti in zip(dg, D, t, strict=True)]
    beta = betas_of(dg, dw, granularity, lr, delta, cap_root)
    if not decoupled:
        g = [gi + wd * wi for gi, wi in zip(g, w, strict=True)]
    product = [bi * pi for bi, pi in zip(beta, product, strict=True)]
    m = [bi * mi + (1 - bi) * gi for bi, mi, gi in zip(beta, m, g, strict=True)]
    v = [b2 * vi + (1 - b2) * gi**2 for vi, gi in zip(v, g, strict=True)]
    dw = [
        -lr * (mi / (1 - pi)) / (torch.sqrt(vi / (1 - b2**ti)) + eps)
        for mi, pi, vi, ti in zip(m, product, v, t, strict=True)
    ]
    shrink = 1 - lr * wd if decoupled else 1
    return [shrink * wi + di for wi, di in zip(w, dw, strict=True)], dw, m, v, product


def mu_of(law: str, lr: float, L: float, low: float = 0.0, high: float = 0.99) -> float:
    """The critical laws.

    Example:
        >>> mu_of("critical", 0.01, 1.0), mu_of("critical_exact", 0.25, 1.0)
        (0.8, 0.25)
    """
    r = sqrt(lr * L)
    mu = {"critical": 1 - 2 * r, "critical_exact": (1 - r) ** 2, "critical_nesterov": (1 - r) / (1 + r)}[law]
    return max(low, min(mu, high))


def critical_sgd(
    w: Tensors, g: Tensors, m: Tensors, *, lr: float, law: str = "critical", L: float = 1.0, wd: float = 0.0
) -> tuple[Tensors, Tensors]:
    """One step of SGD with critically damped momentum and decoupled decay: the new w and m.

    Example:
        >>> critical_sgd([torch.ones(1)], [torch.ones(1)], [torch.ones(1)], lr=0.25)
        ([tensor([0.7500])], [tensor([1.])])
    """
    mu = mu_of(law, lr, L)
    m = [mu * mi + gi for mi, gi in zip(m, g, strict=True)]
    step = [gi + mu * mi for gi, mi in zip(g, m, strict=True)] if law == "critical_nesterov" else m
    return [(1 - lr * wd) * wi - lr * si for wi, si in zip(w, step, strict=True)], m


def critical_adamw(
    w: Tensors,
    g: Tensors,
    m: Tensors,
    v: Tensors,
    product: list[float],
    t: list[int],
    *,
    lr: float,
    b2: float,
    eps: float,
    law: str = "critical",
    L: float = 1.0,
    wd: float = 0.0,
) -> tuple[Tensors, Tensors, Tensors, list[float]]:
    """One step of AdamW with a critically damped b1: the new w, m, v and product of all b1.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> critical_adamw([one], [one], [zero], [zero], [1.0], [1], lr=0.25, b2=0.9, eps=0.0)[0]
        [tensor([0.7500])]
    """
    b1 = mu_of(law, lr, L)
    product = [b1 * pi for pi in product]
    m = [b1 * mi + (1 - b1) * gi for mi, gi in zip(m, g, strict=True)]
    v = [b2 * vi + (1 - b2) * gi**2 for vi, gi in zip(v, g, strict=True)]
    w = [
        (1 - lr * wd) * wi - lr * (mi / (1 - pi)) / (torch.sqrt(vi / (1 - b2**ti)) + eps)
        for wi, mi, pi, vi, ti in zip(w, m, product, v, t, strict=True)
    ]
    return w, m, v, product


def gates_of(x: Tensors, beta3: float, alpha1: float, scope: str, group: list[int] | None = None) -> Tensors:
    """lr_t / lr of each tensor: 1 / (1 + min(beta3 |x|^2, alpha1)), the norm over all, its group, or itself.

    Example:
        >>> gates_of([torch.tensor([1.0]), torch.tensor([1.0, 1.0])], 1.0, 10.0, "tensor")
        [tensor(0.5000), tensor(0.3333)]
    """
    n = len(x)
    piece = {"global": [0] * n, "group": group or [0] * n, "tensor": list(range(n))}[scope]
    squared = [(flat([x[j] for j in range(n) if piece[j] == piece[i]]) ** 2).sum() for i in range(n)]
    return [1 / (1 + torch.clamp(beta3 * s, max=alpha1)) for s in squared]


def vradam(
    w: Tensors,
    g: Tensors,
    m: Tensors,
    v: Tensors,
    t: list[int],
    *,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    beta3: float,
    alpha1: float,
    wd: float = 0.0,
    scope: str = "global",
    norm_of: str = "momentum",
    group: list[int] | None = None,
) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """One step of VRAdam: the new w, m, v, and lr_t / lr of each tensor.

    t holds each tensor's step from 1, and `group` its group's number, for the norm over groups.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> w, m, v, ratio = vradam([one], [one], [zero], [zero], [1], lr=0.5, b1=0.0, b2=0.99, eps=0.0, beta3=1.0,
        ...                         alpha1=10.0)
        >>> w, ratio
        ([tensor([0.7500])], [tensor(0.5000)])
    """
    m = [b1 * mi + (1 - b1) * gi for mi, gi in zip(m, g, strict=True)]
    v = [b2 * vi + (1 - b2) * gi**2 for vi, gi in zip(v, g, strict=True)]
    m_hat = [mi / (1 - b1**ti) for mi, ti in zip(m, t, strict=True)]
    v_hat = [vi / (1 - b2**ti) for vi, ti in zip(v, t, strict=True)]
    u = [mi / (torch.sqrt(vi) + eps) for mi, vi in zip(m_hat, v_hat, strict=True)]
    ratio = gates_of(m if norm_of == "momentum" else u, beta3, alpha1, scope, group)
    lr_t = [lr * k for k in ratio]
    w = [wi * (1 - a * wd) - a * ui for wi, a, ui in zip(w, lr_t, u, strict=True)]
    return w, m, v, ratio


def vrmomentum(
    w: Tensors,
    g: Tensors,
    m: Tensors,
    *,
    lr: float,
    b: float,
    beta3: float,
    alpha1: float,
    wd: float = 0.0,
    scope: str = "global",
    group: list[int] | None = None,
) -> tuple[Tensors, Tensors, Tensors]:
    """One step of VRMomentum: the new w and m, and lr_t / lr of each tensor.

    Example:
        >>> w, m, ratio = vrmomentum([torch.ones(1)], [torch.ones(1)], [torch.zeros(1)], lr=1.0, b=0.5, beta3=4.0,
        ...                          alpha1=10.0)
        >>> w, m, ratio
        ([tensor([0.7500])], [tensor([0.5000])], [tensor(0.5000)])
    """
    m = [b * mi + (1 - b) * gi for mi, gi in zip(m, g, strict=True)]
    ratio = gates_of(m, beta3, alpha1, scope, group)
    lr_t = [lr * k for k in ratio]
    w = [wi * (1 - a * wd) - a * mi for wi, a, mi in zip(w, lr_t, m, strict=True)]
    return w, m, ratio
