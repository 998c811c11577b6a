"""What a diagnosis costs: time of the attribution against plain passes over the same examples, and its memory.

    python scripts/bench_diagnosis.py --encoder PLACE --output docs/performance_diagnosis.json
    python scripts/bench_diagnosis.py --models tiny --examples 64

The attribution of n examples takes the gradient of n/2 wrong and that of n/2 right ones, with sketches for intervals,
and compares them. It is timed in turns with plain forward and backward passes over the same micro-batches, whose
gradients are added up, in one process on one model. A ratio is formed between neighbours, by the clock of the process,
which other work on the machine disturbs less. Weights are random where no encoder is read: they do not change the cost.

Memory is the largest sum of the bytes of live tensors while gradients are collected, beside those of the weights, as
torch dispatches their making; each storage counts once.
"""

import argparse
import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_optimizers import cpu_name
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_momentum.diagnosis.attribution import Gradients, compare
from hf_momentum.diagnosis.groups import layer_groups
from hf_momentum.training.differentiable import Differentiable, differentiable
from hf_momentum.training.evaluated import Evaluated
from hf_momentum.training.examples import Examples
from hf_momentum.training.samples import class_loss, token_loss, unit_size

TARGET = 1.15
LENGTHS = {"tiny": 32, "minilm": 40, "quickstart": 256}
# A classifier of accuracy 0.8: of n examples n/5 are wrong, and as many right ones are taken.
ACCURACY = 0.8


def model_of(name: str, encoder: str | None) -> Any:
    """A model in float32: a classifier of two classes, or the quickstart's language model of bytes."""
    torch.manual_seed(0)
    if name == "quickstart":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=257, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6
            )
        )
    if name == "minilm" and encoder is not None:
        return AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    sizes = {"tiny": (1000, 64, 2, 2), "minilm": (30522, 384, 6, 12)}[name]
    words = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    config = BertConfig(**dict(zip(words, sizes, strict=True)), intermediate_size=4 * sizes[1], num_labels=2)
    return BertForSequenceClassification(config)


def examples_of(model: Any, count: int, length: int) -> Examples:
    """Random tokens, all of one length; a language model predicts them, a classifier one of two classes."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (count, length), generator=generator)
    language = isinstance(model, LlamaForCausalLM)
    targets = tokens.roll(-1, 1) if language else torch.randint(2, (count,), generator=generator)
    return Examples(
        [length] * count,
        lambda batch: {"input_ids": tokens[list(batch)], "attention_mask": torch.ones(len(batch), length).long()},
        lambda batch: targets[list(batch)],
        range(count),
        (),
    )


class Passes:
    """A model with the two samples of a diagnosis of `count` examples."""

    def __init__(self, ready: Differentiable, examples: Examples) -> None:
        self.ready, self.examples = ready, examples
        half = len(examples) // 2
        self.samples = [range(half), range(half, 2 * half)]
        self.size = unit_size(half, 16)
        self._loss = token_loss if isinstance(ready.model, LlamaForCausalLM) else class_loss

    def loss(self, logits: Tensor, targets: Tensor, own: Sequence[int]) -> tuple[Tensor, int]:
        """Of a micro-batch, of whose tokens all count."""
        return self._loss(logits, targets, [None] * len(own))

    def collected(self, sample: Sequence[int]) -> Gradients:
        """One gradient with its sketches."""
        return self.ready.collect(self.examples, sample, self.size, self.loss, 0)

    def attribution(self) -> None:
        """Both gradients, and their scores."""
        wrong, right = (self.collected(sample) for sample in self.samples)
        compare(wrong, right, [group.numel for group in self.ready.groups])

    def plain(self) -> None:
        """Both gradients alone."""
        for sample in self.samples:
            for batch in self.ready.batches(sample, self.size):
                self.loss(*self.ready.logits(self.examples, batch))[0].backward()
            self.ready.gradients.drop()

    def forward(self) -> None:
        """Predictions of all examples, as a diagnosis makes them before it knows which are wrong."""
        with torch.no_grad():
            for batch in self.ready.batches(range(len(self.examples)), 16):
                self.ready.logits(self.examples, batch)


def seconds(what: Callable[[], None]) -> float:
    """Of the process."""
    started = time.process_time()
    what()
    return time.process_time() - started


def quartiles(values: Sequence[float]) -> list[float]:
    """Median, and first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return [round(x, 4) for x in (middle, low, high)]


