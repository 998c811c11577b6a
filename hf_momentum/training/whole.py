"""A plain checkpoint (whole tensors) into a run that shards: each process takes out of the files what it holds.

So a run continues under another layout, or on another number of processes than its checkpoint was written by.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_momentum.errors import InputError
from hf_momentum.optim import MomentumOptimizer
from hf_momentum.training.export import file_name, read_weights


def load_whole(model: nn.Module, optimizer: MomentumOptimizer, checkpoint: Path) -> None:
    """Load weights and optimizer state of a plain checkpoint into a model that FSDP2 or DeepSpeed has prepared.

    All processes must call it. Weights that were not saved (the base model's under adapters) stay as they are.

    Args:
        model: the prepared model, without DeepSpeed's engine around it.
        optimizer: the optimizer inside all wrappers.
        checkpoint: a folder with `optimizer.pt` and the weights.

    Raises:
        InputError: a trained parameter has no weight in the checkpoint, or one of another shape.
        ValueError: the state was saved by another optimizer, or its groups do not fit.
    """
    weights = read_weights(checkpoint)
    found = {}
    for name, param in model.named_parameters():
        key = file_name(name)
        shape = tuple(getattr(param, "ds_shape", param.shape))  # under ZeRO-3 the parameter itself is empty
        if key in weights:
            if tuple(weights[key].shape) != shape:
                raise InputError(f"{checkpoint}: {key} has shape {tuple(weights[key].shape)}, the model's is {shape}")
            found[id(param)] = weights[key]
            _store(param, weights[key])
        elif param.requires_grad:
            raise InputError(f"{checkpoint} holds no weight {key}; it does not belong to this model")
    state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
    optimizer.load_whole_state_dict(state)
    optimizer.load_master_weights([[found[id(param)] for param in group] for group in optimizer.tensors()])


@torch.no_grad()
def _store(param: Any, whole: torch.Tensor) -> None:
    if isinstance(param, DTensor):
        cut = distribute_tensor(whole.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
        param.copy_(cut)
    elif getattr(param, "ds_id", None) is not None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            param.data.copy_(whole)
    else:
        param.copy_(whole)
