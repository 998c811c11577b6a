"""ms-swift's `--optimizer tam`: a file that imports this one is the plugin that `--external_plugins` takes.

    echo 'import hf_momentum.integrations.ms_swift' > momentum.py
    swift sft --external_plugins momentum.py --optimizer tam ...

Imports ms-swift. Its own groups, schedule, clipping and `--optim_args` hold as for `--optim`.
"""

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

from hf_momentum.integrations.registry import OPTIMIZERS


class RegisteredOptimizer(OptimizerCallback):  # type: ignore[misc]
    """Builds the optimizer that `--optimizer` names as transformers' Trainer builds the one that `--optim` names."""

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer, on the Trainer's groups with and without weight decay."""
        self.args.optim = self.args.optimizer
        return super().create_optimizer(model)


# ms-swift reads plugins after its command line: too late for --optim, whose choices the parser has fixed by then.
optimizers_map.update(dict.fromkeys(OPTIMIZERS, RegisteredOptimizer))
