"""DeepSpeed and Accelerate keep our optimizers, and `"optimizer": {"type": "TAM"}` in a DeepSpeed JSON builds ours.

Left alone, Accelerate replaces any optimizer by `DeepSpeedCPUAdam` when optimizer state is offloaded, without a word,
and DeepSpeed looks for `torch.optim.TAM`. Five functions are wrapped when their modules are imported; optimizers of
other packages pass through them unchanged. They are private, so they are looked for first, and where one is missing a
warning says what will not work.
"""

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import wrapt

from hf_momentum.errors import InputError
from hf_momentum.integrations.registry import OPTIMIZERS, OptimizerSpec
from hf_momentum.optim import MomentumOptimizer
from hf_momentum.optim.ahb import ObservesGradients
from hf_momentum.sharding import SUPPORTED

TESTED_VERSIONS = "DeepSpeed 0.19, Accelerate 1.11 to 1.15"


def install() -> None:
    """Wrap the functions now if the modules are loaded, else when they are. Safe to call again."""
    wrapt.register_post_import_hook(keep_under_accelerate, "accelerate.accelerator")
    wrapt.register_post_import_hook(keep_under_deepspeed, "deepspeed.runtime.engine")


def keep_under_accelerate(accelerator: ModuleType) -> None:
    """Make Accelerate hand our optimizers to DeepSpeed as they are, also when their state is offloaded."""
    if find_spec("deepspeed") is None:
        return  # Accelerate has no such function then, and nothing will be missed
    _wrap(accelerator, "map_pytorch_optim_to_deepspeed", _mapped, "optimizer offload through Accelerate")


def keep_under_deepspeed(engine: ModuleType) -> None:
    """Make DeepSpeed build our optimizers from its JSON, check the configuration, and tell them of its own clipping."""
    engine_class = vars(engine).get("DeepSpeedEngine")
    _wrap(engine_class, "_is_supported_optimizer", _supported, 'an "optimizer" block in the DeepSpeed JSON')
    _wrap(engine_class, "_configure_optimizer", _configured, "the checks of the DeepSpeed configuration")
    _wrap(engine_class, "_configure_basic_optimizer", _built, 'an "optimizer" block in the DeepSpeed JSON')
    _wrap(engine_class, "clip_fp32_gradients", _observed, "AHB's unclipped gradients under ZeRO-0")


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any], what: str) -> None:
    original = vars(owner).get(name) if owner is not None else None
    if original is None:
        # An import must not fail for the sake of a hook.
        warnings.warn(
            f"hf-momentum: {what} will not work, because {name} is missing here (tested: {TESTED_VERSIONS})",
            RuntimeWarning,
            stacklevel=2,
        )
    elif not isinstance(original, wrapt.FunctionWrapper):
        setattr(owner, name, wrapt.FunctionWrapper(original, wrapper))


def _mapped(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    optimizer = args[0] if args else kwargs["optimizer"]
    return optimizer if isinstance(optimizer, MomentumOptimizer) else wrapped(*args, **kwargs)


def _supported(wrapped: Any, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return named_in(engine._config._param_dict) is not None or wrapped(*args, **kwargs)


def _configured(wrapped: Any, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    client = args[0] if args else kwargs.get("client_optimizer")
    config: Mapping[str, Any] = engine._config._param_dict
    ours = isinstance(client, MomentumOptimizer) or (client is None and named_in(config) is not None)
    if ours:
        check_config(config)
        engine._config.zero_force_ds_cpu_optimizer = False
        engine._config.zero_allow_untested_optimizer = True
    result = wrapped(*args, **kwargs)
    if isinstance(engine.basic_optimizer, MomentumOptimizer) and engine.optimizer is not engine.basic_optimizer:
        engine.basic_optimizer.wrapper = engine.optimizer
    return result


def _built(wrapped: Any, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    spec = named_in(engine._config._param_dict)
    if spec is None:
        return wrapped(*args, **kwargs)
    parameters = dict(engine.optimizer_params() or {})
    spec.check(parameters)
    return spec.cls(args[0] if args else kwargs["model_parameters"], **parameters)


def _observed(wrapped: Any, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(engine.basic_optimizer, ObservesGradients):
        engine.basic_optimizer.observe_gradients()
    return wrapped(*args, **kwargs)


def named_in(config: Mapping[str, Any]) -> OptimizerSpec | None:
    """The optimizer of ours that a DeepSpeed configuration names, by its `--optim` name or its class, or None.

    Example:
        >>> named_in({"optimizer": {"type": "TAM", "params": {"lr": 0.1}}}).name
        'tam'
        >>> named_in({"optimizer": {"type": "AdamW"}}) is None
        True
    """
    named = str((config.get("optimizer") or {}).get("type", "")).lower()
    return next((spec for spec in OPTIMIZERS.values() if named in (spec.name, spec.cls.__name__.lower())), None)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed configuration under which our optimizers would not be exact, or would not run at all.

    Raises:
        InputError: with the key, its value and what to set.

    Example:
        >>> check_config({"zero_optimization": {"stage": 3}})
        >>> check_config({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}})
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: DeepSpeed's offload_optimizer.device is 'nvme': ...
    """
    zero = config.get("zero_optimization") or {}
    optimizer, param = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
    if optimizer.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer") is True:
        raise InputError(
            "DeepSpeed's zero_force_ds_cpu_optimizer is true: with offloaded optimizer state it allows DeepSpeed's own "
            "Adam only. Set it to false, or leave it out"
        )
    for key, value, accepted in (
        ("offload_optimizer.device", optimizer.get("device", "none"), ("none", "cpu")),
        ("offload_param.device", param.get("device", "none"), ("none", "cpu")),
        ("offload_optimizer.ratio", optimizer.get("ratio", 1.0), (1.0,)),
        ("zero_hpz_partition_size", zero.get("zero_hpz_partition_size", 1), (0, 1)),
        ("mics_shard_size", zero.get("mics_shard_size", -1), (-1, 0)),
        ("zenflow", bool(zero.get("zenflow")), (False,)),
        ("elastic_checkpoint", bool(zero.get("elastic_checkpoint")), (False,)),
        ("torch_autocast.enabled", bool((config.get("torch_autocast") or {}).get("enabled")), (False,)),
        ("tensor_parallel.autotp_size", (config.get("tensor_parallel") or {}).get("autotp_size", 0), (0, 1)),
    ):
        if value not in accepted:
            raise InputError(
                f"DeepSpeed's {key} is {value!r}: not tested with optimizers that sum over whole tensors, so refused. "
                f"Accepted: {' or '.join(map(repr, accepted))}. Supported: {SUPPORTED}"
            )
