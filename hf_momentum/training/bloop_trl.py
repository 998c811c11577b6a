"""Auxiliary objectives for TRL's trainers, whose datasets are tokenized as TRL tokenizes the main one.

Needs the package `trl`, which is loaded when this module is.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hf_momentum.training.bloop import BloopMixin
from hf_momentum.training.trl_trainers import MomentumDPOTrainer, MomentumSFTTrainer


class BloopSFTTrainer(BloopMixin, MomentumSFTTrainer):
    """Supervised fine-tuning with an auxiliary objective; arguments of `trl.SFTTrainer` and `BloopMixin`.

    Auxiliary datasets may have every format that `SFTTrainer` takes: text, prompt and completion, or messages.

    Example:
        >>> BloopSFTTrainer.__mro__[1].__name__
        'BloopMixin'
    """

    def prepare_auxiliary(self, dataset: Any, name: str) -> Any:
        """Tokenize, and pack if the main data is packed."""
        return self.prepare_split(dataset, name, packed=self.args.packing)

    def auxiliary_context(self) -> AbstractContextManager[None]:
        """TRL's logged accuracies stay those of the main data."""
        return _metrics_aside(self)


class BloopDPOTrainer(BloopMixin, MomentumDPOTrainer):
    """Preference optimization with an auxiliary objective; arguments of `trl.DPOTrainer` and `BloopMixin`.

    An auxiliary dataset holds preferences, too; for another kind of loss give `aux_loss_func`, with a collator for it.

    Example:
        >>> BloopDPOTrainer.__mro__[1].__name__
        'BloopMixin'
    """

    def prepare_auxiliary(self, dataset: Any, name: str) -> Any:
        """Tokenize prompt, chosen and rejected answers; data with a loss of its own is left as it is."""
        if self._aux_loss_func is not None:
            return dataset
        return self.prepare_split(dataset, name)

    def auxiliary_context(self) -> AbstractContextManager[None]:
        """TRL's logged rewards stay those of the main data."""
        return _metrics_aside(self)


@contextmanager
def _metrics_aside(trainer: Any) -> Iterator[None]:
    kept = trainer._metrics
    trainer._metrics = {mode: defaultdict(list) for mode in kept}
    try:
        yield
    finally:
        trainer._metrics = kept