def timed(model: Any, length: int, count: int, rounds: int) -> dict[str, Any]:
    """Ratios of the attribution, and of predictions, to plain passes over as many examples.

    Of a whole diagnosis: predictions of all, then the attribution of the errors and as many right ones, for the model
    and for the one with random weights.
    """
    groups = layer_groups(model)
    with differentiable(Evaluated("bench", model, None), groups) as ready:
        passes = Passes(ready, examples_of(model, count, length))
        warm = Passes(ready, examples_of(model, 8, length))
        for what in (warm.plain, warm.attribution, warm.forward):
            what()
        times: dict[str, list[float]] = {"plain": [], "attribution": [], "forward": []}
        for turn in range(rounds):
            order = list(times) if turn % 2 else list(times)[::-1]
            for name in order:
                times[name].append(seconds(getattr(passes, name)))
    over = {
        name: [one / plain for one, plain in zip(times[name], times["plain"], strict=True)]
        for name in ("attribution", "forward")
    }
    # Errors and as many right ones are 2 (1 - accuracy) of the examples, for the model and for the random one.
    whole = [
        forward + 2 * 2 * (1 - ACCURACY) * both
        for forward, both in zip(over["forward"], over["attribution"], strict=True)
    ]
    return {
        "examples": count,
        "micro-batch": passes.size,
        "rounds": rounds,
        "attribution over plain passes": quartiles(over["attribution"]),
        "predictions over plain passes": quartiles(over["forward"]),
        "whole diagnosis": quartiles(whole),
    }


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and alive, and the most there ever were.

    Example:
        >>> with Live() as live:
        ...     found = torch.zeros(10).double() + 1
        >>> live.peak, live.now
        (160, 80)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it made."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: Any) -> None:
        if storage not in self._known:
            self._known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


def memory(model: Any, length: int, counts: Sequence[int]) -> dict[str, Any]:
    """Peak bytes while the gradient of one sample is collected, by its number of examples; micro-batches of one."""
    groups = layer_groups(model)
    weights = sum(group.numel for group in groups) * 4
    peaks: dict[str, int] = {}
    with differentiable(Evaluated("bench", model, None), groups) as ready:
        for count in counts:
            passes = Passes(ready, examples_of(model, count, length))
            with Live() as live:
                ready.collect(passes.examples, range(count), 1, passes.loss, 0)
            peaks[str(count)] = live.peak
    return {"gradient bytes": weights, "peak bytes": peaks}


def main() -> None:
    """Time everything, then weigh the smaller models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--models", nargs="*", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--encoder", metavar="PLACE", help="a folder or Hub name of all-MiniLM-L6-v2")
    parser.add_argument("--examples", nargs="*", type=int, default=[64, 400])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs="*", type=int, default=[100, 1600], help="examples; none to leave it out")
    known = parser.parse_args()
    found: dict[str, Any] = {
        "device": f"{cpu_name()}, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "target": TARGET,
        "accuracy": ACCURACY,
    }
    for name in known.models:
        model = model_of(name, known.encoder)
        found[name] = {
            "parameters": sum(param.numel() for param in model.parameters()),
            "length": LENGTHS[name],
            "times": [timed(model, LENGTHS[name], count, known.rounds) for count in known.examples],
        }
        if known.memory and name != "minilm":
            found[name]["memory"] = memory(model, LENGTHS[name], known.memory)
        print(name, json.dumps(found[name], indent=1), flush=True)
        if known.output:
            known.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
