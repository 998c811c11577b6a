"""Fixtures shared by all tests; nothing here reaches a network."""

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def quick_trainers():
    """Without the Trainer's garbage collection after each run, which takes longer than a tiny run itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)
        yield


# Few and related sentences: the gradients of successive batches then correlate, and a cosine has something to see.
PROSE = [
    f"The {adjective} river runs {way} to the sea. " * 3 for adjective in ("long", "old") for way in ("down", "on")
]
CODE = [f"def {name}(x):\n    return x {op} {n}\n" * 3 for n, (name, op) in enumerate([("add", "+"), ("mul", "*")] * 4)]


def write_rows(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@dataclass(frozen=True)
class Tiny:
    """A recipe so small that a run takes about a second, and its files."""

    folder: Path

    def words(self, output: str | Path, **fields: object) -> list[str]:
        """The command line of the tiny run with `fields` on top; a value of None drops a field."""
        base = {
            "scratch_dataset": self.folder / "prose.jsonl",
            "scratch_hidden_size": 32,
            "scratch_layers": 2,
            "scratch_steps": 3,
            "scratch_batch_size": 4,
            "cache_dir": self.folder / "cache",
            "train_dataset": self.folder / "code.jsonl",
            "in_distribution": f"code={self.folder / 'code.jsonl'}",
            "must_not_forget": f"prose={self.folder / 'prose.jsonl'}",
            "block_size": 32,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "optim": "tam",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "output_dir": output,
        }
        merged = {key: value for key, value in {**base, **fields}.items() if value is not None}
        return [f"--{key}={value}" for key, value in merged.items()]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    write_rows(folder / "prose.jsonl", [{"text": text} for text in PROSE])
    write_rows(folder / "code.jsonl", [{"text": text} for text in CODE])
    return Tiny(folder)


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--write-support", metavar="FILE", help="write what the matrix found, for README's table of support"
    )


SUPPORT: dict[str, dict[str, float]] = {}


@pytest.fixture(scope="session")
def record_support():
    """Called with an optimizer's label, a layout and the difference from the single process."""

    def record(label: str, layout: str, difference: float) -> None:
        SUPPORT.setdefault(label, {})[layout] = difference

    return record


REFUSED: set[str] = set()


@pytest.fixture(scope="session")
def record_refused():
    """Called with what a test saw refused."""
    return REFUSED.add


# Cases for which a cheaper one of the same claim stands in the suite of every day; they run with `make test-all`.
STOOD_FOR = {
    "test_ahb.py::test_on_pure_noise": ("[0.0001]", "[100.0]"),
    "test_bloop_matrix.py": ("[ZeRO-3-",),
    "test_compare.py::test_two_workers_share": ("",),
    "test_diagnose_sharded.py": ("[ZeRO-3-",),
    "test_doctor.py::test_a_recipe_is_looked_at_with_its_data": ("",),
    "test_export.py::test_the_weights_equal": ("[zero2-full]",),
    "test_foreign_scripts.py::test_a_script_under_accelerate_launch": ("",),
    "test_kill.py": ("[ddp-tam-save4]",),  # test_checkpoints.py goes on behind torn checkpoints, too
    "test_launch.py::test_an_error_in_the_processes": ("",),
    "test_launch.py::test_two_processes_with_a_sharded_model": ("[zero3-", "[fsdp2-"),
    "test_names.py::test_order_of_imports": ("[import hf_momentum, transformers]",),
    "test_reduced_gradients.py": ("[ZeRO-2-",),
    "test_resume.py::test_an_exported_run_with_state_in_eight_bits": ("[zero3-",),
    "test_resume.py::test_a_resumed_run_ends_bit_for_bit": ("[zero3-ahb_adamw]", "[zero3-tam-int8]"),
    "test_registration.py::test_importing_the_optimizer_first": ("",),
    "test_scores.py::test_intervals_cover_the_truth": ("",),
    "test_sharding.py::test_reductions_are_bitwise": ("[3]",),
    "test_state_dtype.py::test_rounding_at_random": ("[signed]",),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Mark them as slow before those are left out."""
    for item in items:
        for place, ids in STOOD_FOR.items():
            if place in item.nodeid and any(one in item.nodeid for one in ids):
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session) -> None:
    """What the imports made is never garbage: looking through it, again and again, took a third of the time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config) -> None:
    gc.unfreeze()  # extensions that look for leaks at the end would take it all for such


def pytest_sessionfinish(session, exitstatus) -> None:
    target = session.config.getoption("--write-support")
    if target and (SUPPORT or REFUSED):
        # A part of the matrix may be run again: what this run did not look at stays.
        before = json.loads(Path(target).read_text()) if Path(target).is_file() else {"differences": {}, "refused": []}
        for label, found in before["differences"].items():
            SUPPORT[label] = {**found, **SUPPORT.get(label, {})}
        refused = sorted(REFUSED | set(before["refused"]))
        results = {"tolerance": 1e-6, "differences": SUPPORT, "refused": refused}
        Path(target).write_text(json.dumps(results, indent=1) + "\n")
