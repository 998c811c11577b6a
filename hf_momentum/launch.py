"""Start a recipe on several processes: find the launcher's file, check it, and hand over to `accelerate launch`."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hf_momentum.errors import InputError
from hf_momentum.training.processes import launched_processes
from hf_momentum.training.recipe import find_shipped

_WHOLE_NUMBERS = {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}

# The launcher's options that `hf-momentum train` takes and passes on.
LAUNCHER_FLAGS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")


@dataclass(frozen=True)
class Launch:
    """A launcher's file and the options that win over it, checked.

    Attributes:
        config: the file for `accelerate launch --config_file`.
        flags: options for `accelerate launch`, by name.
    """

    config: Path
    flags: Mapping[str, str]

    def command(self, words: Sequence[str], command: str = "train") -> list[str]:
        """The command line that runs a command of `hf-momentum` with `words` in every process.

        Example:
            >>> Launch(Path("ddp.yaml"), {"num_processes": "2"}).command(["--config", "quickstart"])[3:]
            ['--config_file', 'ddp.yaml', '--num_processes=2', '-m', 'hf_momentum', 'train', '--config', 'quickstart']
        """
        options = [f"--{name}={value}" for name, value in self.flags.items()]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(self.config), *options]
        return [*launcher, "-m", "hf_momentum", command, *words]

    def replace_this_process(self, words: Sequence[str], command: str = "train") -> NoReturn:
        """Become the launcher: its exit status and signals are this process's, and no parent keeps a GPU's memory."""
        whole = self.command(words, command)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(whole[0], whole)


def relaunch(
    command: str, words: Sequence[str], accelerate_config: str | None, flags: Mapping[str, str | None]
) -> None:
    """Hand a command over to `accelerate launch`, if it was told to; else do nothing.

    Args:
        command: of `hf-momentum`.
        words: as typed after it, the launcher's options among them.
        accelerate_config: a file or a shipped name; None to stay in this process.
        flags: those of `LAUNCHER_FLAGS`, None where not given.

    Raises:
        InputError: the launch is not possible, or `flags` are given without `accelerate_config`.

    Example:
        >>> relaunch("diagnose", ["--model", "mine"], None, {})
    """
    start = asked_launch(accelerate_config, flags)
    if start is None:
        return
    launcher = {f"--{name}" for name in (*LAUNCHER_FLAGS, "accelerate_config")}
    rest, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in launcher:
            rest.append(word)
        skip = not skip and word in launcher
    start.replace_this_process(rest, command)


def flags_of(known: Mapping[str, Any]) -> dict[str, str | None]:
    """The launcher's options among all options of a command.

    Example:
        >>> flags_of({"model": "mine", "num_processes": "2"})["num_processes"]
        '2'
    """
    return {name: known.get(name) for name in LAUNCHER_FLAGS}


def asked_launch(accelerate_config: str | None, flags: Mapping[str, str | None]) -> Launch | None:
    """The launch that was asked for, checked; None to stay in this process.

    Raises:
        InputError: the launch is not possible, or `flags` are given without `accelerate_config`.

    Example:
        >>> asked_launch(None, {"num_processes": None}) is None
        True
    """
    if accelerate_config is not None:
        return prepare_launch(accelerate_config, flags)
    for name, value in flags.items():
        if value is not None:
            raise InputError(f"--{name} is for a launch; name one with --accelerate_config, such as ddp or fsdp2")
    return None


def prepare_launch(accelerate_config: str, flags: Mapping[str, str | None]) -> Launch:
    """A launch from what was typed.

    Args:
        accelerate_config: a path, or the name of a file shipped with the package such as "fsdp2".
        flags: those of `LAUNCHER_FLAGS`, None where not given.

    Raises:
        InputError: no such file, a file that Accelerate cannot read, an option out of range, or numbers that do not fit
            each other.

    Example:
        >>> sorted(prepare_launch("fsdp2", {"num_processes": "4"}).flags.items())
        [('main_process_port', '0'), ('num_processes', '4')]
    """
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    if launched_processes() > 1:
        raise InputError(
            "--accelerate_config starts a launch, but this process already belongs to one; leave the option out here"
        )
    config = find_accelerate_config(accelerate_config)
    given = {name: value for name, value in flags.items() if value is not None}
    for name, least in _WHOLE_NUMBERS.items():
        if name in given:
            _check_whole(name, given[name], least)
    try:
        loaded = load_config_from_file(str(config))
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{config} is not a file for accelerate launch: {' '.join(str(error).split())}") from error
    kind = loaded.distributed_type
    processes = int(given.get("num_processes", loaded.num_processes))
    machines = int(given.get("num_machines", loaded.num_machines))
    if kind == DistributedType.NO and processes > 1:
        raise InputError(f"num_processes is {processes}, but {config.name} starts a single process; take ddp or fsdp2")
    if kind == DistributedType.DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"{config.name} needs DeepSpeed, which is not installed; run DS_BUILD_OPS=0 pip install "
            "'hf-momentum[deepspeed]'"
        )
    rank = int(given.get("machine_rank", loaded.machine_rank))
    if rank >= machines:
        raise InputError(f"machine_rank {rank} does not exist among {machines} machines; they are counted from 0")
    if processes % machines:
        raise InputError(f"num_processes {processes} (over all machines) cannot be shared by {machines} machines")
    sizes = [
        int(loaded.parallelism_config.get(f"parallelism_config_dp_{part}_size", 1)) for part in ("replicate", "shard")
    ]
    if loaded.parallelism_config and sizes[0] * sizes[1] != processes:
        raise InputError(
            f"num_processes is {processes}, but {config.name} makes {sizes[0]} copies of the model over {sizes[1]} "
            f"processes each; start {sizes[0] * sizes[1]}, or edit a copy of {config}"
        )
    if machines > 1:
        for name in ("main_process_ip", "main_process_port"):
            if name not in given and getattr(loaded, name) is None:
                raise InputError(f"{config.name} is for {machines} machines, so it needs --{name}, the first machine's")
    elif "main_process_port" not in given and loaded.main_process_port is None:
        given["main_process_port"] = "0"  # the launcher takes a free one; its own default is always the same
    return Launch(config, given)


def find_accelerate_config(name: str) -> Path:
    """The file that `--accelerate_config` means: a path, or one shipped with the package, by name.

    Raises:
        InputError: neither exists; the message lists the shipped names.

    Example:
        >>> find_accelerate_config("zero3").name
        'zero3.yaml'
    """
    return find_shipped(name, "accelerate_configs", "accelerate_config")


def _check_whole(name: str, value: str, least: int) -> None:
    if not value.isdecimal() or int(value) < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
