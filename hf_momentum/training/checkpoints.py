"""The checkpoints that a Trainer writes: which kind, whether whole, which is the last complete one, what it fits.

A process can die while a checkpoint is being written. `complete.json`, written last and in one atomic step, names every
file with its size; a checkpoint is complete when the folder holds all that its manifest names.
"""

import importlib
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_momentum.errors import InputError
from hf_momentum.integrations import OPTIMIZERS

MANIFEST = "complete.json"
FORMAT = 1

PLAIN, FSDP_FULL, FSDP_SHARDED, DEEPSPEED, WEIGHTS = "plain", "fsdp-full", "fsdp-sharded", "deepspeed", "weights"

_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_ZIPPED = {".pt", ".pth", ".bin"}  # what torch.save writes is a zip archive, whose directory stands at its end
# What DeepSpeed 0.19 pickles beside tensors and plain containers.
_PICKLED_BY_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# What torch's distributed checkpoint pickles into its table `.metadata`, beside data types.
_PICKLED_IN_METADATA = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
            *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
_DISTRIBUTED = ("pytorch_model_fsdp_0", "optimizer_0")
_LAUNCHERS = {PLAIN: "one process or DDP", FSDP_FULL: "FSDP2", FSDP_SHARDED: "FSDP2", DEEPSPEED: "DeepSpeed"}


@dataclass(frozen=True)
class Manifest:
    """What `complete.json` says.

    Attributes:
        format: version of this file's format.
        step: optimizer steps taken.
        processes: how many processes saved.
        kind: "plain", "fsdp-full", "fsdp-sharded", "deepspeed" or "weights".
        files: size in bytes of every file, by its path inside the checkpoint.
    """

    format: int
    step: int
    processes: int
    kind: str
    files: dict[str, int]


def kind_of(checkpoint: str | os.PathLike[str]) -> str:
    """The kind of a checkpoint, by the files of its optimizer; "weights" when it holds no optimizer.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "latest").write_text("global_step4")
        >>> kind_of(folder)
        'deepspeed'
    """
    folder = Path(checkpoint)
    if (folder / "latest").is_file():
        return DEEPSPEED
    if (folder / "pytorch_model_fsdp_0").is_dir() or (folder / "optimizer_0").is_dir():
        return FSDP_SHARDED
    if (folder / "optimizer.bin").is_file() or (folder / "pytorch_model_fsdp.bin").is_file():
        return FSDP_FULL
    return PLAIN if (folder / "optimizer.pt").is_file() else WEIGHTS


def write_manifest(checkpoint: str | os.PathLike[str], step: int, processes: int) -> Manifest:
    """Declare a checkpoint complete. To be called by one process, after all have finished writing.

    Args:
        checkpoint: the folder.
        step: optimizer steps taken.
        processes: how many processes saved.

    Returns:
        What was written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "optimizer.pt").write_bytes(b"12345")
        >>> write_manifest(folder, step=10, processes=2).files
        {'optimizer.pt': 5}
    """
    folder = Path(checkpoint)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    }
    manifest = Manifest(FORMAT, step, processes, kind_of(folder), files)
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(asdict(manifest), stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, folder / MANIFEST)
    return manifest


