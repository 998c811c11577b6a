"""Bloop: what a main objective learns is kept, and an auxiliary one gets the orthogonal rest (arXiv 2402.02998).

    d = g_main + lam (g_aux - <g_aux, e> / |e|^2 e)         one projection over the whole model
    w = optimizer(d)
    e = (1 - rho) e + rho g_main

e is an average of main gradients, from before this batch; the two gradients come from independent batches. Several
auxiliaries g_1, g_2, ... in order of priority have averages of their own, but for the last, and

    d = g_0 + sum_k lam_k pi(g_k; span(e_0, ..., e_{k-1})),        e_j = (1 - rho) e_j + rho g_j

with pi the orthogonal rest, g_0 the main gradient. `reference.py` has the same in a few lines of numpy.

One extra buffer per average is all that this needs. Objectives are run from the last auxiliary to the main one into
the same gradient buffer b. With P what the lower ones have left there, e_j is lent P before the backward pass of
objective j and absorbs the whole buffer after it, so that P cancels:

    e_j = (1 - rho) e_j - (rho / lam_j) P;    b = P + lam_j g_j;    e_j = e_j + (rho / lam_j) b

and b is projected on the span of e_0, ..., e_{j-1}, to which P is orthogonal already. The main gradient is thus never
alone in memory: it is rounded as in a plain sum of the two, and its norm, for the noise estimate, is measured on a
sample (`noise.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_momentum.errors import InputError
from hf_momentum.kernels import seeds
from hf_momentum.sharding import GradientPiece, ReducedGradients, total
from hf_momentum.surgery.combination import projection
from hf_momentum.surgery.kept import Kept
from hf_momentum.surgery.measured import Averaged
from hf_momentum.surgery.noise import Noise, Sample, added, fitting_rho, sample
from hf_momentum.surgery.passes import Passes
from hf_momentum.surgery.products import Products, products
from hf_momentum.surgery.settings import Settings
from hf_momentum.surgery.taken import aligned

_LEAST_RHO, _LARGEST_RHO = 1e-4, 0.1  # of rho="auto"
_EVERY = 4  # the norm of what was added to a buffer is measured at one step in four


@dataclass
class _Step:
    """What one update has seen so far.

    Attributes:
        rho: the rate of this update.
        done: objectives whose gradients are in the buffer.
        before: <e_i, b> before the last backward pass, where b was not orthogonal to the e_i.
        sample: of b before the last backward pass.
        old_average: |e_0|^2 before this batch.
        taken: gradients that were taken out of the buffer, by objective.
    """

    rho: Tensor | float
    done: list[int] = field(default_factory=list)
    before: Tensor | None = None
    sample: Sample | None = None
    old_average: Tensor | None = None
    taken: dict[int, list[GradientPiece]] = field(default_factory=dict)


class Bloop:
    """The surgery on reduced gradients; knows nothing of models, losses and trainers.

    Whoever trains runs the objectives in the order of `sequence` (0 is the main one), each loss multiplied by its
    weight, and calls `after` when an objective's gradient is reduced; then the optimizer steps.

    Args:
        optimizer: the innermost optimizer, which will step; its state carries the averages.
        settings: lam, rho, order, init, dtype, metric, and whether gradients are kept apart (`intact`).
        steps: planned length of the run; rho="auto" does not average over more than a tenth of it.

    Raises:
        InputError: an auxiliary has weight 0.

    State: `bloop_ema` (for several auxiliaries also `bloop_ema_1`, ...) per parameter in the optimizer's state; a few
    numbers in `state_dict()`.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> from hf_momentum.sharding import WholeGradients
        >>> bloop, gradients = Bloop(optimizer, Settings(lam=(1.0,), rho=1.0), steps=2), WholeGradients(optimizer)
        >>> for _ in range(2):
        ...     w.grad = None
        ...     for objective in bloop.sequence:
        ...         loss = (w[0], 5 * w[0] + 5 * w[1])[objective]
        ...         loss.backward()
        ...         _ = bloop.after(objective, gradients)
        >>> w.grad
        tensor([1., 5.])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> None:
        if 0 in settings.lam:
            raise InputError("lam holds 0: an auxiliary objective without weight; leave it out")
        self.settings, self.steps = settings, steps
        self.auxiliaries = len(settings.lam)
        self.names = [f"bloop_ema_{j}" if j else "bloop_ema" for j in range(self.auxiliaries)]
        self._kept = Kept(optimizer, dict.fromkeys(self.names, settings.dtype))
        self._optimizer = optimizer
        self._passes = Passes()
        self._noise = Noise()
        self._time = 0
        self._step: _Step | None = None
        self._rho_now: Tensor | float = settings.start_rho if settings.rho == "auto" else float(settings.rho)
        self.measured = Averaged()

    @property
    def sequence(self) -> list[int]:
        """The order in which the objectives' backward passes are to be made; 0 is the main one."""
        upwards = list(range(self.auxiliaries + 1))
        return upwards if self.settings.order == "ema_first" and not self.settings.intact else upwards[::-1]

    def weight(self, objective: int) -> float:
        """What an objective's loss is multiplied by."""
        return 1.0 if objective == 0 else self.settings.lam[objective - 1]

    @torch.no_grad()
    def after(self, objective: int, gradients: ReducedGradients) -> bool:
        """Work an objective's gradient in, which has just been added to the buffers and reduced.

        Returns:
            Whether it is finite. If it is not, the averages have not been written to; but one that was lent to before
            (see above) stays so, unless gradients are kept `intact`: whoever has not asked for that must stop.
        """
        if self._step is None:
            self._step = _Step(self._rho())
        if self.settings.intact:
            return self._after_intact(self._step, objective, gradients)
        return self._after_in_place(self._step, objective, gradients)

    def give(self, objective: int, pieces: list[GradientPiece]) -> None:
        """Hand in an auxiliary gradient that no backward pass made, times its weight; before `after(0, ...)`."""
        if self._step is None:
            self._step = _Step(self._rho())
        self._step.taken[objective] = pieces

    def _rho(self) -> Tensor | float:
        if self._time == 0 and self.settings.init == "first_gradient":
            return 1.0
        if self.settings.rho != "auto":
            return float(self.settings.rho)
        least = min(_LARGEST_RHO, max(_LEAST_RHO, 10 / max(self.steps, 1)))
        start = max(self.settings.start_rho, least)
        if not isinstance(self._noise.count, Tensor):
            return start
        return fitting_rho(self._noise.ratio(), start, least, _LARGEST_RHO)

    # ---- one buffer ------------------------------------------------------------------------------------------------

    def _after_in_place(self, step: _Step, objective: int, gradients: ReducedGradients) -> bool:
        pieces = gradients.pieces(self._needed)
        b, first = [piece.grad for piece in pieces], not step.done
        if objective == 0 and not first:
            return self._main_last(step, gradients, pieces, b)
        found = self._products(gradients, pieces, b, max(objective, 1))
        if not bool(torch.isfinite(found.plain_b)):
            self._step = None
            return False
        if first:
            step.old_average = found.plain_e
        own = (found.b_b if objective else found.plain_b) if first else None
        if step.sample is not None and self.settings.metric == "euclidean":
            own = total(gradients.layout, pieces, added(pieces, step.sample))[0]
        step.done.append(objective)
        following = self.sequence[len(step.done)] if len(step.done) < len(self.sequence) else None

        if objective < self.auxiliaries:
            keep = 1 - step.rho if first else 1.0
            self._absorb(b, pieces, objective, keep, step.rho / self.weight(objective))
        removed = found.e_b - step.before if step.before is not None else found.e_b
        coefficients = self._coefficients(found, removed, objective)
        for i, c in enumerate(coefficients):
            self._project(step, b, pieces, i, c, lends=i == following)
        if following is not None and len(coefficients) <= following < self.auxiliaries:
            self._project(step, b, pieces, following, 0.0, lends=True)
        self._measure(objective, found, removed, coefficients, own)
        if objective == 0:
            self._see_noise(step, own)

        if following is None:
            self._finish(step)
            gradients.settle()
            return True
        # From the main one upwards, what is in the buffer is not orthogonal to what is projected on next.
        upwards = self.sequence[0] == 0
        step.before = self._products(gradients, pieces, b, following).e_b if upwards else None
        step.sample = sample(pieces, self._time) if self._time % _EVERY == 0 else None
        gradients.keep()
        return True

    def _main_last(
        self, step: _Step, gradients: ReducedGradients, pieces: Sequence[GradientPiece], b: list[Tensor]
    ) -> bool:
        """The main gradient on top of a buffer that is orthogonal to the average: it stays as it is."""
        squares = [self._passes.squares(b)[:, None]]
        if step.sample is not None:
            squares.append(added(pieces, step.sample))
        sums = total(gradients.layout, pieces, torch.cat(squares, 1))
        if not bool(torch.isfinite(sums[0])):
            self._step = None
            return False
        self._absorb(b, pieces, 0, 1.0, step.rho)
        self._see_noise(step, sums[1] if step.sample is not None else None)
        self._finish(step)
        gradients.settle()
        return True

    # ---- gradients kept apart --------------------------------------------------------------------------------------

    def _after_intact(self, step: _Step, objective: int, gradients: ReducedGradients) -> bool:
        if objective:
            step.taken[objective] = gradients.take(lambda holder: False)
            return True
        held = {id(piece.holder) for taken in step.taken.values() for piece in taken}
        pieces = gradients.pieces(lambda holder: id(holder) in held or self._needed(holder))
        parts = {0: [piece.grad for piece in pieces]}
        parts |= {k: aligned(pieces, taken) for k, taken in step.taken.items()}
        last, scale = self.auxiliaries, gradients.loss_scale()
        main = self._products(gradients, pieces, parts[0], 1)
        squares = torch.stack([self._passes.squares(parts[k]) for k in parts], 1)
        if not bool(torch.isfinite(total(gradients.layout, pieces, squares)).all()):
            for k in step.taken:  # a loss scaler sees from the gradient that the step is to be skipped
                torch._foreach_add_(parts[0], parts[k])
            self._step = None
            gradients.settle()
            return False

        step.old_average = main.plain_e
        self._see_noise(step, main.plain_b / scale**2)
        if self.settings.order == "ema_first":
            for k in range(last):
                self._absorb(parts[k], pieces, k, 1 - step.rho, step.rho / (self.weight(k) * scale))
        for k in range(last, 0, -1):
            found = self._products(gradients, pieces, parts[k], k)
            if self.settings.order == "paper" and k < last:  # what was to be projected on its old average has been
                self._absorb(parts[k], pieces, k, 1 - step.rho, step.rho / (self.weight(k) * scale))
            coefficients = self._coefficients(found, found.e_b, k)
            for i, c in enumerate(coefficients):
                self._project(step, parts[k], pieces, i, c, lends=False)
            self._measure(k, found, found.e_b, coefficients, found.b_b)
        if self.settings.order == "paper":
            self._absorb(parts[0], pieces, 0, 1 - step.rho, step.rho / scale)
        for k in range(1, last + 1):
            torch._foreach_add_(parts[0], parts[k])
        self._finish(step)
        gradients.settle()
        return True

    # ---- the parts of a step ---------------------------------------------------------------------------------------

    def _needed(self, holder: Tensor) -> bool:
        return self._kept.get(self.names[0], holder) is not None

    def _products(
        self, gradients: ReducedGradients, pieces: Sequence[GradientPiece], b: list[Tensor], count: int
    ) -> Products:
        averages = [self._kept.of(name, pieces) for name in self.names[:count]]
        denominators = self._denominators(pieces) if self.settings.metric == "adam" else None
        return products(gradients.layout, pieces, b, averages, self._passes, denominators)

    def _denominators(self, pieces: Sequence[GradientPiece]) -> list[Tensor] | None:
        """sqrt(v) + eps of Adam's last step; None before the first one, whose projection is the identity anyway."""
        if self._time == 0:
            return None
        groups = self._optimizer.param_groups
        eps = {id(p): group.get("eps", 0.0) for group in groups for p in group["params"]}
        # Under ZeRO-3 the groups are empty between steps.
        common = {group.get("eps", 0.0) for group in groups}
        if len(common) > 1 and any(id(piece.holder) not in eps for piece in pieces):
            raise InputError(f"metric is adam, and under ZeRO-3 all groups must have the same eps; they have {common}")
        shared = min(common)
        moments = [self._optimizer.state.get(piece.holder, {}).get("exp_avg_sq") for piece in pieces]
        if not all(isinstance(v, Tensor | None) for v in moments) or all(v is None for v in moments):
            raise InputError(
                f"metric is adam, but {type(self._optimizer).__name__} keeps no second moment in full precision "
                "(exp_avg_sq); take an optimizer of Adam's form with state_dtype float32, or metric euclidean"
            )
        return [
            # A tensor that has taken no step yet has no average either.
            torch.ones_like(piece.grad) if v is None else piece.piece.of(v).sqrt() + eps.get(id(piece.holder), shared)
            for piece, v in zip(pieces, moments, strict=True)
        ]

    def _coefficients(self, found: Products, removed: Tensor, objective: int) -> list[Tensor]:
        if objective == 0:
            return []
        gram = torch.where(found.gram.diagonal() > self.settings.guard**2 * found.b_b, found.gram, 0.0 * found.gram)
        return list(projection(gram[:objective, :objective], removed[:objective]).unbind())

    def _project(
        self, step: _Step, b: list[Tensor], pieces: Sequence[GradientPiece], i: int, c: Tensor | float, lends: bool
    ) -> None:
        keep, lend = (1 - step.rho, step.rho / self.weight(i)) if lends else (1.0, 0.0)
        e = self._kept.of(self.names[i], pieces)
        self._passes.project_and_lend(b, e, c, keep, lend, seeds=self._seeds(pieces, i))

    def _absorb(
        self, b: list[Tensor], pieces: Sequence[GradientPiece], j: int, keep: Tensor | float, rate: Tensor | float
    ) -> None:
        self._passes.absorb(b, self._kept.of(self.names[j], pieces), keep, rate, seeds=self._seeds(pieces, j))

    def _seeds(self, pieces: Sequence[GradientPiece], j: int) -> Tensor | None:
        if self.settings.dtype != torch.bfloat16:
            return None
        rows, device = [piece.row for piece in pieces], pieces[0].grad.device
        times = torch.full((max(rows) + 1,), float(self._time), dtype=torch.float64, device=device)
        return seeds(times, j << 20)[torch.tensor(rows, device=device)]

    # ---- what is known of the noise, and what is reported ----------------------------------------------------------

    def _see_noise(self, step: _Step, squared_norm: Tensor | None) -> None:
        if squared_norm is not None and step.old_average is not None:
            noise = self._noise.on(squared_norm.device, squared_norm.dtype)
            self._noise = noise.measured(step.old_average, squared_norm)

    def _measure(
        self,
        objective: int,
        found: Products,
        products: Tensor,
        coefficients: list[Tensor],
        own: Tensor | None,
    ) -> None:
        """Note what the objective's gradient was to the averages; `own` is its squared norm, where it was measured."""
        if own is None or objective == 0:
            return
        label = "" if self.auxiliaries == 1 else f"_{objective}"
        lengths = (own * found.gram[0, 0]).sqrt()
        cosine = torch.where(lengths > 0, products[0] / lengths, torch.zeros_like(lengths))
        self.measured.add(f"aux_cosine{label}", cosine)
        removed = torch.stack(coefficients) @ products[:objective]
        self.measured.add(f"removed_fraction{label}", torch.where(own > 0, removed / own, torch.zeros_like(own)))

    def _finish(self, step: _Step) -> None:
        self._noise = self._noise.advanced(step.rho)
        self._rho_now = step.rho
        self._time += 1
        self._step = None

    def noise(self) -> dict[str, float]:
        """The main gradient's noise ratio n, NaN while it is not known, and the rho in use; waits for the device."""
        n = float(self._noise.ratio()) if isinstance(self._noise.count, Tensor) else float("nan")
        return {"noise_ratio": n, "rho": float(self._rho_now)}

    def state_dict(self) -> dict[str, Any]:
        """The numbers that a run needs to continue exactly, beside the averages in the optimizer's state."""
        return {"time": self._time, "rho": float(self._rho_now), "noise": self._noise.as_floats()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._time, self._rho_now = state["time"], state["rho"]
        # On the host until the next measurement: under ZeRO-3 groups are empty between steps and show no device.
        self._noise = Noise(**state["noise"]).on(torch.device("cpu"), torch.float64)
