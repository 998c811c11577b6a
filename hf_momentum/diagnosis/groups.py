"""Layer groups of a model, found from its own module tree: embeddings, blocks or their parts, norms, head.

A *stack* is the outermost list of modules on the way to a parameter, such as the layers of a transformer or the stages
of a ResNet; its members are the blocks. What a model's output embedding or its modules beside the base model hold is
the head; what comes before the first stack, the embeddings; a norm outside all blocks, the norm. Every parameter is in
exactly one group, and a tied one only where it stands first.

LoRA adapters belong to the group of the weight that they adapt, and are listed beside it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Literal

from torch import nn

from hf_momentum.errors import InputError, nearest

Kind = Literal["embeddings", "block", "norm", "head", "other", "pattern"]
Split = Literal["blocks", "parts"]

_PEFT = "base_model.model."
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)|\.modules_to_save\.[^.]+(?=\.|$)")
_ADAPTER = re.compile(r"\.lora_[A-Za-z_]+(?=\.|$).*$")
_INSIDE = re.compile(r"base_layer|modules_to_save|lora_[A-Za-z_]+")
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


@dataclass(frozen=True)
class LayerGroup:
    """A part of a model that is scored, chosen and retrained as one.

    Attributes:
        name: such as "embeddings", "block.3", "block.3.attention", "head".
        kind: what it is.
        weights: names of its parameters, as `named_parameters` gives them; adapters apart.
        adapters: names of LoRA parameters that adapt them.
        numel: how many numbers its weights are.

    Example:
        >>> LayerGroup("head", "head", ("score.weight",), (), 20).numel
        20
    """

    name: str
    kind: Kind
    weights: tuple[str, ...]
    adapters: tuple[str, ...]
    numel: int


@dataclass
class _Found:
    kind: Kind
    weights: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    numel: int = 0


def layer_groups(
    model: nn.Module, split: Split = "blocks", patterns: Mapping[str, str] | None = None
) -> list[LayerGroup]:
    """The groups of a model in the order of its parameters.

    Args:
        model: any; not yet wrapped by DDP or an engine.
        split: "blocks", or "parts": attention, MLP and norms of each block, or the members of a stack inside it and
            what stands beside that.
        patterns: groups of one's own by name: parameters whose plain name (without PEFT's wrappers) matches a pattern
            of `*`, `?` and `[...]` leave the group in which they would be, with their adapters; the first pattern that
            matches has them.

    Raises:
        InputError: a pattern matches nothing, or only what an earlier one has, or has the name of a group that is left;
            `split` is unknown.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [(group.name, group.numel) for group in layer_groups(model)]
        [('block.0', 9), ('block.2', 4)]
        >>> [group.name for group in layer_groups(model, patterns={"biases": "*.bias"})]
        ['block.0', 'biases', 'block.2']
    """
    if split not in ("blocks", "parts"):
        raise InputError(f"split {split!r} is not accepted; blocks or parts")
    patterns = dict(patterns or {})
    tree = _Tree(model)
    found: dict[str, _Found] = {}
    matched = set()
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT keeps it beside the copy that is in use
            continue
        own = next((own for own, pattern in patterns.items() if fnmatchcase(_weight_name(name), pattern)), None)
        place: str
        kind: Kind
        place, kind = (own, "pattern") if own is not None else tree.place(name, split)
        group = found.setdefault(place, _Found(kind))
        if (group.kind == "pattern") != (own is not None):
            raise InputError(f"a pattern is named {place!r}, as a group is; name it otherwise")
        matched |= {own}
        if _ADAPTER.search(name):
            group.adapters.append(name)
        else:
            group.weights.append(name)
            group.numel += parameter.numel()
    for own, pattern in patterns.items():
        if own not in matched:
            left = " that is left" if len(patterns) > 1 else ""
            raise InputError(
                f"group pattern {own}={pattern} matches no parameter{left}. Names are like {tree.first}; the groups "
                f"are {', '.join(found)}"
            )
    return [
        LayerGroup(name, group.kind, tuple(group.weights), tuple(group.adapters), group.numel)
        for name, group in found.items()
    ]


def chosen_groups(groups: Sequence[LayerGroup], names: Iterable[str]) -> list[LayerGroup]:
    """Groups by name, or by pattern of `*`, `?` and `[...]`, in the order of the model.

    Raises:
        InputError: a name or pattern that matches none; the message lists the groups.

    Example:
        >>> groups = layer_groups(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
        >>> [group.name for group in chosen_groups(groups, ["block.*"])]
        ['block.0', 'block.1']
        >>> chosen_groups(groups, ["head"])
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: no group matches 'head'; the groups are block.0, block.1
    """
    known = [group.name for group in groups]
    chosen = set()
    for name in names:
        matching = {one for one in known if fnmatchcase(one, name)}
        if not matching:
            raise InputError(f"no group matches {name!r}{nearest(name, known)}; the groups are {', '.join(known)}")
        chosen |= matching
    return [group for group in groups if group.name in chosen]


def plain_name(name: str) -> str:
    """A parameter's name in the model without PEFT's wrappers; an adapter's is that of the module it adapts.

    Example:
        >>> plain_name("base_model.model.layers.0.q_proj.base_layer.weight")
        'layers.0.q_proj.weight'
        >>> plain_name("base_model.model.layers.0.q_proj.lora_A.default.weight")
        'layers.0.q_proj'
    """
    return _WRAPPED.sub("", _ADAPTER.sub("", name)).removeprefix(_PEFT)


def _weight_name(name: str) -> str:
    """What patterns are matched with: an adapter goes where the weight goes that it adapts."""
    return f"{plain_name(name)}.weight" if _ADAPTER.search(name) else plain_name(name)


class _Tree:
    """Where parameters stand among a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_parameters()]
        self.first = plain_name(names[0]) if names else ""
        self.prefix = _PEFT if any(name.startswith(_PEFT) for name in names) else ""
        self.model = model.get_submodule(self.prefix.rstrip(".")) if self.prefix else model
        self.base = _base_prefix(self.model)
        self.output = _output_prefix(self.model)
        self.stacks: list[str] = []
        self._before_stacks: set[str] = set()
        for name in names:
            stack = self._stack(self._path(name))
            if stack is not None and stack not in self.stacks:
                self.stacks.append(stack)
            if not self.stacks:
                self._before_stacks.add(name)

    def _path(self, name: str) -> list[str]:
        """The modules on the way to a parameter, as they are called in the unwrapped model, without the last word."""
        plain = name.removeprefix(self.prefix)
        return plain.split(".")[:-1]

    def place(self, name: str, split: Split) -> tuple[str, Kind]:
        """The group of a parameter, and its kind."""
        path = self._path(name)
        stack = self._stack(path)
        if stack is not None:
            depth = len(stack.split(".")) if stack else 0
            block = f"{self._stack_name(stack)}.{path[depth]}"
            return (block if split == "blocks" else f"{block}{self._part(path, depth)}"), "block"
        if self._in_head(path):
            return "head", "head"
        if self.stacks and name in self._before_stacks:
            return "embeddings", "embeddings"
        owner = _unwrapped(self.model.get_submodule(".".join(_owner(path))))
        if isinstance(owner, nn.Embedding):
            return "embeddings", "embeddings"
        if self.stacks and _is_norm(owner):
            return "norm", "norm"
        inner = path[len(self.base.split(".")) :] if self.base and ".".join(path).startswith(self.base) else path
        if not self.stacks:  # a model without lists of layers: each module by itself
            return ".".join(_owner(inner)) or "weights", "other"
        return (inner[0] if inner else "weights"), "other"

    def _in_head(self, path: Sequence[str]) -> bool:
        joined = ".".join(path) + "."
        if self.output and joined.startswith(f"{self.output}."):
            return True
        return bool(self.base) and not joined.startswith(f"{self.base}.")

    def _stack(self, path: Sequence[str]) -> str | None:
        """The outermost list of modules on the way, if it is not a part of the head."""
        if self._in_head(path):
            return None
        module: nn.Module = self.model
        for depth, word in enumerate(path):
            several = sum(1 for child in module.children() if any(True for _ in child.parameters())) > 1
            if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and several):
                return ".".join(path[:depth])
            module = module.get_submodule(word)
        return None

    def _stack_name(self, stack: str) -> str:
        """ "block" where there is one stack; else the word before the list, or the whole path where that is not one's
        own."""
        if len(self.stacks) == 1:
            return "block"
        words = {one: (one.split(".") or [""])[-2:-1] for one in self.stacks}
        alike = sum(1 for other in self.stacks if words[other] == words[stack])
        return f"{words[stack][0]}.block" if words[stack] and alike == 1 else stack

    def _part(self, path: Sequence[str], depth: int) -> str:
        """The part of a block: the member of a stack inside it, or attention, norm or MLP; "" of its own weights."""
        block = self.model.get_submodule(".".join(path[: depth + 1]))
        inside = _owner(path[depth + 1 :])
        if not inside:
            return ""
        stacks = [name for name, child in block.named_children() if _is_stack(child)]
        if inside[0] in stacks:
            return f".{inside[1]}" if len(stacks) == 1 else f".{inside[0]}.{inside[1]}"
        if _is_norm(_unwrapped(block.get_submodule(inside[0]))):
            return ".norm"
        if stacks:
            return f".{inside[0]}"
        return ".attention" if _ATTENTION.search(inside[0]) else ".mlp"


def _owner(path: Sequence[str]) -> list[str]:
    """The path of the module that has a parameter, without PEFT's modules inside it."""
    return list(takewhile(lambda word: not _INSIDE.fullmatch(word), path))


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that PEFT has put another one around."""
    inside = dict(module.named_children())
    return inside.get("base_layer", inside.get("original_module", module))


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of more than single layers."""
    several = isinstance(module, nn.ModuleList | nn.Sequential)
    return several and any(any(True for _ in _unwrapped(member).children()) for member in module.children())


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _base_prefix(model: nn.Module) -> str:
    """Where a transformers model keeps its base model; "" for others."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _output_prefix(model: nn.Module) -> str:
    """The module that turns hidden states into tokens; "" where there is none."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is output), "") if output is not None else ""
