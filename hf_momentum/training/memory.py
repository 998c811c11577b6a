"""How much memory a run needs, and how long it computes: counted from the model's shapes, before anything is loaded.

Parameters and state are counted exactly. Activations are an estimate from the widths of the linear layers, tested
against what the autograd graphs of Llama, Qwen3, BERT, ModernBERT and ViT keep. Nothing here was measured on a GPU.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_momentum.errors import InputError
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.integrations.optim_args import parse_optim_args
from hf_momentum.kernels import SMALLEST, Packed
from hf_momentum.optim.piece_state import PieceState

GIB = 2**30
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}

# NF4 with double quantisation: 4 bits, a byte per 64 weights, and a float32 per 256 of those bytes (arXiv 2305.14314).
_FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)

# What a block keeps for its backward pass, in bytes per token: so much per output of its linear layers and per hidden
# unit. Attention keeps nothing of size tokens x tokens in the fused kernels that are taken for granted.
_PER_FEATURE, _PER_HIDDEN = 4, 14

# What classifiers call their heads, which PEFT leaves out of all-linear and trains in full.
_HEADS = ("classifier", "score")

# Logits in bfloat16 and their gradient, their float32 copy and its gradient, and the log-probabilities: 2+2+4+4+4.
_PER_LOGIT = 16


@dataclass(frozen=True)
class Size:
    """What of a model decides about its memory.

    Attributes:
        parameters: all weights, tied ones once.
        trained: those with a gradient.
        linear: weights in the linear layers of the blocks, which is what is held in 4 bits under QLoRA.
        features: outputs per token of those layers, summed over the model.
        hidden: width of the residual stream.
        layers: number of blocks.
        vocabulary: logits per token of a language model; 0 for a classifier.
    """

    parameters: int
    trained: int
    linear: int
    features: int
    hidden: int
    layers: int
    vocabulary: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        rank: int | None = None,
        targets: Sequence[str] = ("all-linear",),
        saved: Sequence[str] = (),
    ) -> "Size":
        """Count a transformer of transformers, or PEFT's wrapper of one; on the meta device it costs no memory.

        Args:
            model: with a configuration.
            rank: of LoRA adapters that are to be put into it; None for those that it has, or none.
            targets: the last parts of the names of the layers that get them, or all-linear.
            saved: the names of modules that are trained in full beside them, of which PEFT makes a copy.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=100,
            ...     num_attention_heads=2)
            >>> with torch.device("meta"):
            ...     model = LlamaForCausalLM(config)
            >>> Size.of(model).parameters, Size.of(model).features, Size.of(model, rank=8).trained
            (95040, 1152, 17408)
        """
        config: Any = model.config
        vocabulary = config.to_dict().get("vocab_size")  # vision models have none
        linear = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name and module.out_features != vocabulary
        }
        blocks = [module for name, module in linear.items() if _in_block(name)]
        parameters = sum(param.numel() for param in model.parameters())
        trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
        if rank is not None:
            trained = rank * sum(
                module.in_features + module.out_features
                for name, module in linear.items()
                if name.rpartition(".")[2] in targets or (list(targets) == ["all-linear"] and name not in _HEADS)
            )
            trained += sum(
                param.numel() for name, param in model.named_parameters() if set(saved) & set(name.split("."))
            )
            parameters += trained
        return cls(
            parameters=parameters,
            trained=trained,
            linear=sum(module.weight.numel() for module in blocks),
            features=sum(module.out_features for module in blocks),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            vocabulary=vocabulary if _is_language_model(model, vocabulary) else 0,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for.

    Attributes:
        weights: with their half-precision copy under autocast, and what is gathered of other processes' shards.
        gradients: of the trained weights.
        state: of the optimizer and of gradient surgery.
        activations: what the forward pass keeps for the backward pass, logits included.
    """

    weights: float
    gradients: float
    state: float
    activations: float

    @property
    def total(self) -> float:
        """The sum: what there is when the backward pass begins while gradients are being accumulated."""
        return self.weights + self.gradients + self.state + self.activations

    def __str__(self) -> str:
        """In GiB.

        Example:
            >>> str(Memory(2 * GIB, GIB, 0, GIB / 4))
            'about 3.2 GiB (computed: weights 2.0, gradients 1.0, state 0.0, activations 0.2; not measured)'
        """
        weights, gradients, state, activations, total = (
            f"{part / GIB:.1f}" for part in (self.weights, self.gradients, self.state, self.activations, self.total)
        )
        return (
            f"about {total} GiB (computed: weights {weights}, gradients {gradients}, state {state}, activations "
            f"{activations}; not measured)"
        )


