"""Which layouts of parameters the optimizers can be exact on, and a refusal for all others.

A cosine or a norm over a *piece* of a tensor is not the cosine or norm of the tensor, and nothing in torch
warns when an optimizer takes one. Until a layout has exact reductions here, its parameters are refused.
"""

from collections.abc import Collection

import torch
from torch.distributed.tensor import DTensor

SUPPORTED = "one process, DataParallel and DistributedDataParallel (DDP)"


class UnsupportedLayoutError(RuntimeError):
    """A parameter is stored in a way in which the optimizer's reductions would be silently wrong."""


def require_whole_tensor(parameter: torch.Tensor, known: Collection[int]) -> None:
    """Raise unless `parameter` is one whole tensor that was given to the optimizer by its user.

    Args:
        parameter: a tensor out of `param_groups`.
        known: `id` of every tensor that was added through the constructor or `add_param_group`.

    Raises:
        UnsupportedLayoutError: for DTensor shards (FSDP2, tensor parallelism), FSDP1's flat parameters, and
            tensors that a wrapper put in place of the user's own (DeepSpeed ZeRO's flat partitions).

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> require_whole_tensor(w, known={id(w)})
        >>> require_whole_tensor(w, known=set())
        Traceback (most recent call last):
        ...
        hf_momentum.sharding.layout.UnsupportedLayoutError: this optimizer holds a tensor of shape (3,) that ...
    """
    if isinstance(parameter, DTensor):
        kind = "a DTensor shard (FSDP2 or tensor parallelism)"
    elif getattr(parameter, "_fsdp_flattened", False):  # torch.distributed.fsdp marks FSDP1's views so
        kind = "a piece of an FSDP1 flat parameter"
    elif id(parameter) not in known:
        kind = "not one that it was given: a wrapper (DeepSpeed ZeRO?) put it there"
    else:
        return
    raise UnsupportedLayoutError(
        f"this optimizer holds a tensor of shape {tuple(parameter.shape)} that is {kind}. Its cosines and norms would "
        f"be taken over pieces and be silently wrong. Supported: {SUPPORTED}."
    )
