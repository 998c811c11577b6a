"""The update rules on lists of CPU tensors in one pass each: `cpu_kernels.c`, compiled once per machine.

A function here has the name of the pure function that it stands in for and takes the same arguments, with `Gradients`
in the place of formed gradients, float64 tensors for scalars (0-dim: one for all; 1-D: one per tensor), and weights in
their own dtype. Whether it may stand in is for the caller to ask: `available`,
`obstacle` and `kernel` say so.

The library is kept in `$XDG_CACHE_HOME/hf-momentum/kernels` (`~/.cache` by default) under a name that depends on the
source, the compiler and the processor's features, so that homes shared by different machines work.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_momentum.kernels.gradients import Gradients

SOURCE = Path(__file__).with_name("cpu_kernels.c")

# inf and NaN must survive, so no -ffast-math; without errno and traps the square root and the selections vectorise.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing")

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Below this many elements a second thread costs more than it does.
_GRAIN = 2**15


# ---- the library ----------------------------------------------------------------------------------------------------


class _Unavailable(Exception):
    """The kernels cannot be had on this machine; the message says why."""


class _Work(ctypes.Structure):
    """`struct work` of cpu_kernels.c."""

    _fields_ = [
        *[(name, ctypes.c_longlong) for name in ("tensors", "threads", "kind", "previous_kind")],
        *[(name, ctypes.c_longlong) for name in ("nesterov", "second", "divide_change")],
        *[(name, ctypes.c_void_p) for name in ("numels", "weights", "grads", "first", "squares", "previous")],
        *[(name, ctypes.c_void_p) for name in ("keep", "enter", "rate", "shrink", "unbias")],
        *[(name, ctypes.c_double) for name in ("sign", "decay", "beta2", "eps")],
        ("sums", ctypes.c_void_p),
    ]


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and if not, why. Compiles them at the first call on a machine.

    Example:
        >>> there, why_not = available()
        >>> there == (why_not == "")
        True
    """
    found = _library()
    return (False, found) if isinstance(found, str) else (True, "")


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (_Unavailable, OSError) as error:
        return str(error)
    library.size_of_work.restype = ctypes.c_longlong
    if library.size_of_work() != ctypes.sizeof(_Work):
        return "the compiled kernels disagree with cpu.py on the layout of their argument"
    return library


def _compiled() -> Path:
    """The shared library in the cache, compiled if it is not there yet."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise _Unavailable("no C compiler found (looked for cc, gcc and clang on PATH); install one")
    key = [SOURCE.read_text(), compiler, _output_of([compiler, "--version"]), *FLAGS, _processor()]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf-momentum" / "kernels"
    target = folder / f"cpu-{digest}.so"
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
        except OSError as error:
            raise _Unavailable(f"cannot write the cache {folder} ({error}); set XDG_CACHE_HOME") from error
        os.close(handle)
        try:
            _output_of([compiler, *FLAGS, "-shared", "-fPIC", "-o", temporary, str(SOURCE)])
            os.replace(temporary, target)  # atomic: of several processes that compile at once, each leaves a whole file
        finally:
            Path(temporary).unlink(missing_ok=True)
    return target


def _output_of(command: list[str]) -> str:
    """What a command prints, standard error included."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"{command[0]} does not run: {error}") from error
    if result.returncode:
        lines = result.stdout.strip().splitlines()
        raise _Unavailable(f"{command[0]} failed: {lines[0] if lines else f'exit status {result.returncode}'}")
    return result.stdout


