"""The update rules on lists of CPU tensors in one pass each: `cpu_kernels.c`, compiled once per machine.

A function here has the name of the pure function that it stands in for and takes the same arguments, with `Gradients`
in the place of formed gradients, float64 tensors for scalars (0-dim: one for all; 1-D: one per tensor), and weights in
their own dtype. Whether it may stand in is for the caller to ask: `available` and `obstacle` say so.

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
from collections.abc import Sequence
from pathlib import Path

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


def fits(buffers: Sequence[Tensor], dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether every tensor of the state is contiguous, on the CPU and of one of `dtypes`.

    Example:
        >>> fits([torch.zeros(3)]), fits([torch.zeros(3, dtype=torch.float16)])
        (True, False)
    """
    dtype = buffers[0].dtype if buffers else dtypes[0]
    return dtype in dtypes and all(x.dtype == dtype and x.is_contiguous() and x.is_cpu for x in buffers)


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

    def numbers(self, **numbers: "Tensor | Sequence[float] | float") -> None:
        """One number per tensor for each field, out of a float, a 0-dim tensor, or one entry per tensor."""
        for name, value in numbers.items():
            if isinstance(value, Tensor):
                each = value.double().expand(self.work.tensors).contiguous()
                self._alive.append(each)
                setattr(self.work, name, each.data_ptr())
            else:
                one = isinstance(value, float | int)
                setattr(self.work, name, self._table(array("d", [value]) * self.work.tensors if one else array("d", value)))

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
