"""Settings under which a run fits into a machine's memory, the fastest first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_momentum.errors import InputError
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.training.hardware import Hardware
from hf_momentum.training.memory import GIB, Memory, Size, estimate, state_bytes

# Larger models are adapted with LoRA unless the user says otherwise.
_FULL_UP_TO = 600_000_000

LORA_R = 16


@dataclass(frozen=True)
class Fit:
    """What a recipe sets for memory's sake.

    Attributes:
        lora: whether adapters are trained instead of all weights.
        micro_batch: examples at a time on each device.
        accumulation: micro-batches of one step.
        checkpointing: whether blocks are computed again in the backward pass.
        state_dtype: of the optimizer's state; None where it is float32.
        dtype: of the weights.
        four_bit: whether the frozen weights are held in 4 bits.
        memory: what it needs on one device, where that is known.
        note: what the user should know; empty if all is well.
    """

    lora: bool
    micro_batch: int
    accumulation: int
    checkpointing: bool = False
    state_dtype: str | None = None
    dtype: str = "float32"
    four_bit: bool = False
    memory: Memory | None = None
    note: str = ""


def fit(
    sizes: Mapping[bool, Size],
    hardware: Hardware,
    *,
    optim: str,
    batch: int,
    length: int,
    lora: bool | None = None,
    checkpoints: bool = True,
    four_bits: bool = True,
) -> Fit:
    """The first settings that fit, from plain and fast to frugal; the effective batch is the same in all.

    Args:
        sizes: of the model in full (False) and with adapters (True); empty where the model is not known.
        hardware: where it runs.
        optim: the optimizer's name.
        batch: examples of one step over all devices.
        length: tokens of one example.
        lora: whether the user wants adapters; None to choose by size and memory.
        checkpoints: whether the model can compute blocks again.
        four_bits: whether the model may be held in 4 bits.

    Returns:
        The settings. If nothing fits, the most frugal ones with a note that says so.

    Example:
        >>> small = Size(135_000_000, 135_000_000, 106_000_000, 155_000, 576, 30, 49_152)
        >>> chosen = fit({False: small}, Hardware("GPU", "cuda", 1, 24 * GIB, True, False), optim="adamw_torch",
        ...     batch=16, length=512)
        >>> chosen.lora, chosen.micro_batch, chosen.accumulation
        (False, 16, 1)
        >>> chosen = fit({False: small}, Hardware("GPU", "cuda", 1, 4 * GIB, True, False), optim="adamw_torch",
        ...     batch=16, length=512)
        >>> chosen.micro_batch * chosen.accumulation, chosen.checkpointing, chosen.memory.total < 4 * GIB
        (16, True, True)
    """
    each = max(1, batch // hardware.count)
    if not sizes:
        micro = 1 if hardware.kind != "cpu" and checkpoints else min(4, each)
        return Fit(lora is not False, micro, each // micro, checkpointing=checkpoints and hardware.kind != "cpu")
    free = lora is None and True in sizes
    if lora is None:
        lora = sizes[False].parameters > _FULL_UP_TO and True in sizes
    last = None
    for option in _options(each, hardware, optim, lora, free, checkpoints, four_bits):
        size = sizes.get(option.lora, sizes[False])
        needed = estimate(
            size,
            tokens=option.micro_batch * length,
            state=_state(optim, option.state_dtype),
            dtype=option.dtype,
            autocast=hardware.bf16 or hardware.fp16,
            four_bit=option.four_bit,
            checkpointing=option.checkpointing,
        )
        last = replace(option, memory=needed)
        if needed.total <= hardware.usable:
            return last
    assert last is not None and last.memory is not None
    return replace(
        last,
        note=f"even so it needs {last.memory.total / GIB:.1f} GiB, and {hardware} leaves {hardware.usable / GIB:.1f}: "
        "share it over several GPUs with --accelerate_config fsdp2, shorten block_size, or take a smaller model",
    )


def _options(
    each: int, hardware: Hardware, optim: str, lora: bool, adaptable: bool, checkpoints: bool, four_bits: bool
) -> Iterator[Fit]:
    """Plain; with smaller micro-batches; recomputing; with less state; half-precision weights; adapters; 4 bits."""
    batches = [size for size in (each >> shift for shift in range(each.bit_length())) if size and each % size == 0]
    plain = [Fit(lora, size, each // size) for size in batches if size >= min(4, each)]
    yield from plain
    frugal = [Fit(lora, size, each // size, checkpointing=checkpoints) for size in batches]
    yield from frugal
    tightest = frugal[-1]
    if optim in OPTIMIZERS and not lora:
        yield replace(tightest, state_dtype="bfloat16")
        yield replace(tightest, state_dtype="int8")
    if hardware.bf16 and lora:
        yield from (replace(option, dtype="bfloat16") for option in frugal)
    if not lora and adaptable:
        yield from _options(each, hardware, optim, True, adaptable, checkpoints, four_bits)
    elif lora and four_bits and hardware.kind == "cuda":
        yield from (replace(option, four_bit=True, dtype="bfloat16") for option in frugal)


def _state(optim: str, dtype: str | None) -> float:
    """Bytes per trained weight; two float32 numbers where the optimizer is not known."""
    try:
        return state_bytes(optim, None if dtype is None else f"state_dtype={dtype}")
    except InputError:
        return 8.0


def sizes_of(config: Any, loader: Any) -> tuple[dict[bool, Size], bool]:
    """Sizes of a model in full and with adapters, counted on the meta device, and whether it can recompute blocks.

    Args:
        config: of the model.
        loader: transformers' Auto class of the task.

    Returns:
        The sizes, without the adapters' where they cannot be put on; empty for models that are no transformers.
    """
    sizes: dict[bool, Size] = {}
    checkpoints = False
    for lora in (False, True):
        try:
            with torch.device("meta"):
                model: nn.Module = loader.from_config(config)
                checkpoints = bool(getattr(model, "supports_gradient_checkpointing", False))
                if lora:
                    model = get_peft_model(model, LoraConfig(r=LORA_R, target_modules="all-linear"))  # type: ignore[arg-type]
            sizes[lora] = Size.of(model)
        except (AttributeError, ValueError, NotImplementedError, RuntimeError):
            break
    return sizes, checkpoints
