"""What `hf-momentum doctor` looks at: each function looks at one thing and says what it found, with the next step."""

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hf_momentum.errors import InputError, TrainingStopped

State = Literal["ok", "note", "refused"]

_LEAST_FREE = 2 * 2**30
_SECONDS = 4.0


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        topic: versions, devices, caches, hub, recipe or launch.
        name: what was looked at.
        state: "ok"; "note" for what may be a pity; "refused" for what will stop a run.
        what: what was found.
        next: what to do about it; empty where nothing is to be done.
    """

    topic: str
    name: str
    state: State
    what: str
    next: str = ""

    def __str__(self) -> str:
        """One line for people.

        Example:
            >>> str(Finding("versions", "trl", "note", "not installed", "pip install 'hf-momentum[trl]'"))
            "note     trl: not installed -> pip install 'hf-momentum[trl]'"
        """
        return f"{self.state:<8} {self.name}: {self.what}" + (f" -> {self.next}" if self.next else "")


def versions(distribution: str = "hf-momentum") -> Iterator[Finding]:
    """Python and every package that the installed metadata ask for, extras included, against their bounds.

    Example:
        >>> next(versions()).name
        'Python'
    """
    here = importlib.metadata.metadata(distribution)
    accepted, python = SpecifierSet(here["Requires-Python"] or ""), platform.python_version()
    yield Finding(
        "versions",
        "Python",
        "ok" if accepted.contains(python, prereleases=True) else "refused",
        python if accepted.contains(python, prereleases=True) else f"{python}, but {accepted} is needed",
        "" if accepted.contains(python, prereleases=True) else "make an environment with a newer Python",
    )
    yield Finding("versions", distribution, "ok", importlib.metadata.version(distribution))
    for requirement, extra in _requirements(distribution):
        yield _version(requirement, extra, distribution)


def _requirements(distribution: str) -> Iterator[tuple[Requirement, str]]:
    """What is needed always, under the name "", and what each extra adds, but those of developers."""
    wanted = [Requirement(text) for text in importlib.metadata.requires(distribution) or []]
    extras = importlib.metadata.metadata(distribution).get_all("Provides-Extra") or []
    for extra in ["", *(name for name in extras if name not in ("dev", "docs"))]:
        for requirement in wanted:
            if requirement.name == distribution:
                continue
            belongs = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if belongs and (extra == "" or not always):
                yield requirement, extra


def _version(requirement: Requirement, extra: str, distribution: str) -> Finding:
    install = f"pip install '{distribution}[{extra}]'" if extra else f"pip install '{requirement}'"
    if requirement.name == "deepspeed":
        install = f"DS_BUILD_OPS=0 {install}"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "versions",
            requirement.name,
            "note" if extra else "refused",
            f"not installed (of {extra or 'the core'})",
            install,
        )
    if requirement.specifier.contains(version, prereleases=True):
        return Finding("versions", requirement.name, "ok", version)
    return Finding(
        "versions",
        requirement.name,
        "note" if extra else "refused",
        f"{version}, but {requirement.specifier} is supported",
        f"pip install '{requirement.name}{requirement.specifier}'",
    )


def devices() -> Iterator[Finding]:
    """The devices, their memory and formats, and which path an optimizer's step takes on them, and why."""
    import torch

    from hf_momentum.kernels import choice
    from hf_momentum.training.hardware import find_hardware

    hardware = find_hardware()
    formats = "bfloat16" if hardware.bf16 else "float16, no bfloat16" if hardware.fp16 else "float32"
    yield Finding("devices", "training runs on", "ok", f"{hardware}, in {formats}")
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for kind in kinds:
        one = torch.zeros(1, device=kind)
        obstacle = choice.obstacle(one, one)
        if obstacle:
            yield Finding(
                "devices", f"steps on {kind}", "note", f"plain torch, because of: {obstacle}", "slower, not wrong"
            )
        else:
            yield Finding("devices", f"steps on {kind}", "ok", choice.name_of(torch.device(kind)))


