"""Any checkpoint of a Trainer, of shards or flat partitions too, as a plain folder that `from_pretrained` reads.

It needs no GPU and no process group, but memory for two copies of the weights or, with `resumable`, of the optimizer's
state.
"""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_momentum.errors import InputError
from hf_momentum.training.checkpoints import (
    DEEPSPEED,
    FSDP_FULL,
    FSDP_SHARDED,
    WEIGHTS,
    base_state,
    deepspeed_files,
    faults,
    kind_of,
    load_deepspeed,
    load_distributed,
    optimizer_files,
    read_metadata,
    vet_deepspeed,
    write_manifest,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What makes a folder of weights a model: configurations, tokenizer and processor, code of custom models, the card.
_DESCRIPTIONS = (
    *("config.json", "generation_config.json", "adapter_config.json", "README.md"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model"),
    *("chat_template*", "additional_chat_templates/*", "preprocessor_config.json", "processor_config.json"),
    *("image_processor_config.json", "video_preprocessor_config.json", "*.py"),
)
_WRAPPERS = re.compile(r"(^|\.)(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)(?=\.)")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def export(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], dtype: str | None = None, resumable: bool = False
) -> Path:
    """Write a checkpoint's weights, configurations, tokenizer and card as a plain folder.

    The folder appears under its name only when it is whole.

    Args:
        checkpoint: one of a single process, DDP, FSDP2 (full or sharded) or DeepSpeed (ZeRO 0 to 3).
        out: the folder to write; it must not exist, or be empty.
        dtype: of the floating-point weights, "float32", "bfloat16" or "float16"; None leaves them as saved (ZeRO saves
            its float32 copies).
        resumable: write the optimizer's, scheduler's and trainer's state as well, as one process would have.

    Returns:
        `out`.

    Raises:
        InputError: the checkpoint is torn, lacks its configuration or cannot be converted, or `out` is not empty.

    Example:
        >>> export("no such folder", "out")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: no such folder is not a folder
    """
    source, target = Path(checkpoint), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not accepted; one of {', '.join(DTYPES)}")
    if not source.is_dir():
        raise InputError(f"{source} is not a folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty; name a folder that does not exist yet")
    torn = [fault for fault in faults(source, manifest_needed=False) if resumable or "trainer_state" not in fault]
    if torn:
        raise InputError(f"{source} is torn: {', '.join(torn[:3])}. Export another checkpoint")
    if resumable and kind_of(source) == WEIGHTS:
        raise InputError(f"{source} holds no optimizer state; export it without --resumable")

    partial = target.with_name(f".{target.name}.hf-momentum-export")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        adapter = _describe(source, partial)
        weights = read_weights(source)
        if dtype is not None:
            weights = {
                name: value.to(DTYPES[dtype]) if value.is_floating_point() else value for name, value in weights.items()
            }
        _write_weights(weights, partial, adapter)
        if resumable:
            _write_resumable(source, partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def read_weights(checkpoint: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The whole weights of a checkpoint on the CPU, under the names that `from_pretrained` expects.

    With LoRA only the adapters, as PEFT names them in a file.

    Raises:
        InputError: there are none, or they cannot be put together.
    """
    folder = Path(checkpoint)
    kind = kind_of(folder)
    adapter = _above(folder, "adapter_config.json") is not None
    if kind == FSDP_SHARDED:
        entries = load_distributed(folder / "pytorch_model_fsdp_0")
        found = {key.removeprefix("model."): value for key, value in entries.items()}
    elif kind == DEEPSPEED and optimizer_files(folder):
        found = _of_zero(folder, adapter)
    else:
        found = _of_files(folder)
    plain = {plain_name(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if adapter:
        plain = {_adapter_name(name): value for name, value in plain.items() if _of_adapter(name)}
    if not plain:
        raise InputError(f"{folder} holds no weights that can be exported")
    return plain


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP, torch.compile and activation checkpointing put around modules.

    Example:
        >>> plain_name("module._fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    return _WRAPPERS.sub("", name).removeprefix("module.").removeprefix(".")


def file_name(name: str) -> str:
    """The name of a model's parameter in the file that `from_pretrained` reads; an adapter's as PEFT writes it.

    Example:
        >>> file_name("base_model.model.layers.0.q_proj.lora_A.default.weight")
        'base_model.model.layers.0.q_proj.lora_A.weight'
    """
    plain = plain_name(name)
    return _adapter_name(plain) if _of_adapter(plain) else plain


def _of_adapter(name: str) -> bool:
    return ".original_module." not in name and (
        "lora_" in name or ".modules_to_save." in name or name.startswith("base_model.model.")
    )


def _adapter_name(name: str) -> str:
    """As PEFT writes a name to a file: without that of the adapter, and without the holder of whole trained modules."""
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return re.sub(r"(\.lora_[A-Za-z_]+)\.(?!weight$|bias$)[^.]+(?=\.|$)", r"\1", name)


def _of_files(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    for stem in ("adapter_model", "model"):
        files = sorted(folder.glob(f"{stem}.safetensors")) or sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        if files:
            return {name: value for file in files for name, value in load_file(file).items()}
    for name in ("pytorch_model_fsdp.bin", "adapter_model.bin", "pytorch_model.bin"):
        if (folder / name).is_file():
            return torch.load(folder / name, map_location="cpu", mmap=True, weights_only=True)
    raise InputError(f"{folder} holds no weights that can be exported")


def _of_zero(folder: Path, adapter: bool) -> dict[str, torch.Tensor]:
    quiet = contextlib.redirect_stdout(io.StringIO())  # it reports its progress in lines of no use here
    try:
        with quiet:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise InputError(
            f"{folder} is a checkpoint of DeepSpeed, which is not installed here: pip install 'hf-momentum[deepspeed]'"
        ) from error
    vet_deepspeed(deepspeed_files(folder))
    zero = load_deepspeed(optimizer_files(folder)[0][1])["ds_config"].get("zero_optimization", {})
    if zero.get("round_robin_gradients"):
        raise InputError(
            f"{folder} was saved with round_robin_gradients: true, whose order of parameters DeepSpeed does not "
            "record, so that names and weights cannot be matched. Train with round_robin_gradients: false"
        )
    with quiet:
        # The base model's weights were not trained and, with adapters, not saved.
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), exclude_frozen_parameters=adapter))


def _above(folder: Path, name: str) -> Path | None:
    """A file of the checkpoint, or else of the run's folder that contains it."""
    return next((path for path in (folder / name, folder.resolve().parent / name) if path.is_file()), None)


def _describe(source: Path, target: Path) -> bool:
    """Copy what describes the model; returns whether it is an adapter."""
    above = source.resolve().parent
    for pattern in _DESCRIPTIONS:
        # Code and tokenizer files belong together: those of the run's folder are taken only if the checkpoint has none.
        place = source if any(source.glob(pattern)) else above
        for path in sorted(place.glob(pattern)):
            if path.is_file() and not path.name.startswith("zero_to_"):
                copy = target / path.relative_to(place)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    adapter = (target / "adapter_config.json").is_file()
    if not adapter and not (target / "config.json").is_file():
        raise InputError(
            f"neither {source} nor the folder above has a config.json (a Trainer that shards writes none); copy that "
            f"of the base model into {source}"
        )
    card = target / "README.md"
    if not card.is_file():
        library = "peft" if adapter else "transformers"
        card.write_text(
            f"---\nlibrary_name: {library}\ntags: [hf-momentum]\n---\n\nWeights of `{source.name}`, exported by "
            f"`hf-momentum export`. Not evaluated for any use.\n",
            encoding="utf-8",
        )
    for picture in _PICTURE.findall(card.read_text(encoding="utf-8")):
        found_picture = above / picture
        if "://" not in picture and ".." not in Path(picture).parts and found_picture.is_file():
            (target / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found_picture, target / picture)
    return adapter


def _write_weights(weights: dict[str, torch.Tensor], target: Path, adapter: bool) -> None:
    if adapter:
        from safetensors.torch import save_file

        whole = {name: value.contiguous().clone() for name, value in weights.items()}
        save_file(whole, target / "adapter_model.safetensors", metadata={"format": "pt"})
        return
    from huggingface_hub import save_torch_state_dict

    weights = _compact(weights)
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    shared = _tie(weights) if config.get("tie_word_embeddings", False) else []
    save_torch_state_dict(weights, target, metadata={"format": "pt"}, shared_tensors_to_discard=shared or None)
    floating = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(floating) == 1:
        # transformers loads in the type that the configuration names, whatever the file holds.
        config.pop("torch_dtype", None)
        config["dtype"] = str(floating.pop()).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compact(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with storage of their own instead of views of ZeRO's flat partitions; shared ones stay shared."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    compact = {}
    for name, value in weights.items():
        if value.untyped_storage().nbytes() != value.numel() * value.element_size() or not value.is_contiguous():
            value = copies.setdefault((value.data_ptr(), value.shape), value.contiguous().clone())
        compact[name] = value
    return compact


def _tie(weights: dict[str, torch.Tensor]) -> list[str]:
    """Make an output head that equals the embedding share its memory; returns the names to leave out of the file.

    A gathered save leaves the head out, and shards hold it a second time.
    """
    heads = [name for name in weights if re.search(r"(^|\.)(lm_head|embed_out|decoder|output)\.weight$", name)]
    embeddings = [name for name in weights if name not in heads and re.search(r"(emb|wte)[^.]*(\.|$)", name)]
    left_out = []
    for head in heads:
        for name in embeddings:
            if weights[name].shape == weights[head].shape and torch.equal(weights[name], weights[head]):
                weights[head] = weights[name]
                left_out.append(head)
                break
    return left_out


def _write_resumable(source: Path, target: Path) -> None:
    state = optimizer_state(source)
    torch.save(state, target / "optimizer.pt")
    for name in ("scheduler.pt", "trainer_state.json"):
        if not (source / name).is_file():
            raise InputError(f"{source} holds no {name}, so no checkpoint that can be resumed follows from it")
        shutil.copyfile(source / name, target / name)
    for path in [*source.glob("rng_state*.pth"), *source.glob("scaler.pt")]:
        shutil.copyfile(path, target / path.name)
    if (source / "rng_state_0.pth").is_file():
        shutil.copyfile(source / "rng_state_0.pth", target / "rng_state.pth")
    step = json.loads((target / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    write_manifest(target, step, processes=1)


def optimizer_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The optimizer's state dict as a single process would have saved it, from any kind of checkpoint.

    Returns:
        Keys "state" and "param_groups", parameters by their number, whole tensors.

    Raises:
        InputError: a ZeRO checkpoint without its tables of pieces, or with pieces that leave gaps.
    """
    folder = Path(checkpoint)
    kind = kind_of(folder)
    if kind == FSDP_SHARDED:
        return by_number(_nested(folder / "optimizer_0"))
    if kind == FSDP_FULL:
        return by_number(torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True))
    if kind == DEEPSPEED:
        return _from_pieces(folder)
    return torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)


def _nested(folder: Path) -> dict[str, Any]:
    """The optimizer's state dict out of a distributed folder, whose keys are paths joined by dots."""
    paths: Mapping[str, tuple[Any, ...]] = read_metadata(folder).planner_data
    state: dict[str, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for key, value in load_distributed(folder).items():
        _, part, *rest = paths[key]
        if part == "state":
            state.setdefault(rest[0], {})[rest[1]] = value
        elif len(rest) == 2:
            groups.setdefault(int(rest[0]), {})[rest[1]] = value
        else:  # a list or tuple inside a group, taken apart by torch: put together in order of its index
            groups.setdefault(int(rest[0]), {}).setdefault(rest[1], {})[rest[2]] = value
    for group in groups.values():
        for key, value in group.items():
            if isinstance(value, dict) and all(isinstance(index, int) for index in value):
                ordered = [value[index] for index in sorted(value)]
                group[key] = ordered if key == "params" else tuple(ordered)
    return {"state": state, "param_groups": [groups[index] for index in sorted(groups)]}


def by_number(named: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose parameters have names, with the numbers that `torch.optim.Optimizer` gives them.

    Example:
        >>> by_number({"state": {"b": {"step": 1}}, "param_groups": [{"lr": 0.1, "params": ["a", "b"]}]})
        {'state': {1: {'step': 1}}, 'param_groups': [{'lr': 0.1, 'params': [0, 1]}, {'lr': 0.1, 'params': []}]}
    """
    number: dict[str, int] = {}
    groups = []
    for group in named["param_groups"]:
        for name in group["params"]:
            number[name] = len(number)
        groups.append({**group, "params": [number[name] for name in group["params"]]})
    state = {number[name]: entry for name, entry in named["state"].items()}
    return {"state": dict(sorted(state.items())), "param_groups": _two_groups(groups)}


def _two_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A Trainer makes one group with weight decay and one without; shards drop the second where it is empty."""
    if len(groups) != 1:
        return groups
    extra = {**groups[0], "params": []}
    if "weight_decay" in extra:
        extra["weight_decay"] = 0.0
    return [groups[0], extra]


def read_pieces(checkpoint: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The tables that say which piece of which tensor each process held, by rank.

    Raises:
        InputError: there are none, or not one for each process.
    """
    folder = Path(checkpoint)
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("pieces-rank*.json"))]
    tables.sort(key=lambda table: table["process"])
    if not tables:
        raise InputError(
            f"{folder} has no pieces-rank0.json: which parts of the tensors lie in its flat partitions is not "
            "recorded. It was saved by an optimizer of another package; export it without --resumable"
        )
    ranks = [table["process"] for table in tables]
    if ranks != list(range(tables[0]["processes"])):
        raise InputError(
            f"{folder} has tables of pieces for processes {ranks} of {tables[0]['processes']}; one of them is missing"
        )
    return tables


def _from_pieces(folder: Path) -> dict[str, Any]:
    files = dict(optimizer_files(folder))
    if not files:  # ZeRO-0 saves whole tensors, in the model's file
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        content = load_deepspeed(sorted((folder / tag).glob("mp_rank_*_model_states.pt"))[0])["optimizer"]
        whole_state: dict[str, Any] = content.get("optimizer_state_dict", content)
        return whole_state
    tables = read_pieces(folder)
    if len(files) != len(tables):
        raise InputError(f"{folder} has {len(files)} files of optimizer states for {len(tables)} tables of pieces")
    tensors = tables[0]["tensors"]
    whole: list[dict[str, Any]] = [{} for _ in tensors]
    filled: list[dict[str, int]] = [{} for _ in tensors]
    groups: list[dict[str, Any]] = []
    for table in tables:
        saved = base_state(load_deepspeed(files[table["process"]]))
        groups = groups or saved["param_groups"]
        for holder in table["holders"]:
            _cut(saved["state"].get(holder["state_index"], {}), holder["pieces"], tensors, whole, filled)
    kept = {(tensor["group"], name) for tensor, counts in zip(tensors, filled, strict=True) for name in counts}
    for tensor, counts in zip(tensors, filled, strict=True):
        # A flat partition carries state for all of its tensors or for none.
        for quantity in sorted(name for group, name in kept if group == tensor["group"]):
            count, numel = counts.get(quantity, 0), torch.Size(tensor["shape"]).numel()
            if count != numel:
                raise InputError(
                    f"{folder}: the pieces of {tensor['name']}'s {quantity} hold {count} of {numel} numbers"
                )
    order = sorted(range(len(tensors)), key=lambda index: (tensors[index]["group"], tensors[index]["position"]))
    number = {index: position for position, index in enumerate(order)}
    state = {number[index]: entry for index, entry in enumerate(whole) if entry}
    plain = [
        {**group, "params": [number[index] for index in order if tensors[index]["group"] == position]}
        for position, group in enumerate(groups)
    ]
    return {"state": dict(sorted(state.items())), "param_groups": _two_groups(plain)}


def _cut(
    entry: Mapping[Any, Any],
    pieces: Iterable[Mapping[str, int]],
    tensors: list[dict[str, Any]],
    whole: list[dict[str, Any]],
    filled: list[dict[str, int]],
) -> None:
    """Lay the pieces of one holder's state into the whole tensors."""
    pieces = list(pieces)
    reach = max((piece["start"] + piece["numel"] for piece in pieces), default=0)
    for quantity, value in entry.items():
        for piece in pieces:
            index, start, offset, numel = piece["tensor"], piece["start"], piece["from"], piece["numel"]
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                # A count of steps, the same for all that the holder carries. Each gets its own, or one step of the
                # optimizer would advance a shared one once for every parameter.
                whole[index][quantity] = value.clone() if isinstance(value, torch.Tensor) else value
                continue
            if value.dim() != 1 or value.numel() < reach:
                raise InputError(
                    f"state {quantity!r} of {tensors[index]['name']} has shape {tuple(value.shape)}, and its pieces "
                    f"reach to {reach}: it cannot be cut into tensors"
                )
            shape = torch.Size(tensors[index]["shape"])
            target = whole[index].setdefault(quantity, torch.zeros(shape, dtype=value.dtype))
            target.view(-1)[offset : offset + numel] = value[start : start + numel]
            filled[index][quantity] = filled[index].get(quantity, 0) + numel
