"""A loaded model as something to differentiate, on one process or many: who holds what, and how to go backward."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from hf_momentum.diagnosis.attribution import Gradients, collect
from hf_momentum.diagnosis.groups import LayerGroup
from hf_momentum.diagnosis.untouched import untouched
from hf_momentum.errors import InputError
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.sharding import ReducedGradients, WholeGradients, reduced_gradients
from hf_momentum.training.evaluated import Evaluated
from hf_momentum.training.examples import Examples
from hf_momentum.training.processes import check_launch, launched_for, launched_processes

# What a batch's logits and targets come to: a summed loss, and of how many predictions.
Loss = Callable[[Tensor, Tensor, Sequence[int]], tuple[Tensor, int]]


@dataclass(frozen=True)
class Differentiable:
    """A model that is ready for forward and backward passes over examples.

    Attributes:
        model: as it is called, in its wrapper.
        groups: whose weights have gradients.
        gradients: where the reduced ones lie.
        weights: by row of the layout, what counts as the weight in place of the tensor's own values.
        processes, process: how many there are, and which this is.
        average: the mean of a tensor over the processes.
    """

    model: Any
    device: torch.device
    groups: Sequence[LayerGroup]
    gradients: ReducedGradients
    backward: Callable[[Tensor], None]
    weights: Mapping[int, Tensor]
    processes: int
    process: int
    average: Callable[[Tensor], Tensor]

    def batches(self, indices: Sequence[int], size: int) -> list[list[int]]:
        """Micro-batches of so many examples for each process, in the order given."""
        step = size * self.processes
        return [list(indices[start : start + step]) for start in range(0, len(indices), step)]

    def logits(self, examples: Examples, batch: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Logits, targets and numbers of this process's part of a batch.

        A process without a part of its own runs the batch's first example, because all have to run at once; of that
        nothing is returned.
        """
        share = -(-len(batch) // self.processes)
        own = list(batch[self.process * share : (self.process + 1) * share])
        run = own or [batch[0]]
        dtype = next(self.model.parameters()).dtype
        given = {
            name: value.to(self.device, dtype if name == "pixel_values" else None)
            for name, value in examples.inputs(run).items()
        }
        logits, targets = self.model(**given).logits, examples.targets(run).to(self.device)
        return logits[: len(own)] if own else logits[:1] * 0, targets if own else targets[:0], own

    def gathered(self, values: np.ndarray) -> np.ndarray:
        """The sum over processes of an array of which each has filled in its part."""
        if self.processes == 1:
            return values
        whole = self.average(torch.tensor(values, dtype=torch.float64, device=self.device)) * self.processes
        return whole.round().cpu().numpy().astype(values.dtype)

    def collect(self, examples: Examples, indices: Sequence[int], size: int, loss: Loss, seed: int) -> Gradients:
        """One pass over a sample, in the order given."""

        def loss_of(batch: list[int]) -> tuple[Tensor, int]:
            logits, targets, own = self.logits(examples, batch)
            summed, count = loss(logits, targets, own) if own else (logits.sum(), 0)
            counted = self.gathered(np.array([count]))
            # Wrappers average over processes; the sum over all examples is wanted.
            return summed * self.processes, int(counted[0])

        return collect(
            self.batches(indices, size),
            loss_of,
            self.gradients,
            [number for number, group in enumerate(self.groups) for _ in group.weights],
            len(self.groups),
            backward=self.backward,
            average=self.average,
            weights=self.weights,
            seed=seed,
        )


@contextmanager
def differentiable(
    evaluated: Evaluated, groups: Sequence[LayerGroup], lora_weights: str = "base"
) -> Iterator[Differentiable]:
    """Make a model ready for gradients of its groups' weights, and leave it as it was.

    On several processes (`accelerate launch` with DDP, FSDP2 or DeepSpeed) the model is handed over to the wrapper, and
    belongs to it afterwards.

    Args:
        evaluated: its weights must be in float32: gradients are added up in the weights' own dtype.
        groups: of the model, before it is wrapped.
        lora_weights: of LoRA, what counts as the weight: "base", or "delta", the product of the adapters.

    Raises:
        InputError: weights that cannot be differentiated, or `delta` where there is none.
    """
    processes = launched_processes()
    if processes > 1:
        if lora_weights == "delta":
            raise InputError("lora_weights delta needs whole weights, and this launch shares them; take base")
        yield _launched(evaluated, groups)
        return
    model, tensors = evaluated.model, _tensors(evaluated.model, groups)
    names = [name for group in groups for name in group.weights]
    weights = _deltas(model, names) if lora_weights == "delta" else {}
    with untouched(model, tensors):
        gradients = WholeGradients(torch.optim.SGD(tensors, lr=0.0))
        yield Differentiable(model, evaluated.device, groups, gradients, Tensor.backward, weights, 1, 0, torch.clone)


def _tensors(model: Any, groups: Sequence[LayerGroup]) -> list[Tensor]:
    """The groups' weights, row by row."""
    named = dict(model.named_parameters())
    names = [name for group in groups for name in group.weights]
    for name in names:
        if named[name].dtype != torch.float32:
            raise InputError(
                f"{name} is of dtype {str(named[name].dtype).removeprefix('torch.')}, and gradients are added up in "
                "float32; load the model with dtype float32, and a quantised one without quantisation"
            )
    return [named[name] for name in names]


def _launched(evaluated: Evaluated, groups: Sequence[LayerGroup]) -> Differentiable:
    """On several processes, by Accelerate.

    Nothing that outlives this call may hold the model's tensors: after it each process has its own part of them alone.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    # Under `cpu` Accelerate leaves DeepSpeed out, silently, and without it CPU processes do not find each other.
    on_cpu = not torch.accelerator.is_available() and launched_for() != DistributedType.DEEPSPEED
    accelerator = Accelerator(
        cpu=on_cpu,
        # Else Accelerate would read it from the launcher's file, where it may be "auto".
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Not every weight has a part in every loss.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    check_launch(accelerator.state)
    if accelerator.mixed_precision != "no":
        raise InputError(
            f"the launcher was told mixed_precision {accelerator.mixed_precision}, and gradients are added up in "
            "float32; set it to no"
        )
    model = evaluated.model.eval()
    tensors = _tensors(model, groups)
    wanted = {id(tensor) for tensor in tensors}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,  # a number that DeepSpeed asks for
            "gradient_accumulation_steps": 1,
            "zero_force_ds_cpu_optimizer": False,  # else offload would put an optimizer of its own in place
        }
        # The next model to be made shall be whole, as this one was.
        plugin.dschf = None
        unset_hf_deepspeed_config()
    base = torch.optim.SGD(tensors, lr=0.0)
    given = [[weakref.ref(tensor) for tensor in tensors]]
    model, optimizer = accelerator.prepare(model, base)
    model.eval()
    engine = model if plugin is not None else None
    gradients = reduced_gradients(engine, base_optimizer(optimizer), given)

    def backward(loss: Tensor) -> None:
        if engine is None:
            loss.backward()
            return
        engine.set_gradient_accumulation_boundary(gradients.boundary)
        engine.backward(loss, scale_wrt_gas=False)

    def average(value: Tensor) -> Tensor:
        reduced: Tensor = accelerator.reduce(value.to(accelerator.device), "mean")
        return reduced

    return Differentiable(
        model,
        accelerator.device,
        groups,
        gradients,
        backward,
        {},
        accelerator.num_processes,
        accelerator.process_index,
        average,
    )


def _deltas(model: Any, names: Sequence[str]) -> dict[int, Tensor]:
    """The product of the adapters for each row; zeros for weights without one."""
    if not isinstance(model, PeftModel):
        raise InputError("lora_weights delta is for LoRA adapters, and the model has none; take base")
    found = {}
    for row, name in enumerate(names):
        holder, _, what = name.rpartition(".base_layer.")
        module = model.get_submodule(holder) if holder else None
        weight = model.get_parameter(name)
        found[row] = torch.zeros_like(weight)
        if isinstance(module, ParamWrapper):
            raise InputError(
                f"lora_weights delta cannot be used with adapters of a single parameter, {name}; take base"
            )
        if isinstance(module, LoraLayer) and what == "weight":
            for adapter in module.active_adapters:
                if adapter in module.r:  # those of embeddings are not in lora_A
                    found[row] += module.get_delta_weight(adapter).detach()
    return found
