"""What every optimizer of this package shares: collecting tensors, exact checkpoints, clear refusals.

A method's own file holds its mathematics. The one base class here holds the bookkeeping around it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_momentum.kernels import sum_dtype
from hf_momentum.sharding import require_whole_tensor

_HALF = (torch.float16, torch.bfloat16)

# A bucket is closed once it holds this many elements, which bounds the temporaries of an update (256 MiB of
# float32 each) unless one tensor alone is larger.
_BUCKET_ELEMENTS = 2**26


@dataclass(frozen=True)
class Bucket:
    """The parameters of one group that have a gradient and share a device and a dtype, ready for `_foreach` calls.

    Attributes:
        group: the parameter group, with its hyperparameters.
        positions: place of each parameter in `group["params"]`.
        params: the parameters themselves.
        raw_grads: their gradients as they are; `gradients()` gives what a rule works on.
        states: the per-parameter state dictionaries.
    """

    group: dict[str, Any]
    positions: list[int]
    params: list[Tensor]
    raw_grads: list[Tensor]
    states: list[dict[str, Any]]

    @property
    def device(self) -> torch.device:
        """The device that holds every tensor of the bucket."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the bucket is computed and its state is kept."""
        return compute_dtype(self.params[0])

    def elements(self) -> int:
        """The number of elements of all its parameters."""
        return sum(param.numel() for param in self.params)

    def vector(self, name: str) -> Tensor:
        """The group's vector `name`, one float64 entry per parameter of the group, zeros at its first use."""
        vector: Tensor | None = self.group.get(name)
        if vector is None:
            vector = torch.zeros(len(self.group["params"]), dtype=sum_dtype(self.device), device=self.device)
        vector = vector.to(self.device)  # a loaded state may lie elsewhere
        self.group[name] = vector
        return vector

    def scalars(self, values: Tensor) -> Tensor | list[Tensor]:
        """`values`, 0-dim or one per tensor of the bucket, as `_foreach` functions take them."""
        values = values.to(device=self.device, dtype=self.dtype)
        return values if values.dim() == 0 else list(values.unbind())

    def buffers(self, name: str) -> list[Tensor]:
        """The state tensor `name` of each parameter, created as zeros in the compute dtype at its first use."""
        for param, state in zip(self.params, self.states, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=self.dtype, memory_format=torch.preserve_format)
        return [state[name] for state in self.states]

    def count_steps(self) -> list[float]:
        """Advance each parameter's `step` by one and return them.

        The counters are 0-dim tensors in host memory, as in torch's own Adam: reading them waits for no device.
        """
        for state in self.states:
            state["step"] = state.get("step", torch.zeros(())) + 1
        return [state["step"].item() for state in self.states]

    def advance_correction(self, beta: Tensor) -> Tensor:
        """1 - prod(beta) over each parameter's steps so far, this one's `beta` included; one entry per tensor.

        The bias of an average whose beta varies: with beta constant it is Adam's 1 - beta^t. The group keeps the
        complement itself, c = 1 - b (1 - c), so that it starts at 0 like every other vector.
        """
        before = take(self.vector("correction1"), self.positions)
        correction = 1 - beta.to(self.device) * (1 - before)
        self.group["correction1"] = put(self.group["correction1"], self.positions, correction)
        return correction

    def gradients(self) -> list[Tensor]:
        """The gradients of the loss in the compute dtype, negated if `maximize`.

        Formed anew at each call, so that float32 copies of half-precision gradients exist for one bucket at a time.
        """
        grads = [grad.to(self.dtype) for grad in self.raw_grads]
        return list(torch._foreach_neg(grads)) if self.group["maximize"] else grads

    def decayed_gradients(self) -> list[Tensor]:
        """`gradients()` plus wd w where the weight decay is coupled; `p.grad` is left alone."""
        wd = self.group["weight_decay"]
        if not wd or self.group["decoupled_weight_decay"]:
            return self.gradients()
        return list(torch._foreach_add(self.gradients(), self.weights(), alpha=wd))

    def weights(self) -> list[Tensor]:
        """The parameters in the compute dtype: themselves, or float32 copies to be written back by `store`."""
        if self.params[0].dtype == self.dtype:
            return self.params
        return [param.to(self.dtype) for param in self.params]

    def store(self, weights: list[Tensor]) -> None:
        """Write updated `weights` back, rounding once to the parameters' dtype."""
        if weights is not self.params:
            torch._foreach_copy_(self.params, weights)


