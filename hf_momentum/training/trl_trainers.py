"""TRL's trainers with the additions of `MomentumMixin`, and with splits that are measured before and after training.

Chat templates, the loss on answers alone, packing and preference losses are TRL's own. Needs the package `trl`, which
is loaded when this module is.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_momentum.errors import InputError
from hf_momentum.evaluation.metrics import causal_lm_statistics, preference_statistics
from hf_momentum.training.arguments import MomentumTrainingArguments
from hf_momentum.training.trainer import MomentumMixin

# What a model takes of a batch of text; the rest is for the loss.
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


@dataclass
class MomentumSFTConfig(SFTConfig, MomentumTrainingArguments):
    """`trl.SFTConfig`, with its defaults, and the fields of `MomentumTrainingArguments`.

    Example:
        >>> MomentumSFTConfig(output_dir="out", optim="tam", packing=True, use_cpu=True, bf16=False).optim.value
        'tam'
    """

    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Replace non-finite losses in the log."})
    eval_packing: bool | None = field(
        default=False, metadata={"help": "Pack evaluation data, too; off, because what is measured are examples."}
    )


@dataclass
class MomentumDPOConfig(DPOConfig, MomentumTrainingArguments):
    """`trl.DPOConfig`, with its defaults, and the fields of `MomentumTrainingArguments`.

    Example:
        >>> MomentumDPOConfig(output_dir="out", beta=0.05, use_cpu=True, bf16=False).log_dynamics
        True
    """

    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Replace non-finite losses in the log."})


class MomentumSFTTrainer(MomentumMixin, SFTTrainer):
    """`trl.SFTTrainer` with the additions of `MomentumMixin`; its `predict` gives a row of sums for each example.

    Example:
        >>> MomentumSFTTrainer.__mro__[1].__name__
        'MomentumMixin'
    """

    def prepare_split(self, rows: Any, name: str, packed: bool = False) -> Any:
        """Tokenize rows as TRL tokenizes the training data: text, prompt and completion, or messages."""
        formatting = vars(self).get("_formatting_func")  # kept by TRL since its version 1
        made = self._prepare_dataset(rows, self.processing_class, self.args, packed, formatting, name)
        return self._remove_unused_columns(made, description=name)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """`[examples, 3]`: the columns of `causal_lm_statistics` over the tokens that training would learn."""
        collator = self.data_collator
        # Without padding a batch would be one long row.
        if isinstance(collator, DataCollatorForLanguageModeling) and collator.padding_free:
            self.data_collator = dataclasses.replace(collator, padding_free=False)
        self._measuring = True
        try:
            return super().predict(test_dataset, *args, **kwargs)
        finally:
            self._measuring, self.data_collator = False, collator

    _measuring = False

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL does it, but for `predict`, which wants no logits."""
        if not self._measuring:
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs, logits = _logits(self, model, inputs)
        return None, causal_lm_statistics(logits, inputs["labels"]), None


class MomentumDPOTrainer(MomentumMixin, DPOTrainer):
    """`trl.DPOTrainer` with the additions of `MomentumMixin`; its `predict` gives a row of sums for each pair.

    Example:
        >>> MomentumDPOTrainer.__mro__[1].__name__
        'MomentumMixin'
    """

    def prepare_split(self, rows: Any, name: str) -> Any:
        """Tokenize prompts, chosen and rejected answers as TRL tokenizes the training data."""
        made = self._prepare_dataset(rows, self.processing_class, self.args, name)
        return self._remove_unused_columns(made, description=name)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """`[pairs, 6]`: the columns of `preference_statistics`."""
        self._measuring = True
        try:
            return super().predict(test_dataset, *args, **kwargs)
        finally:
            self._measuring = False

    _measuring = False

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL does it, but for `predict`, which needs no reference model."""
        if not self._measuring:
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs, logits = _logits(self, model, inputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return None, preference_statistics(causal_lm_statistics(logits, labels)), None


@contextlib.contextmanager
def refusals(where: str) -> Iterator[None]:
    """What TRL and chat templates refuse of settings and data, as one line.

    Example:
        >>> with refusals("dataset 'a.jsonl'"):
        ...     raise ValueError("Conversation roles must alternate")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: dataset 'a.jsonl': Conversation roles must alternate
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, TemplateError) as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from error
    except RuntimeError as error:  # one of them is about data: an example without an answer, under assistant_only_loss
        if "no assistant tokens" not in str(error):
            raise
        raise InputError(f"{where}: {' '.join(str(error).split())}") from error


def _logits(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    inputs = trainer._prepare_inputs(inputs)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return inputs, model(**{name: inputs[name] for name in _MODEL_INPUTS if name in inputs}).logits
