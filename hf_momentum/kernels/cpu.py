"""The kernels on lists of CPU tensors: `cpu_kernels.c`, compiled once per machine.

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
from typing import Any

import torch
from torch import Tensor

from hf_momentum.kernels.rounding import Packed
from hf_momentum.kernels.work import Numbers, Reduced, State, Work

SOURCE = Path(__file__).with_name("cpu_kernels.c")

# inf and NaN must survive, so no -ffast-math; without errno and traps the square root and the selections vectorise.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing")

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 3}

# Below this many elements a second thread costs more than it does.
_GRAIN = 2**15


# ---- the library ----------------------------------------------------------------------------------------------------


class _Unavailable(Exception):
    """The kernels cannot be had on this machine; the message says why."""


class _Work(ctypes.Structure):
    """`struct work` of cpu_kernels.c."""

    _fields_ = [
        *[(name, ctypes.c_longlong) for name in ("tensors", "threads", "kind", "state_kind", "previous_kind")],
        *[(name, ctypes.c_longlong) for name in ("nesterov", "divide_change", "written")],
        *[(name, ctypes.c_void_p) for name in ("numels", "weights", "grads", "first", "squares", "previous")],
        *[(name, ctypes.c_void_p) for name in ("first_scales", "squares_scales")],
        *[(name, ctypes.c_void_p) for name in ("sign", "keep", "enter", "rate", "shrink", "unbias")],
        *[(name, ctypes.c_void_p) for name in ("weight_seeds", "state_seeds")],
        *[(name, ctypes.c_double) for name in ("decay", "beta2", "eps")],
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
    try:
        _keep_to_ourselves(folder)
    except OSError as error:
        raise _Unavailable(f"cannot write the cache {folder} ({error}); set XDG_CACHE_HOME") from error
    if not target.exists():
        try:
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


def _keep_to_ourselves(folder: Path) -> None:
    """Make the folder, and let nobody else write to it: what lies there is loaded and run.

    What was there while others could write to it may be theirs, and is deleted.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise _Unavailable(f"the cache {folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    if found.st_mode & 0o022:
        folder.chmod(0o700)
        for library in folder.glob("cpu-*.so"):
            library.unlink()


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


# ---- one pass -------------------------------------------------------------------------------------------------------


class _Call:
    """A filled `struct work`, and what must stay alive until the kernel returns."""

    def __init__(self, work: Work) -> None:
        self._alive: list[object] = []
        self._known: dict[int, Any] = {} if work.tables is None else work.tables
        pieces = work.pieces()
        numels, _ = self._known.get(0, (None, None))
        if numels is None:
            numels = array("q", map(Tensor.numel, pieces))
            self._known[0] = (numels, None)
        self.work = _Work(tensors=len(numels), threads=max(1, min(torch.get_num_threads(), sum(numels) // _GRAIN)))
        self.work.numels = self._table(numels)
        self.work.kind = _KINDS[pieces[0].dtype] if pieces else 0
        self.work.nesterov, self.work.divide_change = work.nesterov, work.divide_change
        self.work.written, self.work.beta2, self.work.eps = work.written, work.beta2, work.eps
        self._numbers(keep=work.keep, enter=work.enter, rate=work.rate, shrink=work.shrink, unbias=work.unbias)
        if work.grads is not None:
            self.work.decay = work.grads.decay
            self._numbers(sign=work.grads.sign * work.grads.factor)
            self.work.grads = self._pointers(work.grads.raw)
        weights = work.grads.weights if work.weights is None and work.grads and work.grads.decay else work.weights
        if weights is not None:
            self.work.weights = self._pointers(weights)
        if work.seeds is not None:
            self._numbers(weight_seeds=work.seeds)
        if isinstance(work.first, Reduced) or work.first:
            self._state("first", work.first)
        if work.squares is not None:
            self._state("squares", work.squares)
        if work.previous is not None:
            self.work.previous = self._pointers(work.previous)
            self.work.previous_kind = _KINDS[work.previous[0].dtype] if work.previous else 0

    def _table(self, table: "array[int] | array[float]") -> int:
        self._alive.append(table)
        return table.buffer_info()[0]

    def _pointers(self, tensors: Sequence[Tensor]) -> int:
        table, _ = self._known.get(id(tensors), (None, None))
        if table is None:
            table = array("q", map(Tensor.data_ptr, tensors))
            self._known[id(tensors)] = (table, tensors)  # kept alive, so that no other list has its identity
        return self._table(table)

    def _state(self, name: str, state: State) -> None:
        """Point at state tensors, and at the scales of their blocks where they have any."""
        if not isinstance(state, Reduced):
            tensors = state
        else:
            packed = [part for part in state.parts if isinstance(part, Packed)]
            tensors = [part.codes for part in packed] or [part for part in state.parts if isinstance(part, Tensor)]
            self._numbers(state_seeds=state.seeds)
            if packed:
                setattr(self.work, f"{name}_scales", self._pointers([part.scales for part in packed]))
        self.work.state_kind = _KINDS[tensors[0].dtype] if tensors else 0
        setattr(self.work, name, self._pointers(tensors))

    def _numbers(self, **numbers: Numbers) -> None:
        """One double per tensor for each field, out of a float, a 0-dim tensor, or one entry per tensor."""
        for name, value in numbers.items():
            if isinstance(value, Tensor):
                each = value.double().expand(self.work.tensors).contiguous()
                self._alive.append(each)
                setattr(self.work, name, each.data_ptr())
            else:
                setattr(self.work, name, self._table(array("d", [value]) * self.work.tensors))


def launch(kernel: str, work: Work, width: int) -> Tensor:
    """Make one pass; the sums over each tensor, `[tensors, width]` in float64.

    Args:
        kernel: a function of cpu_kernels.c.
        work: what it is given.
        width: how many sums it forms.

    Raises:
        RuntimeError: the kernels are not available.

    Example:
        >>> from hf_momentum.kernels import Gradients
        >>> m, g = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]
        >>> work = Work(grads=Gradients(g, g), first=m, written=False)
        >>> launch("alignment_sums", work, 3) if available()[0] else torch.tensor([[3.0, 5.0, 9.0]]).double()
        tensor([[3., 5., 9.]], dtype=torch.float64)
    """
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"the CPU kernels are not available: {library}")
    call = _Call(work)
    sums = torch.zeros(call.work.tensors, width, dtype=torch.float64)
    if work.skip is not None and bool(work.skip):
        return sums
    call.work.sums = sums.data_ptr()
    if getattr(library, kernel)(ctypes.byref(call.work)):
        raise MemoryError(f"no memory for the partial sums of {call.work.tensors} tensors")
    torch.autograd.graph.increment_version(work.weights or ())  # autograd does not see what is written past it
    return sums