def caches() -> Iterator[Finding]:
    """Where models and datasets are kept, and how much room there is."""
    from datasets import config
    from huggingface_hub import constants

    from hf_momentum.training.arguments import ModelArguments

    places = {
        "models": (constants.HF_HUB_CACHE, "HF_HOME"),
        "datasets": (str(config.HF_DATASETS_CACHE), "HF_HOME"),
        "hf-momentum": (str(Path(ModelArguments().cache_dir).expanduser()), "--cache_dir"),
    }
    for name, (place, elsewhere) in places.items():
        there = next(path for path in (Path(place), *Path(place).parents) if path.exists())
        free = shutil.disk_usage(there).free
        what = f"{place}, {free / 2**30:.0f} GiB free"
        if not os.access(there, os.W_OK):
            yield Finding(
                "caches", name, "refused", f"{what}, but it cannot be written", f"set {elsewhere} to a folder of yours"
            )
        elif free < _LEAST_FREE:
            yield Finding("caches", name, "note", what, f"make room, or set {elsewhere} to another disk")
        else:
            yield Finding("caches", name, "ok", what)


def hub() -> Iterator[Finding]:
    """Whether the Hub answers, and as whom; the token itself is never shown."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        yield Finding(
            "hub",
            "Hub",
            "note",
            "offline mode (HF_HUB_OFFLINE is set): only what is cached can be had",
            "unset HF_HUB_OFFLINE",
        )
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # the client's library may change, and every failure means the same here
        yield Finding(
            "hub",
            "Hub",
            "note",
            f"{constants.ENDPOINT} does not answer ({type(error).__name__})",
            "check the network and its proxy, or set HF_HUB_OFFLINE=1 and name local folders",
        )
        return
    yield Finding("hub", "Hub", "ok", f"{constants.ENDPOINT} answers")
    if get_token() is None:
        yield Finding("hub", "login", "note", "nobody is logged in: public repositories only, no push", "hf auth login")
        return
    try:
        name = HfApi().whoami()["name"]
    except Exception as error:  # as above
        yield Finding("hub", "login", "note", f"the token is not accepted ({type(error).__name__})", "hf auth login")
    else:
        yield Finding("hub", "login", "ok", f"as {name}")


def recipe(config: str, overrides: list[str]) -> Iterator[Finding]:
    """Whether a recipe loads, its local data can be read, and its model fits into memory."""
    from hf_momentum.training.recipe import load_recipe
    from hf_momentum.training.sources import READERS, Source, named_splits

    try:
        loaded = load_recipe(config, overrides)
    except InputError as error:
        yield Finding("recipe", config, "refused", str(error))
        return
    yield Finding("recipe", config, "ok", f"loads; it trains with {_optim_of(loaded)}")
    sources = [loaded.data.train_dataset, *filter(None, [loaded.data.validation_dataset])]
    sources += [source for _, _, source in named_splits(loaded.data)]
    for source in dict.fromkeys(sources):
        place = Source.parse(source).place
        if not (place.startswith("stdlib:") or Path(place).suffix in READERS or Path(place).exists()):
            continue  # of the Hub: to look would be to download it
        try:
            rows = len(Source.parse(source).load())
        except InputError as error:
            yield Finding("recipe", source, "refused", str(error))
        else:
            yield Finding(
                "recipe", source, "ok" if rows else "refused", f"{rows:,} rows", "" if rows else "give it rows"
            )
    yield from _model(loaded)


def _model(loaded: Any) -> Iterator[Finding]:
    from transformers import AutoConfig

    from hf_momentum.training.arguments import TRL_TASKS
    from hf_momentum.training.fitting import sizes_of
    from hf_momentum.training.hardware import find_hardware
    from hf_momentum.training.memory import estimate, state_bytes
    from hf_momentum.training.new_recipe import loader_of

    name = loaded.model.model_name_or_path
    if name == "scratch":
        return
    try:
        config = AutoConfig.from_pretrained(name, revision=loaded.model.model_revision)
    except (OSError, ValueError, KeyError) as error:
        yield Finding(
            "recipe",
            name,
            "refused",
            f"its config cannot be read here ({type(error).__name__})",
            "name a folder, or a Hub model with a network",
        )
        return
    hardware, training = find_hardware(), loaded.training
    size = sizes_of(config, loader_of(loaded.model.task))[0].get(loaded.peft.lora)
    try:
        state = state_bytes(_optim_of(loaded), training.optim_args)
    except InputError:
        size = None
    if size is None:
        yield Finding("recipe", name, "ok", "its config can be read; its memory is not known for this architecture")
        return
    trl = loaded.model.task in TRL_TASKS
    length = (training.max_length or loaded.data.block_size) if trl else loaded.data.block_size
    needed = estimate(
        size,
        tokens=training.per_device_train_batch_size * length,
        state=state,
        dtype="float32" if loaded.model.model_dtype == "auto" else loaded.model.model_dtype,
        autocast=training.bf16 or training.fp16,
        four_bit=loaded.model.load_in_4bit,
        checkpointing=training.gradient_checkpointing,
    )
    fits = needed.total <= hardware.memory
    advice = "" if fits else "lower per_device_train_batch_size, or let `hf-momentum init` choose settings"
    yield Finding("recipe", name, "ok" if fits else "note", f"{needed} on {hardware}", advice)


def launch(name: str, flags: Mapping[str, str | None], optim: str | None) -> Iterator[Finding]:
    """Whether a launch is possible here, and whether our optimizers would be exact under it."""
    import torch
    from accelerate.commands.config.config_args import load_config_from_file

    from hf_momentum.integrations import OPTIMIZERS
    from hf_momentum.launch import prepare_launch

    try:
        prepared = prepare_launch(name, flags)
    except InputError as error:
        yield Finding("launch", name, "refused", str(error))
        return
    loaded = load_config_from_file(str(prepared.config))
    kind = loaded.distributed_type.value
    processes = int(prepared.flags.get("num_processes", loaded.num_processes))
    yield Finding("launch", name, "ok", f"{kind}, {processes} processes over all machines")
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    here = processes // max(1, int(prepared.flags.get("num_machines", loaded.num_machines)))
    if kind in ("FSDP", "DEEPSPEED") and not count:
        yield Finding(
            "launch",
            kind,
            "refused",
            "this machine has no accelerator, and Accelerate then leaves sharding out",
            "launch with ddp or single",
        )
    elif count and here > count:
        yield Finding(
            "launch", "devices", "refused", f"{here} processes for {count} devices", f"give --num_processes {count}"
        )
    if optim is not None and optim not in OPTIMIZERS:
        yield Finding(
            "launch", optim, "ok", "not one of ours, so it is up to Accelerate whether it runs under this launch"
        )
        return
    try:
        _ask_those_who_refuse(loaded)
    except (InputError, TrainingStopped) as error:
        yield Finding("launch", kind, "refused", str(error))
    else:
        yield Finding("launch", kind, "ok", "our optimizers are exact under it")


def _ask_those_who_refuse(loaded: Any) -> None:
    """Hand to the code that refuses a layout in training what this launch would hand it.

    Raises:
        InputError: DeepSpeed's settings, or the backend.
        UnsupportedLayoutError: FSDP1, or parallelism beside the data.
    """
    import torch

    from hf_momentum.integrations.deepspeed_hook import check_config
    from hf_momentum.integrations.transformers_hook import require_supported_backend
    from hf_momentum.sharding.layout import require_data_parallel, require_whole_tensor

    require_supported_backend(loaded.distributed_type)
    if loaded.distributed_type.value == "DEEPSPEED":
        check_config(_deepspeed_config(loaded.deepspeed_config))
    if loaded.distributed_type.value == "FSDP" and int(loaded.fsdp_config.get("fsdp_version", 1)) == 1:
        flat = torch.zeros(1)
        flat._fsdp_flattened = True  # type: ignore[attr-defined]
        require_whole_tensor(flat, known=lambda tensor: True)
    sizes = {
        dimension: int((loaded.parallelism_config or {}).get(f"parallelism_config_{dimension}_size", 1))
        for dimension in ("tp", "cp")
    }
    require_data_parallel([dimension for dimension, size in sizes.items() if size > 1])


def _deepspeed_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """What Accelerate would hand to DeepSpeed, as far as it can be refused."""
    if given.get("deepspeed_config_file"):
        path = Path(given["deepspeed_config_file"])
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"deepspeed_config_file {path} cannot be read ({type(error).__name__})") from error
    parts = {part: {"device": given.get(f"{part}_device", "none")} for part in ("offload_optimizer", "offload_param")}
    return {"zero_optimization": {"stage": given.get("zero_stage"), **parts}}


def _optim_of(loaded: Any) -> str:
    return str(getattr(loaded.training.optim, "value", loaded.training.optim))
