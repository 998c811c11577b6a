"""hf-momentum: momentum and gradient methods for fine-tuning with Hugging Face Transformers.

Importing this package makes `--optim tam` (and every other registered name) known to transformers' Trainer, now
or as soon as transformers is imported.

Example:
    >>> import torch, hf_momentum
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = hf_momentum.create_optimizer("tam", model, lr=0.1)
    >>> type(optimizer).__name__
    'TAM'
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from hf_momentum.errors import InputError
from hf_momentum.integrations import (
    OPTIMIZERS,
    OptimizerSpec,
    create_optimizer,
    load_plugins,
    optimizer_cls_and_kwargs,
    register,
)
from hf_momentum.integrations import deepspeed_hook as _deepspeed_hook
from hf_momentum.integrations import transformers_hook as _transformers_hook
from hf_momentum.optim import (
    AHBSGD,
    TAM,
    AdaTAM,
    AdaTAMW,
    AHBAdam,
    AHBAdamW,
    CriticalAdamW,
    CriticalSGD,
    MomentumSchedule,
    VRAdam,
    VRMomentum,
)

if TYPE_CHECKING:
    from hf_momentum.surgery import Bloop
    from hf_momentum.training import (
        BloopArguments,
        BloopMixin,
        BloopTrainer,
        MomentumTrainer,
        MomentumTrainingArguments,
    )

__version__ = _version("hf-momentum")

__all__ = [
    "AHBSGD",
    "OPTIMIZERS",
    "TAM",
    "AHBAdam",
    "AHBAdamW",
    "AdaTAM",
    "AdaTAMW",
    "Bloop",
    "BloopArguments",
    "BloopMixin",
    "BloopTrainer",
    "CriticalAdamW",
    "CriticalSGD",
    "InputError",
    "MomentumSchedule",
    "MomentumTrainer",
    "MomentumTrainingArguments",
    "OptimizerSpec",
    "VRAdam",
    "VRMomentum",
    "create_optimizer",
    "optimizer_cls_and_kwargs",
    "register",
]

_transformers_hook.install()
_deepspeed_hook.install()


def __getattr__(name: str) -> Any:
    if name == "Bloop":
        from hf_momentum.surgery import Bloop

        return Bloop
    # These need transformers, which `import hf_momentum` must not load.
    if name in ("BloopArguments", "BloopMixin", "BloopTrainer", "MomentumTrainer", "MomentumTrainingArguments"):
        import hf_momentum.training

        return getattr(hf_momentum.training, name)
    raise AttributeError(f"module 'hf_momentum' has no attribute {name!r}")


# Last, because their modules import this one.
load_plugins()