def _processor() -> str:
    """What -march=native depends on: the features of the processor, as Linux lists them, or its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(features))])


# ---- what the kernels take ------------------------------------------------------------------------------------------


def obstacle(param: Tensor, grad: Tensor) -> str:
    """Why the kernels cannot take this pair, or an empty string if they can.

    Example:
        >>> obstacle(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
        'torch.float64 tensors'
        >>> obstacle(torch.zeros(3, 2).t(), torch.zeros(2, 3))
        'tensors that are not contiguous'
    """
    if param.device.type != "cpu":
        return f"tensors on {param.device.type}"
    if param.dtype not in _KINDS:
        return f"{param.dtype} tensors"
    if grad.dtype != param.dtype or grad.device != param.device:
        return "gradients of another dtype or device than their weights"
    if not (param.is_contiguous() and grad.is_contiguous()):
        return "tensors that are not contiguous"
    if type(grad) is not Tensor or type(param) not in (Tensor, torch.nn.Parameter):
        return "tensor subclasses"
    if torch.compiler.is_compiling():
        return "tensors that torch.compile traces"
    return ""


def takes(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether no pair has an `obstacle`; tensor by tensor as quick as can be.

    Example:
        >>> takes([torch.zeros(3)], [torch.zeros(3)]), takes([torch.zeros(3)], [torch.zeros(3).double()])
        (True, False)
    """
    return not torch.compiler.is_compiling() and all(
        type(grad) is Tensor
        and param.dtype in _KINDS
        and grad.dtype is param.dtype
        and param.is_cpu
        and grad.is_cpu
        and grad.layout is torch.strided
        and param.is_contiguous()
        and grad.is_contiguous()
        for param, grad in zip(params, grads, strict=True)
    )


def kernel(name: str, buffers: Sequence[Sequence[Tensor]]) -> Callable[..., Any] | None:
    """The function of this module that stands in for the pure function `name`, if it can take these lists of state.

    State is contiguous float32 on the CPU; a previous gradient may be bfloat16.

    Example:
        >>> kernel("tam_update_", [[torch.zeros(3)]]) is tam_update_
        True
        >>> kernel("tam_update_", [[torch.zeros(3, dtype=torch.float16)]]), kernel("no_such_rule_", [])
        (None, None)
    """
    for number, tensors in enumerate(buffers):
        dtype = torch.float32
        if name == "squared_changes_" and number == 0 and tensors[0].dtype == torch.bfloat16:
            dtype = torch.bfloat16
        if not all(x.dtype == dtype and x.is_contiguous() and x.is_cpu for x in tensors):
            return None
    found: Callable[..., Any] | None = _RULES.get(name)
    return found


class _Call:
    """The argument of one kernel call, and what must stay alive until it returns."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._alive: list[object] = []
        self._written: list[Tensor] = []
        numels = [x.numel() for x in like]
        total = sum(numels)
        self.work = _Work(tensors=len(like), sign=1.0)
        self.work.threads = max(1, min(torch.get_num_threads(), total // _GRAIN))
        self.work.numels = self._table(array("q", numels))

    def _table(self, table: "array[int] | array[float]") -> int:
        self._alive.append(table)
        return table.buffer_info()[0]

    def tensors(self, name: str, tensors: Sequence[Tensor], *, written: bool = False) -> None:
        """Point the field `name` at the storage of `tensors`."""
        setattr(self.work, name, self._table(array("q", map(Tensor.data_ptr, tensors))))
        if written:
            self._written.extend(tensors)

    def gradients(self, grads: Gradients) -> None:
        """The gradients, and the weights where their decay enters."""
        self.work.kind = _KINDS[grads.raw[0].dtype] if grads.raw else 0
        self.work.sign, self.work.decay = grads.sign, grads.decay
        self.tensors("grads", grads.raw)
        if grads.decay:
            self.tensors("weights", grads.weights)

    def weights(self, params: Sequence[Tensor]) -> None:
        """The weights, to be written."""
        self.work.kind = _KINDS[params[0].dtype] if params else 0
        self.tensors("weights", params, written=True)

    def moments(
        self, first: Sequence[Tensor], second: Sequence[Tensor], beta2: float, eps: float, *, written: bool = True
    ) -> None:
        """Adam's moments and what they are computed with."""
        self.tensors("first", first, written=written)
        self.tensors("squares", second, written=written)
        self.work.beta2, self.work.eps = beta2, eps

    def numbers(self, **numbers: "Tensor | Sequence[float] | float") -> None:
        """One number per tensor for each field, out of a float, a 0-dim tensor, or one entry per tensor."""
        for name, value in numbers.items():
            if isinstance(value, Tensor):
                each = value.double().expand(self.work.tensors).contiguous()
                self._alive.append(each)
                setattr(self.work, name, each.data_ptr())
            elif isinstance(value, Sequence):
                setattr(self.work, name, self._table(array("d", value)))
            else:
                setattr(self.work, name, self._table(array("d", [value]) * self.work.tensors))

    def run(self, kernel: str, width: int = 0) -> Tensor:
        """Call the kernel; the sums, `[tensors, width]` in float64."""
        library = _library()
        if isinstance(library, str):
            raise RuntimeError(f"the CPU kernels are not available: {library}")
        sums = torch.zeros(self.work.tensors, width, dtype=torch.float64)
        self.work.sums = sums.data_ptr()
        if getattr(library, kernel)(ctypes.byref(self.work)):
            raise MemoryError(f"no memory for the partial sums of {self.work.tensors} tensors")
        torch.autograd.graph.increment_version(self._written)  # autograd does not see what is written past it
        return sums


# ---- sums -----------------------------------------------------------------------------------------------------------


def alignment_sums(grads: Gradients, xs: Sequence[Tensor]) -> Tensor:
    """`<x, g>, <x, x>, <g, g>` of each pair, `[tensors, 3]`; see `hf_momentum.kernels.alignment_sums`.

    Args:
        grads: float32, bfloat16 or float16.
        xs: float32 tensors of the same shapes.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> g, x = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0])
        >>> alignment_sums(Gradients([g], [g]), [x]) if available()[0] else torch.tensor([[3.0, 5.0, 9.0]]).double()
        tensor([[3., 5., 9.]], dtype=torch.float64)
    """
    call = _Call(xs)
    call.gradients(grads)
    call.tensors("first", xs)
    return call.run("alignment_sums", 3)


# ---- updates --------------------------------------------------------------------------------------------------------


def tam_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    momenta: Sequence[Tensor],
    scale: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """`hf_momentum.optim.tam.tam_update_` in one pass.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> w, g, m = [torch.ones(2)], [torch.ones(2)], [torch.zeros(2)]
        >>> if available()[0]:
        ...     tam_update_(w, Gradients(g, w), m, torch.tensor(0.5), lr=0.1, momentum=0.9, weight_decay=0.0)
    """
    call = _Call(momenta)
    call.gradients(grads)
    call.weights(params)
    call.tensors("first", momenta, written=True)
    call.numbers(keep=momentum, enter=scale, rate=lr, shrink=1 - lr * weight_decay)
    call.run("momentum_step")


def ahb_sgd_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    displacements: Sequence[Tensor],
    beta: Tensor,
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """`hf_momentum.optim.ahb.ahb_sgd_update_` in one pass.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> w, g, dw = [torch.ones(1)], [torch.ones(1)], [torch.tensor([0.2])]
        >>> if available()[0]:
        ...     ahb_sgd_update_(w, Gradients(g, w), dw, torch.tensor(0.5), lr=0.1, weight_decay=0.0)
    """
    call = _Call(displacements)
    call.gradients(grads)
    call.weights(params)
    call.tensors("first", displacements, written=True)
    call.numbers(keep=beta, enter=-lr, rate=-1.0, shrink=1 - lr * weight_decay)
    call.run("momentum_step")


def critical_sgd_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    momenta: Sequence[Tensor],
    mu: Tensor,
    kept: Sequence[Tensor] | None,
    *,
    lr: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """`hf_momentum.optim.critical.critical_sgd_update_` in one pass.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> w, g, m = [torch.ones(1)], [torch.ones(1)], [torch.zeros(1)]
        >>> if available()[0]:
        ...     critical_sgd_update_(w, Gradients(g, w), m, torch.tensor(0.5), None, lr=0.1, weight_decay=0.0,
        ...                          nesterov=False)
    """
    call = _Call(momenta)
    call.gradients(grads)
    call.weights(params)
    call.tensors("first", momenta, written=True)
    if kept is not None:
        call.tensors("previous", kept, written=True)
    call.work.nesterov = 0 if not nesterov else 1 if kept is None else 2
    call.numbers(keep=mu, enter=1.0, rate=lr, shrink=1 - lr * weight_decay)
    call.run("momentum_step")


def adatam_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    scale: Tensor,
    steps: Sequence[float] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    ema: bool,
    weight_decay: float,
) -> None:
    """`hf_momentum.optim.tam.adatam_update_` in one pass.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> w, g, m, v = [torch.ones(1)], [torch.ones(1)], [torch.zeros(1)], [torch.zeros(1)]
        >>> if available()[0]:
        ...     adatam_update_(w, Gradients(g, w), m, v, torch.tensor(0.5), None, lr=0.1, betas=(0.9, 0.99), eps=0.0,
        ...                    ema=False, weight_decay=0.0)
    """
    beta1, beta2 = betas
    call = _Call(first_moments)
    call.gradients(grads)
    call.weights(params)
    call.moments(first_moments, second_moments, beta2, eps)
    call.numbers(
        keep=beta1,
        enter=scale.double() * (1 - beta1 if ema else 1),
        rate=lr if steps is None else [lr / (1 - beta1**t) for t in steps],
        shrink=1 - lr * weight_decay,
        unbias=1.0 if steps is None else _unbiasing(steps, beta2),
    )
    call.run("adam_step")


