"""The fields of a recipe: model, data, PEFT, and all of transformers' TrainingArguments."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.training.callbacks import parse_schedule
from hf_momentum.training.processes import launched_for, launched_processes

Task = Literal["causal_lm", "chat", "preference", "sequence_classification", "image_classification"]

# The tasks that TRL's trainers train, tokenizing by themselves.
TRL_TASKS = ("chat", "preference")


@dataclass
class ModelArguments:
    """Which model is fine-tuned.

    Example:
        >>> ModelArguments().model_name_or_path
        'scratch'
    """

    task: Task = field(
        default="causal_lm",
        metadata={
            "help": "What the model is trained to do. chat and preference run TRL's SFTTrainer and DPOTrainer (extra "
            "trl), whose arguments are then fields, too."
        },
    )
    model_name_or_path: str = field(
        default="scratch",
        metadata={
            "help": "A Hub model, a local folder, or 'scratch': a small Llama over bytes that is trained on "
            "scratch_dataset first, once, and cached. 'scratch' needs no network."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    model_dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Dtype of the weights; mixed precision is bf16/fp16 of the trainer."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager, flash_attention_2 or what else transformers takes; its own choice if empty."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: hold the base model in 4 bits (NF4 with double quantisation, computing in bfloat16). Needs "
            "lora and the package bitsandbytes."
        },
    )
    scratch_dataset: str = field(default="stdlib:prose@train", metadata={"help": "Text that 'scratch' is trained on."})
    scratch_hidden_size: int = field(default=192, metadata={"help": "Width of 'scratch'; heads are 32 wide."})
    scratch_layers: int = field(default=4, metadata={"help": "Number of blocks of 'scratch'."})
    scratch_steps: int = field(default=300, metadata={"help": "Optimizer steps (AdamW) of 'scratch'."})
    scratch_batch_size: int = field(default=16, metadata={"help": "Blocks per step of 'scratch', over all processes."})
    scratch_learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of 'scratch'."})
    cache_dir: str = field(
        default="~/.cache/hf-momentum", metadata={"help": "Where trained 'scratch' models are kept."}
    )


@dataclass
class DataArguments:
    """Which text it is trained on, and every split it is measured on.

    A dataset is written SOURCE@SPLIT. SOURCE is `stdlib:prose`, `stdlib:code` or `stdlib:json` (text that comes with
    Python: its documentation, its source, and a JSON object for each of its functions), a .jsonl, .json, .csv, .tsv,
    .parquet or .txt file, a folder, or a Hub dataset (`owner/name`, `owner/name:config`).
    SPLIT is train unless given. An evaluation split is written NAME=SOURCE@SPLIT.

    Example:
        >>> DataArguments(in_distribution=["code=stdlib:code@test"]).block_size
        256
    """

    train_dataset: str = field(default="stdlib:code@train", metadata={"help": "What to fine-tune on: SOURCE@SPLIT."})
    validation_dataset: str | None = field(
        default=None, metadata={"help": "What eval_strategy evaluates on during training: SOURCE@SPLIT."}
    )
    in_distribution: list[str] = field(
        default_factory=list, metadata={"help": "Splits like the training data: NAME=SOURCE@SPLIT."}
    )
    shifted: list[str] = field(
        default_factory=list, metadata={"help": "Splits of other distributions: NAME=SOURCE@SPLIT."}
    )
    must_not_forget: list[str] = field(
        default_factory=list, metadata={"help": "Splits of what the model knew before: NAME=SOURCE@SPLIT."}
    )
    auxiliary: list[str] = field(
        default_factory=list, metadata={"help": "Splits like the auxiliary data: NAME=SOURCE@SPLIT."}
    )
    evaluation_suite: str | None = field(
        default=None,
        metadata={
            "help": "A suite (file or shipped name), on all of whose splits eval_strategy evaluates in training."
        },
    )
    evaluation_sources: list[str] = field(
        default_factory=list, metadata={"help": "Sources in place of the suite's: NAME=SOURCE@SPLIT."}
    )
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column that holds the text. Chat and preference data have TRL's columns: messages, or prompt and "
            "completion; chosen and rejected."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column that holds the picture."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the class."})
    block_size: int = field(
        default=256,
        metadata={"help": "Tokens per example; longer texts are cut or wrapped. TRL's trainers take max_length."},
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Use only so many, drawn by data_seed."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Use only so many of each split."})


@dataclass
class PeftArguments:
    """Whether to train low-rank adapters (LoRA) or all weights.

    Example:
        >>> PeftArguments(lora=True).lora_r
        8
    """

    lora: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters; the update is alpha/r B A."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules to adapt, by name, or all-linear."}
    )
    lora_modules_to_save: list[str] = field(
        default_factory=list,
        metadata={"help": "Modules to train in full and save beside the adapters; a classifier's new head always is."},
    )


@dataclass
class BloopArguments:
    """A main and an auxiliary objective: which auxiliary data or loss, and how the two gradients become one.

    Without `aux_dataset` and `aux_loss` a recipe has one objective, and nothing here has an effect.

    Example:
        >>> BloopArguments(lam=[0.3], rho="auto").surgery
        'bloop'
    """

    surgery: Literal["bloop", "mixed", "replay", "dynamic_barrier", "pcgrad", "simple"] = field(
        default="bloop",
        metadata={
            "help": "bloop: the auxiliary gradient without its part along an average of main gradients. Baselines: "
            "mixed (the weighted sum), replay (auxiliary examples among the main ones), dynamic_barrier, pcgrad, "
            "simple (bloop without the average)."
        },
    )
    lam: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={"help": "Weight of the auxiliary gradient, >= 0; one for all auxiliaries or one for each. 0: none."},
    )
    rho: str = field(
        default="0.01",
        metadata={"help": "Rate of the average of main gradients, in (0, 1]; auto sets it from the measured noise."},
    )
    ema_order: Literal["paper", "ema_first"] = field(
        default="paper",
        metadata={"help": "Project on the average from before this batch (paper), or update it first (ema_first)."},
    )
    ema_init: Literal["zeros", "first_gradient"] = field(
        default="zeros", metadata={"help": "What the average starts as; zeros makes the first step a plain mixture."}
    )
    ema_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Dtype of the average; bfloat16 is rounded stochastically."}
    )
    surgery_metric: Literal["euclidean", "adam"] = field(
        default="euclidean",
        metadata={"help": "Inner product of the projection; adam weighs by 1 / (sqrt(v) + eps), for Adam's step."},
    )
    skip_nonfinite: bool = field(
        default=False,
        metadata={
            "help": "Skip a step whose gradient is not finite, instead of stopping the run; holds one gradient more."
        },
    )
    aux_dataset: list[str] = field(
        default_factory=list,
        metadata={"help": "Auxiliary training data, the most important first: NAME=SOURCE@SPLIT."},
    )
    aux_loss: Literal["l2", "distance"] | None = field(
        default=None,
        metadata={"help": "An auxiliary loss of the trained weights alone: l2 |w|^2/2, distance |w - w_start|^2/2."},
    )
    aux_batch_size: int | None = field(
        default=None,
        metadata={"help": "Auxiliary examples per device and micro-batch; as many as main ones unless given."},
    )
    aux_sampling: Literal["shuffled", "sequential"] = field(
        default="shuffled", metadata={"help": "Order of the auxiliary examples, anew in every pass over them."}
    )
    max_aux_examples: int | None = field(
        default=None, metadata={"help": "Use only so many of each auxiliary dataset, drawn by data_seed."}
    )

    def __post_init__(self) -> None:
        """Take a single weight, and rho as a number, too."""
        self.rho = str(self.rho)
        self.lam = [self.lam] if isinstance(self.lam, int | float) else list(self.lam)


@dataclass
class MomentumTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with this package's optimizer names and defaults.

    `optim` takes every registered name even where transformers' own table cannot be extended. A non-finite loss
    stops the run (`logging_nan_inf_filter` would hide it, so it is off), and processes that were launched on a
    machine without an accelerator find each other on the CPU instead of silently training apart.

    Example:
        >>> MomentumTrainingArguments(output_dir="out", optim="tam", use_cpu=True).optim.value
        'tam'
    """

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace non-finite losses in the log; off, because they stop the run."}
    )
    log_dynamics: bool = field(
        default=True, metadata={"help": "Log the optimizer's inner quantities (TAM: cosine, damping) with the loss."}
    )
    log_dynamics_per_layer: bool = field(
        default=False, metadata={"help": "Log those that are kept for each parameter under its name, too."}
    )
    log_update_norm: bool = field(
        default=False,
        metadata={"help": "Log the norm of the weights' update; holds a copy of the trained weights at logged steps."},
    )
    log_layers: bool = field(
        default=False,
        metadata={
            "help": "Log gradient norm, relative update and gradient noise of every layer group, with pictures at the "
            "end; holds a copy of the trained weights at logged steps."
        },
    )
    log_layers_split: Literal["blocks", "parts"] = field(
        default="blocks", metadata={"help": "What is a layer group: a block, or attention, MLP and norms of each."}
    )
    momentum_schedule: str | None = field(
        default=None,
        metadata={
            "help": "A law for the momentum of any optimizer: critical, critical_exact, critical_nesterov, hybrid, "
            "constant, onecycle or demon."
        },
    )
    momentum_schedule_args: str | None = field(
        default=None, metadata={"help": "Its arguments, as in switch=fraction,fraction=0.6 or curvature=measured."}
    )

    def __post_init__(self) -> None:
        """Accept registered names without transformers' table, and CPU processes without a flag."""
        # Under use_cpu Accelerate leaves DeepSpeed out, silently.
        deepspeed = launched_for() == DistributedType.DEEPSPEED
        if launched_processes() > 1 and not deepspeed and not torch.accelerator.is_available():
            self.use_cpu = True
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device to pin for; torch would warn at every loader
        name = str(self.optim)
        known = name in OPTIMIZERS and not _known_to_transformers(name)
        if known:
            self.optim = "adamw_torch"
        super().__post_init__()
        if known:
            self.optim = name
        if self.momentum_schedule is None:
            if self.momentum_schedule_args:
                raise ValueError("momentum_schedule_args is given, but no momentum_schedule")
        else:
            parse_schedule(self.momentum_schedule, self.momentum_schedule_args)


def _known_to_transformers(name: str) -> bool:
    from transformers.training_args import OptimizerNames

    return name in [member.value for member in OptimizerNames]