def estimate(
    size: Size,
    *,
    tokens: int,
    state: float,
    dtype: str = "float32",
    autocast: bool = True,
    four_bit: bool = False,
    checkpointing: bool = False,
    whole_logits: bool = True,
    activations: float | None = None,
    processes: int = 1,
) -> Memory:
    """Memory of one device in training.

    Args:
        size: of the model, `Size.of(model)`.
        tokens: of one micro-batch on one device: examples times their length.
        state: bytes of optimizer state per trained weight, `state_bytes(optim, optim_args)`.
        dtype: of the weights: float32, bfloat16 or float16 (the recipe's `model_dtype`). Adapters are float32, as PEFT
            makes them.
        autocast: whether bf16 or fp16 of the trainer is on: float32 weights then have a copy in 16 bits.
        four_bit: whether the linear layers of the blocks are held in 4 bits, and all else in float32.
        checkpointing: whether blocks are computed again in the backward pass (`gradient_checkpointing`).
        whole_logits: whether the logits of all tokens exist at once; TRL's SFTTrainer forms them in parts.
        activations: bytes, where they are known better than by the estimate, as for a convolutional network.
        processes: over how many the weights, gradients and state are sharded (FSDP2, ZeRO-3).

    Raises:
        InputError: an unknown dtype, a size below 1.

    Example:
        >>> llama = Size(1_235_814_400, 1_235_814_400, 973_078_528, 376_832, 2048, 16, 128_256)
        >>> print(estimate(llama, tokens=4096, state=8.0, checkpointing=True))
        about 29.5 GiB (computed: weights 6.9, gradients 4.6, state 9.2, activations 8.8; not measured)
    """
    if dtype not in _BYTES:
        raise InputError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    for name, value in {"tokens": tokens, "processes": processes}.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    adapters = size.trained if size.trained < size.parameters else 0
    packed = size.linear if four_bit else 0
    width = _BYTES[dtype]
    # What is not held in 4 bits is cast to float32, but by TRL's trainers, which leave it as it is.
    rest = 4.0 if four_bit else width
    weights = packed * _FOUR_BITS + (size.parameters - adapters - packed) * rest + adapters * 4
    gradients = size.trained * (4 if adapters else width)
    # Embeddings, which are looked up and not multiplied, are copied only where they are the head as well.
    copied = 2.0 * (size.linear + size.vocabulary * size.hidden) if autocast and width == 4 else 0.0
    if processes > 1:
        # Two blocks are gathered at a time, the one that computes and the next; embeddings and head stay gathered.
        outside = size.parameters - adapters - size.linear
        copied = 2.0 * (2 * size.linear / size.layers + outside)
    if activations is None:
        activations = _activations(size, tokens, width, checkpointing)
        activations += _PER_LOGIT * size.vocabulary * (tokens if whole_logits else min(tokens, 1024))
    return Memory(
        weights=weights / processes + copied,
        gradients=gradients / processes,
        state=size.trained * state / processes,
        activations=activations,
    )


