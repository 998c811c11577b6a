"""The rooms of docs/architecture.md hold: imports point down the floors only, and light rooms stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_momentum"

# What each room may import of the package, beside itself. `errors` is the ground that all stand on.
MAY_IMPORT = {
    "errors": set(),
    "sharding": set(),
    "kernels": set(),
    "optim": {"sharding", "kernels"},
    "surgery": {"sharding", "kernels"},
    "evaluation": set(),
    "diagnosis": {"optim", "sharding", "evaluation"},
    "integrations": {"optim", "sharding"},
    "training": {"sharding", "kernels", "optim", "surgery", "evaluation", "diagnosis", "integrations"},
    "launch": {"training", "integrations"},
    "commands": {"sharding", "kernels", "training", "evaluation", "diagnosis", "integrations", "run", "launch"},
    "cli": {"commands"},
    "run": {"integrations"},
    "__main__": {"cli"},
    "__init__": {"optim", "surgery", "integrations", "training"},
}


def imports_of(file: Path) -> set[str]:
    """The rooms of hf_momentum that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports of the package in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "hf_momentum":
                found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down_the_floors_only(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    above = imports_of(file) - MAY_IMPORT[room] - {room, "errors"}
    assert not above, f"{file.name} in room {room!r} imports {sorted(above)}"


def test_no_two_rooms_import_each_other():
    for room, below in MAY_IMPORT.items():
        for other in below:
            assert room not in MAY_IMPORT[other], f"{room} and {other} may import each other"


def test_the_reference_shares_nothing_with_the_optimizers():
    assert imports_of(PACKAGE / "optim" / "reference.py") == set()


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(m for m in sys.modules if '.' not in m))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("statement", ["import hf_momentum.optim", "import hf_momentum"])
def test_importing_the_optimizers_loads_no_heavy_library(statement):
    heavy = {"transformers", "accelerate", "datasets", "peft", "deepspeed", "matplotlib", "trl", "evaluate"}
    assert not loaded_after(statement) & heavy
    assert "transformers" in loaded_after(f"{statement}; import transformers"), "the probe must see a loaded library"
