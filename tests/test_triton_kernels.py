"""The Triton kernels, as far as they can be held to anything without a GPU: interpreted, and compiled for one.

What they compute is tested in Triton's interpreter (triton_interpreted.py), which has to be chosen before triton is
imported and so has a process of its own. Here the code that the compiler makes for a GPU is looked at.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_momentum.kernels import cuda

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def environment(folder: Path, **more: str) -> dict[str, str]:
    """That of a process for which triton has neither been told to interpret nor compiled anything."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, "TRITON_CACHE_DIR": str(folder), **more}


def test_in_the_interpreter_they_compute_what_float64_does(tmp_path):
    file = Path(__file__).with_name("triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(file)]
    child = subprocess.run(
        command, env=environment(tmp_path, TRITON_INTERPRET="1"), cwd=file.parents[1], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
    passed = re.search(r"^(\d+) passed", child.stdout, re.MULTILINE)
    assert passed, child.stdout[-2000:]
    assert int(passed[1]) > 100
    assert "skipped" not in child.stdout


def test_without_a_gpu_the_reason_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = "from hf_momentum.kernels import cuda; print(cuda.available()[1])"
    found = subprocess.run([sys.executable, "-c", code], env=environment(Path()), capture_output=True, text=True)
    assert found.stdout == "no CUDA device found\n"


def test_importing_the_kernels_does_not_import_triton_s():
    code = "import sys, hf_momentum.kernels; print('hf_momentum.kernels.triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# ---- what the compiler makes of them --------------------------------------------------------------------------------

POINTERS = {"owners": "*i32", "numbers": "*fp64", "partial": "*fp64", "skip": "*fp32"}
POINTERS |= dict.fromkeys(("begins", "numels", "starts", "table"), "*i64")
SCALARS = {"tensors": "i32", "base": "i32", **dict.fromkeys(("decay", "beta2", "rest2", "eps"), "fp32")}

# Rule, phase, number of sums, storage of first and second moments and of `previous`; the vectors of 128 bits that a
# thread loads or stores for its 8 elements of a tile, with float32 and with bfloat16 gradients and weights.
COMPILED = {
    "alignment_sums": ("ALIGNMENT", "STEP", 3, ("float32", None, None), 4, 3),
    "squared_norms": ("NORM", "STEP", 1, (None, None, None), 2, 1),
    "squared_changes": ("CHANGE", "STEP", 3, ("float32", "float32", "float32"), 10, 9),
    "momentum_step": ("UPDATE", "STEP", 0, ("float32", None, None), 10, 7),
    "momentum_advance": ("UPDATE", "ADVANCE", 1, ("float32", None, None), 6, 5),
    "momentum_apply": ("UPDATE", "APPLY", 0, ("float32", None, None), 6, 4),
    "momentum_project": ("PROJECT", "STEP", 0, ("float32", None, None), 8, 6),
    "momentum_project in bfloat16": ("PROJECT", "STEP", 0, ("bfloat16", None, None), 6, 4),
    "adam_step": ("UPDATE", "STEP", 0, ("float32", "float32", None), 14, 11),
    "adam_advance": ("UPDATE", "ADVANCE", 2, ("float32", "float32", None), 10, 9),
    "adam_apply": ("UPDATE", "APPLY", 0, ("float32", "float32", None), 8, 6),
    "adam_step in bfloat16": ("UPDATE", "STEP", 0, ("bfloat16", "bfloat16", None), 10, 7),
    # Eight codes of 8 bits do not fill a vector.
    "adam_step in eight bits": ("UPDATE", "STEP", 0, ("int8", "uint8", None), 6, 3),
}


@pytest.fixture
def ptx(tmp_path, monkeypatch):
    """The machine code for sm_90 of a kernel in `COMPILED`, for weights and gradients of a dtype."""
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from hf_momentum.kernels import triton_kernels as programs

    def compiled(name: str, dtype: torch.dtype, aligned: bool) -> str:
        rule, phase, width, kinds, *_ = COMPILED[name]
        forms = dict(zip(("STATE", "SQUARES", "PREVIOUS"), (kind and getattr(tl, kind) for kind in kinds), strict=True))
        forms |= {"RULE": getattr(programs, rule).value, "PHASE": getattr(programs, phase).value, "WIDTH": width}
        forms |= {"KIND": programs.KINDS[dtype], "FORM": 0, "COUPLED": False, "SEEDED": False, "ALIGNED": aligned}
        forms |= {"CHUNK": cuda._CHUNK, "TILE": cuda._TILE}
        types = {**POINTERS, **SCALARS, **dict.fromkeys(forms, "constexpr")}
        signature = {argument: types[argument] for argument in programs.one_pass.arg_names}
        source = triton.compiler.ASTSource(programs.one_pass, signature, constexprs=forms)
        options = {"num_warps": cuda._WARPS, **cuda._OPTIONS}
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

    return compiled


def vectors(ptx: str) -> int:
    return len(re.findall(r"(?:ld|st)\.global\S*\.v4\.(?:b|f|u)32|(?:ld|st)\.global\S*\.v2\.(?:b|f|u)64", ptx))


@pytest.mark.parametrize("name", COMPILED)
def test_aligned_tensors_are_read_and_written_128_bits_at_a_time(name, ptx):
    of_float32, of_bfloat16 = COMPILED[name][-2:]
    assert vectors(ptx(name, torch.float32, aligned=True)) == of_float32
    assert vectors(ptx(name, torch.bfloat16, aligned=True)) == of_bfloat16
    assert vectors(ptx(name, torch.float32, aligned=False)) == 0


def test_compiled_arithmetic_is_ieee_s(ptx):
    """Correctly rounded, subnormal numbers kept."""
    code = ptx("adam_step", torch.bfloat16, aligned=True)
    assert "div.rn.f32" in code
    assert "sqrt.rn.f32" in code
    assert re.search(r"cvt\.rn\.bf16", code)
    for worse in (r"\.ftz", r"\.approx", r"div\.full", r"cvt\.r[zmp]\.bf16"):
        assert not re.search(worse, code), worse


def test_the_second_stage_of_the_sums_compiles(ptx, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget

    from hf_momentum.kernels import triton_kernels as programs

    types = {"partial": "*fp64", "starts": "*i64", "sums": "*fp64", "skip": "*fp32", "WIDTH": "constexpr"}
    source = triton.compiler.ASTSource(
        programs.chunk_sums, {**types, "ROWS": "constexpr"}, constexprs={"WIDTH": 3, "ROWS": cuda._ROWS}
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(cuda._OPTIONS)).asm["ptx"]
    assert "add.f64" in code or "add.rn.f64" in code
    assert "atom" not in code