def adam_update_(
    params: Sequence[Tensor],
    grads: Gradients,
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: Sequence[float],
    beta1: Tensor,
    correction1: Tensor,
    *,
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`hf_momentum.optim.adam.adam_update_` in one pass.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> w, g, m, v = [torch.ones(1)], [torch.ones(1)], [torch.zeros(1)], [torch.zeros(1)]
        >>> if available()[0]:
        ...     adam_update_(w, Gradients(g, w), m, v, [1.0], torch.tensor(0.9), torch.tensor(0.1), lr=0.1, beta2=0.99,
        ...                  eps=0.0, weight_decay=0.0)
    """
    call = _Call(first_moments)
    call.gradients(grads)
    call.weights(params)
    call.moments(first_moments, second_moments, beta2, eps)
    call.numbers(
        keep=beta1,
        enter=1 - beta1.double(),
        rate=lr / correction1.double(),
        shrink=1 - lr * weight_decay,
        unbias=_unbiasing(steps, beta2),
    )
    call.run("adam_step")


# ---- updates in two halves, with a norm between them ----------------------------------------------------------------


def advance_moments_(
    grads: Gradients,
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    of_update: bool,
) -> Tensor:
    """`hf_momentum.optim.vradam.advance_moments_` in one pass, its sums included.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> g, m, v = [torch.ones(1)], [torch.zeros(1)], [torch.zeros(1)]
        >>> if available()[0]:
        ...     sums = advance_moments_(Gradients(g, g), m, v, [1.0], betas=(0.9, 0.99), eps=0.0, of_update=False)
    """
    beta1, beta2 = betas
    call = _Call(first_moments)
    call.gradients(grads)
    call.moments(first_moments, second_moments, beta2, eps)
    call.numbers(keep=beta1, enter=1 - beta1, rate=[1 / (1 - beta1**t) for t in steps], unbias=_unbiasing(steps, beta2))
    sums = call.run("adam_advance", 2)
    return sums if of_update else sums[:, :1].expand(-1, 2)


def vradam_update_(
    params: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: Sequence[float],
    rate: Tensor,
    shrink: Tensor | None,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """`hf_momentum.optim.vradam.vradam_update_` in one pass.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> w, m, v = [torch.ones(1)], [torch.ones(1)], [torch.ones(1)]
        >>> if available()[0]:
        ...     vradam_update_(w, m, v, [1.0], torch.tensor(0.1), None, betas=(0.9, 0.99), eps=0.0)
    """
    beta1, beta2 = betas
    call = _Call(first_moments)
    call.weights(params)
    call.moments(first_moments, second_moments, beta2, eps, written=False)
    corrections = torch.tensor([1 - beta1**t for t in steps], dtype=torch.float64)
    call.numbers(
        rate=rate.double() / corrections, shrink=1.0 if shrink is None else shrink, unbias=_unbiasing(steps, beta2)
    )
    call.run("adam_apply")


def advance_momentum_(grads: Gradients, momenta: Sequence[Tensor], *, momentum: float) -> Tensor:
    """`hf_momentum.optim.vradam.advance_momentum_` in one pass, its sum included.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> g, m = [torch.ones(1)], [torch.zeros(1)]
        >>> sums = advance_momentum_(Gradients(g, g), m, momentum=0.9) if available()[0] else None
    """
    call = _Call(momenta)
    call.gradients(grads)
    call.tensors("first", momenta, written=True)
    call.numbers(keep=momentum, enter=1 - momentum)
    return call.run("momentum_advance", 1).expand(-1, 2)


def vr_update_(params: Sequence[Tensor], directions: Sequence[Tensor], rate: Tensor, shrink: Tensor | None) -> None:
    """`hf_momentum.optim.vradam.vr_update_` in one pass.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> w = [torch.ones(2)]
        >>> if available()[0]:
        ...     vr_update_(w, [torch.ones(2)], torch.tensor(0.25), torch.tensor(0.5))
    """
    call = _Call(directions)
    call.weights(params)
    call.tensors("first", directions)
    call.numbers(rate=rate, shrink=1.0 if shrink is None else shrink)
    call.run("momentum_apply")


# ---- curvature ------------------------------------------------------------------------------------------------------


def squared_changes_(
    grads: Gradients,
    previous: Sequence[Tensor],
    displacements: Sequence[Tensor],
    second_moments: Sequence[Tensor] | None,
    steps: Sequence[float] | None,
    new: Sequence[bool],
    factor: Tensor | float,
    *,
    beta2: float,
    eps: float,
    preconditioned: bool,
) -> Tensor:
    """`hf_momentum.optim.curvature.squared_changes_` in one pass.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> g, old, dw = [torch.ones(1)], [torch.zeros(1)], [torch.ones(1)]
        >>> if available()[0]:
        ...     sums = squared_changes_(Gradients(g, g), old, dw, None, None, [False], 1.0, beta2=0.0, eps=0.0,
        ...                             preconditioned=False)
    """
    call = _Call(displacements)
    call.gradients(replace(grads, sign=grads.sign * float(factor)))
    call.tensors("previous", previous, written=True)
    call.work.previous_kind = _KINDS[previous[0].dtype] if previous else 0
    call.work.divide_change = preconditioned
    if second_moments is None or steps is None:
        call.tensors("first", displacements)
    else:
        call.work.second = 1
        call.moments(displacements, second_moments, beta2, eps, written=False)
        call.numbers(unbias=_unbiasing(steps, beta2))
    sums = call.run("squared_changes", 2)
    if any(new):
        sums[:, 0].masked_fill_(torch.tensor(new), 0.0)
    return sums


def _unbiasing(steps: Sequence[float], beta2: float) -> list[float]:
    """What turns sqrt(v) into sqrt(v / (1 - beta2^t))."""
    factors = {t: (1 - beta2**t) ** -0.5 for t in set(steps)}
    return [factors[t] for t in steps]


_RULES: dict[str, Callable[..., Any]] = {
    rule.__name__: rule
    for rule in (
        alignment_sums,
        tam_update_,
        ahb_sgd_update_,
        critical_sgd_update_,
        adatam_update_,
        adam_update_,
        advance_moments_,
        vradam_update_,
        advance_momentum_,
        vr_update_,
        squared_changes_,
    )
}
