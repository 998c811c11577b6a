"""Recipes, Trainer subclasses, callbacks and the main job."""

from hf_momentum.training.arguments import (
    BloopArguments,
    DataArguments,
    ModelArguments,
    MomentumTrainingArguments,
    PeftArguments,
)
from hf_momentum.training.bloop import BloopMixin, BloopTrainer
from hf_momentum.training.callbacks import DynamicsCallback, FiniteCheckpointCallback, MomentumScheduleCallback
from hf_momentum.training.layer_log import LayerGradientLog
from hf_momentum.training.recipe import Recipe, load_recipe
from hf_momentum.training.trainer import MomentumTrainer

__all__ = [
    "BloopArguments",
    "BloopMixin",
    "BloopTrainer",
    "DataArguments",
    "DynamicsCallback",
    "FiniteCheckpointCallback",
    "LayerGradientLog",
    "ModelArguments",
    "MomentumScheduleCallback",
    "MomentumTrainer",
    "MomentumTrainingArguments",
    "PeftArguments",
    "Recipe",
    "load_recipe",
]