def _activations(size: Size, tokens: int, width: float, checkpointing: bool) -> float:
    """Bytes that all blocks keep; with checkpointing their inputs, and one block that is computed again."""
    blocks = tokens * (_PER_FEATURE * size.features + _PER_HIDDEN * size.hidden * size.layers)
    if not checkpointing:
        return blocks
    return blocks / size.layers + tokens * width * size.hidden * size.layers


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that the autograd graph of `forward()` keeps, the model's own weights aside: a storage counts once.

    It works on the meta device, where a forward pass of any size costs nothing.

    Example:
        >>> layer, x = nn.Linear(4, 2), torch.ones(3, 4)
        >>> saved_bytes(layer, lambda: layer(x))
        48
    """
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@functools.cache
def state_bytes(optim: str, optim_args: str | None = None) -> float:
    """Bytes of state per trained weight, read off the optimizer after a step on one tensor.

    Args:
        optim: a name of this package, or adamw_torch, adamw_torch_fused, sgd of transformers.
        optim_args: as in a recipe.

    Raises:
        InputError: another name, or arguments that the optimizer does not take.

    Example:
        >>> state_bytes("adamw_torch"), state_bytes("vradam", "state_dtype=bfloat16"), state_bytes("tam")
        (8.0, 4.0, 4.0)
        >>> round(state_bytes("adatamw", "state_dtype=int8"), 2)
        2.09
    """
    weight = nn.Parameter(torch.zeros(4 * SMALLEST))
    optimizer: torch.optim.Optimizer
    if optim in OPTIMIZERS:
        spec = OPTIMIZERS[optim]
        optimizer = spec.cls([weight], **parse_optim_args(spec, optim_args))
    elif optim in ("adamw_torch", "adamw_torch_fused"):
        optimizer = torch.optim.AdamW([weight])
    elif optim == "sgd":
        optimizer = torch.optim.SGD([weight])
    else:
        raise InputError(
            f"optim {optim!r}: its state is not known here; accepted: {', '.join(OPTIMIZERS)}, adamw_torch, "
            "adamw_torch_fused, sgd"
        )
    for _ in range(2):  # some keep what they saw in the step before
        weight.grad = torch.full_like(weight, 0.01)
        optimizer.step()
    return float(sum(_held(value) for value in optimizer.state[weight].values() if _is_large(value)) / weight.numel())


def _is_large(value: Any) -> bool:
    return isinstance(value, PieceState) or (isinstance(value, Tensor) and value.numel() > 1)


def _held(value: Tensor | PieceState) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    parts = [part for _, part in value.pieces.values()]
    return sum(p.codes.nbytes + p.scales.nbytes if isinstance(p, Packed) else p.nbytes for p in parts)


def minutes(size: Size, *, tokens: int, peak: float = 989e12, utilisation: float = 0.4, again: bool = False) -> float:
    """Minutes that training on so many tokens takes, by the rule of 6 operations per parameter and token.

    Adapters spare the gradients of frozen weights, a third of the work; checkpointing adds a third.

    Args:
        size: of the model.
        tokens: of the whole run, all devices together.
        peak: operations per second of all devices together; an H100's in bfloat16 unless given.
        utilisation: the share of the peak that is reached: 0.4 is good for large batches, a tenth usual for small ones.
        again: whether blocks are computed again in the backward pass.

    Example:
        >>> size = Size(1_000_000_000, 1_000_000_000, 0, 0, 2048, 16, 0)
        >>> round(minutes(size, tokens=100_000_000), 1)
        25.3
    """
    operations = 4 if size.trained < size.parameters else 6
    return size.parameters * tokens * (operations + 2 * again) / (peak * utilisation) / 60


def _is_language_model(model: nn.Module, vocabulary: int | None) -> bool:
    """Whether it has a head as wide as its vocabulary."""
    return any(isinstance(module, nn.Linear) and module.out_features == vocabulary for module in model.modules())


def _in_block(name: str) -> bool:
    """Whether a module's name has a number in it: blocks are numbered, what stands before and after them is not."""
    return any(part.isdigit() for part in name.split("."))