def compute_dtype(param: Tensor) -> torch.dtype:
    """float32 for half-precision parameters, else the parameter's own dtype.

    Example:
        >>> compute_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float32 if param.dtype in _HALF else param.dtype


def take(vector: Tensor, positions: list[int]) -> Tensor:
    """The entries of `vector` at `positions`, in ascending order, without a transfer from the host.

    Indexing with a Python list would copy it to the device and wait; views and one stack do not.

    Example:
        >>> take(torch.tensor([1.0, 2.0, 3.0]), [0, 2])
        tensor([1., 3.])
    """
    return vector if len(positions) == len(vector) else torch.stack([vector[i] for i in positions])


def put(vector: Tensor, positions: list[int], values: Tensor) -> Tensor:
    """A vector with `values` at `positions` and the old entries elsewhere.

    Example:
        >>> put(torch.tensor([1.0, 2.0, 3.0]), [0, 2], torch.tensor([7.0, 9.0]))
        tensor([7., 2., 9.])
    """
    if len(positions) == len(vector):
        return values
    rows = list(vector.unbind())
    for position, value in zip(positions, values.unbind(), strict=True):
        rows[position] = value
    return torch.stack(rows)


def mean_of(values: list[Tensor]) -> Tensor:
    """The mean over all entries of 0-dim and 1-D tensors, unknown (NaN) ones left out, on the first one's device.

    Example:
        >>> mean_of([torch.tensor(1.0), torch.tensor([3.0, torch.nan])])
        tensor(2.)
    """
    device = values[0].device
    return torch.cat([value.reshape(-1).to(device) for value in values]).nanmean()


class MomentumOptimizer(torch.optim.Optimizer):
    """Base of the package's optimizers; not an update rule by itself.

    A subclass provides `_check(group)`, which validates the hyperparameters of one group, and
    `_update(buckets)`, which performs one step. In return it gets closures under grad, several groups,
    parameters without gradients, half-precision parameters with float32 state, and checkpoints that
    continue bit for bit. Every number that evolves lives in `state` or in `param_groups`, so that a
    state dict is complete; nothing is created before the first step, because wrappers replace parameters.
    """

    PER_TENSOR: ClassVar[tuple[str, ...]] = ()
    """Names of the group entries that may hold one value per parameter, for logs."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._given: set[int] = set()
        super().__init__(params, {"algorithm": type(self).__name__, **defaults})

    def _check(self, group: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _update(self, buckets: list[Bucket]) -> None:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also in mid-training; its hyperparameters are validated like the constructor's.

        Raises:
            TypeError, ValueError: a hyperparameter of the group is of the wrong type or out of range.
        """
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                raise TypeError(
                    f"{type(self).__name__}: parameters must be real floating-point tensors, got one of dtype "
                    f"{param.dtype}; pass complex weights as their real view (torch.view_as_real)"
                )
            self._given.add(id(param))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one update.

        Args:
            closure: re-evaluates the model under grad and returns the loss; optional.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter is stored in a layout without exact reductions.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = self._collect()
        if buckets:
            self._update(buckets)
        return loss

    def _collect(self) -> list[Bucket]:
        buckets: list[Bucket] = []
        open_buckets: dict[tuple[int, torch.device, torch.dtype], Bucket] = {}
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None:
                    continue
                require_whole_tensor(param, self._given)
                if grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients (parameter {position} of group "
                        f"{index}, shape {tuple(param.shape)}); build the embedding with sparse=False"
                    )
                key = (index, param.device, param.dtype)
                bucket = open_buckets.get(key)
                if bucket is None or bucket.elements() + param.numel() > _BUCKET_ELEMENTS:
                    bucket = open_buckets[key] = Bucket(group, [], [], [], [])
                    buckets.append(bucket)
                bucket.positions.append(position)
                bucket.params.append(param)
                bucket.raw_grads.append(grad)
                bucket.states.append(self.state[param])
        return buckets

    def dynamics(self) -> dict[str, Tensor]:
        """The method's inner quantities after the last step, as 0-dim tensors still on the device; empty before it."""
        return {}

    def tensor_dynamics(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Those of the inner quantities that are kept per parameter: pairs of parameter and 0-dim tensor, by name."""
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for group in self.param_groups:
            for name in self.PER_TENSOR:
                vector = group.get(name)
                if isinstance(vector, Tensor) and vector.dim() == 1:
                    found.setdefault(name, []).extend(zip(group["params"], vector.unbind(), strict=True))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same algorithm so that training continues bit for bit.

        Raises:
            ValueError: the state dict was saved by another optimizer, or its groups do not fit.
        """
        found = {group.get("algorithm", "an optimizer of another package") for group in state_dict["param_groups"]}
        if found != {type(self).__name__}:
            raise ValueError(
                f"this state was saved by {', '.join(sorted(found))} and cannot continue under {type(self).__name__}; "
                "resume with the optimizer that saved it, or start without the optimizer state"
            )
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of its parameter, which would round float32 state of bf16 weights.
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor) and self.state[param][name].dtype != value.dtype:
                    self.state[param][name] = value.to(param.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_given" not in self.__dict__:  # a copy made by copy.deepcopy or pickle holds its own parameters
            self._given = {id(param) for group in self.param_groups for param in group["params"]}