def read_manifest(checkpoint: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a checkpoint, or None where there is none that can be read.

    Raises:
        InputError: it was written by a later version of this package.

    Example:
        >>> read_manifest("no such folder") is None
        True
    """
    path = Path(checkpoint) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = int(content["format"])
        if version > FORMAT:
            raise InputError(
                f"{path} has format {version}; this version of hf-momentum reads up to {FORMAT}. Update hf-momentum"
            )
        return Manifest(version, int(content["step"]), int(content["processes"]), content["kind"], content["files"])
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def faults(checkpoint: str | os.PathLike[str], manifest_needed: bool = True) -> list[str]:
    """What is missing or short in a checkpoint; an empty list for a whole one.

    Args:
        checkpoint: the folder.
        manifest_needed: whether a checkpoint without manifest counts as torn. If not, its files are looked at:
            the trainer's state can be parsed, archives have their end, safetensors files have the length that their
            header states, and distributed folders have their metadata and all the bytes that it names.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> faults(folder)
        ['complete.json is missing']
        >>> faults(folder, manifest_needed=False)
        ['trainer_state.json is missing']
    """
    folder = Path(checkpoint)
    manifest = read_manifest(folder)
    if manifest is not None:
        found = [_short(folder, name, size) for name, size in manifest.files.items()]
        return [fault for fault in found if fault]
    if manifest_needed:
        broken = (folder / MANIFEST).is_file()
        return [f"{MANIFEST} cannot be read" if broken else f"{MANIFEST} is missing"]
    return list(_structure(folder))


def _short(folder: Path, name: str, size: int) -> str | None:
    path = folder / name
    if not path.is_file():
        # A pickle that nothing reads; `hf-momentum push` takes it out of what transformers has pushed.
        return None if name == "training_args.bin" else f"{name} is missing"
    found = path.stat().st_size
    return None if found == size else f"{name} has {found} of {size} bytes"


def _structure(folder: Path) -> Iterable[str]:
    state = folder / "trainer_state.json"
    if not state.is_file():
        yield "trainer_state.json is missing"
    else:
        try:
            json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            yield "trainer_state.json cannot be parsed"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in _ZIPPED and path.is_file() and not zipfile.is_zipfile(path):
            yield f"{name} has no end"
        elif path.suffix == ".safetensors":
            yield from _safetensors(path, name)
    for name in _DISTRIBUTED:
        if (folder / name).is_dir():
            yield from _distributed(folder / name)
    if kind_of(folder) == DEEPSPEED:
        yield from _deepspeed(folder)


def _safetensors(path: Path, name: str) -> Iterable[str]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = path.stat().st_size
        try:
            if 8 + length > size:
                raise ValueError("the header ends early")
            header = json.loads(stream.read(length))
        except ValueError:
            yield f"{name} has no whole header"
            return
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        yield f"{name} has {size} of {expected} bytes"


def _distributed(folder: Path) -> Iterable[str]:
    # Written by the first process after all others have written their part.
    if not (folder / ".metadata").is_file():
        yield f"{folder.name}/.metadata is missing"
        return
    try:
        stored = read_metadata(folder).storage_data
    except InputError:
        raise
    except Exception:  # a pickle that was cut short raises almost anything
        yield f"{folder.name}/.metadata cannot be read"
        return
    ends: dict[str, int] = {}
    for place in stored.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            yield f"{folder.name}/{name} is missing"
        elif path.stat().st_size < end:
            yield f"{folder.name}/{name} has {path.stat().st_size} of {end} bytes"


def _deepspeed(folder: Path) -> Iterable[str]:
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    ranks = {rank for rank, _ in optimizer_files(folder)}
    if not (folder / tag).is_dir():
        yield f"{tag}/ is missing"
    elif not list((folder / tag).glob("*model_states.pt")):
        yield f"{tag}/ holds no model states"
    elif ranks != set(range(len(ranks))):
        absent = min(set(range(max(ranks) + 1)) - ranks)
        yield f"{tag}/ lacks the optimizer states of process {absent}"


def optimizer_files(checkpoint: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Rank and path of the files in which each process of a ZeRO run saved its part of the optimizer.

    Example:
        >>> import tempfile
        >>> optimizer_files(tempfile.mkdtemp())
        []
    """
    folder = Path(checkpoint)
    if not (folder / "latest").is_file():
        return []
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    pattern = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")
    found = [(pattern.search(path.name), path) for path in (folder / tag).glob("*optim_states.pt")]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def checkpoints_in(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders of a run, the latest step first.

    Example:
        >>> checkpoints_in("no such folder")
        []
    """
    folder = Path(output_dir)
    steps = [(_FOLDER.match(path.name), path) for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    numbered = [(int(match.group(1)), path) for match, path in steps if match]
    return [path for _, path in sorted(numbered, reverse=True)]


def last_complete(output_dir: str | os.PathLike[str], speak: bool = True) -> Path | None:
    """The last complete checkpoint of a run; None if there is none.

    Args:
        output_dir: the run's folder.
        speak: print a line for each torn checkpoint that is skipped.

    Example:
        >>> last_complete("no such folder") is None
        True
    """
    for path in checkpoints_in(output_dir):
        found = faults(path)
        if not found:
            return path
        if speak:
            print(f"{path.name} is torn: {_shown(found)}; skipped", flush=True)
    return None


def _shown(found: list[str]) -> str:
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def find_checkpoint(wanted: str | bool | None, output_dir: str | None, speak: bool = True) -> str | None:
    """The folder that `--resume_from_checkpoint` means: a path, or with "true" the last complete one of the run.

    A path may also name a checkpoint that a plain Trainer wrote, without a manifest, if its files are whole.

    Args:
        wanted: the argument's value.
        output_dir: the run's folder.
        speak: print a line for each torn checkpoint that "true" skips.

    Raises:
        InputError: there is none, or the named one is torn.

    Example:
        >>> find_checkpoint(None, "out") is None
        True
    """
    word = str(wanted).lower()
    if wanted is None or word == "false":
        return None
    if word == "true":
        found = last_complete(output_dir, speak) if output_dir else None
        if found is None:
            torn = [path.name for path in checkpoints_in(output_dir)] if output_dir else []
            if not torn:
                raise InputError(f"resume_from_checkpoint: no checkpoint in {output_dir}")
            raise InputError(
                f"resume_from_checkpoint: none of {', '.join(torn)} in {output_dir} is complete. To continue from one "
                f"that a Trainer without {MANIFEST} wrote, give its path"
            )
        return str(found)
    folder = str(wanted)
    if not (Path(folder) / "trainer_state.json").is_file():
        raise InputError(f"resume_from_checkpoint: {folder} is not a checkpoint folder (no trainer_state.json)")
    torn = faults(folder, manifest_needed=False)
    if torn:
        raise InputError(
            f"resume_from_checkpoint: {folder} is torn: {_shown(torn)}. Resume from another checkpoint; 'true' takes "
            "the last complete one"
        )
    return folder


def check_checkpoint(
    checkpoint: str,
    optimizer: str,
    processes: int | None = None,
    distributed_type: str | None = None,
    learning_rate: float | None = None,
) -> None:
    """Refuse to resume from a checkpoint that does not fit the run, before anything is loaded or written.

    Args:
        checkpoint: the folder.
        optimizer: the `--optim` name of the run.
        processes: how many processes run now; None leaves that out.
        distributed_type: Accelerate's name of how they run ("FSDP", "DEEPSPEED", ...); None leaves that out.
        learning_rate: that of the run; None leaves that out.

    Raises:
        InputError: the checkpoint was saved by another optimizer, with another learning rate, under another kind of
            launch or, with ZeRO, by another number of processes; or it holds no optimizer state.
    """
    kind = kind_of(checkpoint)
    if kind == WEIGHTS:
        raise InputError(
            f"{checkpoint} holds no optimizer.pt, nor an optimizer's state of FSDP2 or DeepSpeed, so training cannot "
            "continue from it exactly"
        )
    if distributed_type is not None:
        running = {"FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed"}.get(distributed_type, _LAUNCHERS[PLAIN])
        if kind != PLAIN and running != _LAUNCHERS[kind]:
            raise InputError(
                f"{checkpoint} was saved under {_LAUNCHERS[kind]} and cannot continue under {running}. Launch as it "
                f"was, or write a plain checkpoint with `hf-momentum export {checkpoint} OUT --resumable` and resume "
                "from OUT"
            )
        if kind == PLAIN and running != _LAUNCHERS[kind] and optimizer not in OPTIMIZERS:
            raise InputError(
                f"{checkpoint} was saved under {_LAUNCHERS[kind]}, and the state of {optimizer} cannot be cut up for "
                f"{running}. Launch as it was; the optimizers of this package continue under any layout"
            )
    ranks = len(optimizer_files(checkpoint))
    if processes is not None and ranks and ranks != processes:
        raise InputError(
            f"{checkpoint} was saved by {ranks} processes under ZeRO, and {processes} run now. Run {ranks}, or write "
            f"a checkpoint that any number can continue with `hf-momentum export {checkpoint} OUT --resumable` and "
            "resume from OUT"
        )
    if kind == DEEPSPEED:
        vet_deepspeed(deepspeed_files(checkpoint))
    if kind == FSDP_SHARDED:
        vet_distributed(checkpoint)
    saved = saved_algorithms(checkpoint, kind)
    wanted = {OPTIMIZERS[optimizer].cls.__name__ if optimizer in OPTIMIZERS else None}
    if saved != wanted:
        name = " and ".join(str(one) for one in saved if one) or "an optimizer of another package"
        raise InputError(
            f"{checkpoint} was saved by {name}, not by {optimizer}; resume with the optimizer that saved it, or train "
            "from the start"
        )
    rates = _scheduled_rates(Path(checkpoint))
    if learning_rate is not None and rates and learning_rate not in rates:
        # The scheduler's state has it, so the Trainer would go on with the old one, and the report would name the new.
        known = " and ".join(f"{rate:g}" for rate in sorted(rates))
        raise InputError(
            f"{checkpoint} continues with the learning rate that it was saved with, {known}, not {learning_rate:g}; "
            "resume with that one, or train from the start"
        )


def _scheduled_rates(folder: Path) -> set[float]:
    """The learning rates that a checkpoint's scheduler starts from; none where it does not say."""
    import torch

    path = folder / "scheduler.pt"
    state = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}
    return {float(rate) for rate in state.get("base_lrs", ())}


def saved_algorithms(checkpoint: str | os.PathLike[str], kind: str) -> set[str | None]:
    """Which of our optimizers saved a checkpoint, by the groups' key "algorithm"; {None} for any other optimizer.

    Only headers and small entries are read; the state's tensors stay on disk.
    """
    folder = Path(checkpoint)
    if kind == FSDP_SHARDED:
        return _algorithms_in_distributed(folder / "optimizer_0")
    return {group.get("algorithm") for group in _groups(folder, kind)}


def _groups(folder: Path, kind: str) -> list[dict[str, Any]]:
    import torch

    if kind in (PLAIN, FSDP_FULL):
        path = folder / ("optimizer.pt" if kind == PLAIN else "optimizer.bin")
        if not path.is_file():
            raise InputError(f"{folder} holds no {path.name}, so training cannot continue from it exactly")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    ranks = optimizer_files(folder)
    if ranks:
        return base_state(load_deepspeed(ranks[0][1]))["param_groups"]
    tag = (folder / "latest").read_text(encoding="utf-8").strip()  # ZeRO stage 0: whole tensors, in the model's file
    files = sorted((folder / tag).glob("mp_rank_*_model_states.pt"))
    if not files:
        raise InputError(f"{folder} holds no optimizer states of DeepSpeed, so training cannot continue from it")
    content = load_deepspeed(files[0])["optimizer"]
    return content.get("optimizer_state_dict", content)["param_groups"]


def load_deepspeed(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed, mapped from disk, without running code: of its own classes a few known ones are let in.

    Raises:
        InputError: the file names another function or class, so that reading it might run code.
    """
    import torch

    vet_deepspeed([path])
    known = [_found(name) for name in _PICKLED_BY_DEEPSPEED]
    with torch.serialization.safe_globals(known):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def deepspeed_files(checkpoint: str | os.PathLike[str]) -> list[Path]:
    """All files that DeepSpeed would unpickle."""
    folder = Path(checkpoint)
    return sorted((folder / (folder / "latest").read_text(encoding="utf-8").strip()).glob("*.pt"))


def vet_deepspeed(files: Iterable[Path]) -> None:
    """Refuse files that name a function or class beside tensors and what DeepSpeed itself pickles.

    DeepSpeed reads its checkpoints by unpickling whatever is in them, so they are looked at before it does.

    Raises:
        InputError: one of them does.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    for path in files:
        foreign = sorted(set(get_unsafe_globals_in_checkpoint(path)) - set(_PICKLED_BY_DEEPSPEED))
        if foreign:
            raise InputError(
                f"{path} names {foreign[0]}, which is no part of a checkpoint: reading the file might run code. If you "
                "trust where it comes from, convert it with DeepSpeed's own zero_to_fp32.py"
            )


def _found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def base_state(content: dict[str, Any]) -> dict[str, Any]:
    """The state dict of the optimizer inside DeepSpeed's wrapper, from what one process of a ZeRO run saved.

    Example:
        >>> base_state({"optimizer_state_dict": {"base_optimizer_state": {"state": {}, "param_groups": []}}})
        {'state': {}, 'param_groups': []}
    """
    wrapped = content["optimizer_state_dict"]
    # Stages 1 and 2 use the first name, stage 3 the second.
    return wrapped["base_optimizer_state"] if "base_optimizer_state" in wrapped else wrapped["optimizer_state_dict"]


def _algorithms_in_distributed(folder: Path) -> set[str | None]:
    if not folder.is_dir():
        raise InputError(f"{folder.parent} holds no {folder.name}/, so training cannot continue from it exactly")
    entries = load_distributed(folder, lambda key: key.endswith(".algorithm") and ".param_groups." in key)
    return set(entries.values()) or {None}


class _TableReader(pickle.Unpickler):
    """Knows the classes of which the table of a distributed checkpoint is made, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        known = (module, name) in _PICKLED_IN_METADATA
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise InputError(
            f"a checkpoint's .metadata names {module}.{name}, which is no part of one: reading it might run code. Do "
            "not use this checkpoint unless you trust where it comes from"
        )


def read_metadata(folder: Path) -> Any:
    """The table of a folder that torch's distributed checkpoint wrote, without running code that it may name.

    torch itself unpickles whatever is in it.

    Raises:
        InputError: it names a function or class that is no part of such a table.
    """
    with (folder / ".metadata").open("rb") as stream:
        return _TableReader(stream).load()


def vet_distributed(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse shards of FSDP that would run code when Accelerate and torch load them.

    Raises:
        InputError: a table, or an entry that is no tensor, names a function or class.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    for folder in (Path(checkpoint) / name for name in _DISTRIBUTED):
        if folder.is_dir():
            entries = read_metadata(folder).state_dict_metadata
            load_distributed(folder, lambda key, held=entries: isinstance(held[key], BytesStorageMetadata))


def load_distributed(folder: Path, chosen: Any = None) -> dict[str, Any]:
    """Entries of a folder that torch's distributed checkpoint wrote, whole, in one process without a process group.

    Args:
        folder: such as `checkpoint-40/pytorch_model_fsdp_0`.
        chosen: takes a key and says whether to load it; all are loaded without it.

    Returns:
        Tensors and other values by their full key, such as `model.lm_head.weight`.

    Raises:
        InputError: the table, or an entry that is no tensor, names a function or class, so that reading it might run
            code.
    """
    import torch
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            torch.load(value, weights_only=True)  # raises where the overridden method would run code
            value.seek(0)
            super().load_bytes(read_item, value)

    wanted: dict[str, Any] = {}
    for key, entry in read_metadata(folder).state_dict_metadata.items():
        if chosen is not None and not chosen(key):
            continue
        if isinstance(entry, TensorStorageMetadata):
            wanted[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        elif isinstance(entry, BytesStorageMetadata):
            wanted[key] = None
    if wanted:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist asks for
            try:
                load(wanted, storage_reader=FileSystemReader(folder), planner=Planner(), no_dist=True)
            except CheckpointException as error:
                if not any(isinstance(cause, pickle.UnpicklingError) for cause, _ in error.failures.values()):
                    raise
                raise InputError(
                    f"{folder} has an entry that names a function or class, which is no part of a checkpoint: reading "
                    "it might run code. Do not use this checkpoint unless you trust where it comes from"
                ) from error
    return wanted


def rotate(
    output_dir: str | os.PathLike[str], limit: int | None, keep: Iterable[str | os.PathLike[str] | None]
) -> None:
    """Delete old checkpoints until at most `limit` are left: torn ones first, then the longest complete.

    transformers' own rotation counts a torn checkpoint like any other, and can delete the last complete one for it.

    Args:
        output_dir: the run's folder.
        limit: how many to keep; None or 0 for all.
        keep: checkpoints that stay in any case, such as the newest and the best.
    """
    if not limit or limit < 0:
        return
    protected = {Path(path).resolve() for path in keep if path is not None}
    found = checkpoints_in(output_dir)[::-1]

    def age(path: Path) -> tuple[int, int]:
        return (0, 0) if faults(path) else (1, (path / MANIFEST).stat().st_mtime_ns)

    surplus = len(found) - max(limit, len(protected))
    for path in sorted(found, key=age):
        if surplus <= 0:
            return
        if path.resolve() not in protected:
            shutil.rmtree(path, ignore_errors=True)
            surplus -= 1
