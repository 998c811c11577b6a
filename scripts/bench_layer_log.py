"""What share of a training's time on the processor `LayerGradientLog` takes: for docs/layers.md.

Processor time, not the clock's, so that a busy machine does not matter; on a GPU, whose work goes on meanwhile, run
`bench_training.py --optimizers adamw_torch_fused+layers`.

    python scripts/bench_layer_log.py --width 256 --layers 6 --batch 4 --length 128
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from bench_training import RandomTokens
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_momentum.training import LayerGradientLog


class TimedLog(LayerGradientLog):
    """Adds up the seconds that it takes after the first logging window, in which it draws its signs."""

    seconds = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As in the class."""
        self._timed(super().on_pre_optimizer_step, args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As in the class."""
        self._timed(super().on_optimizer_step, args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As in the class."""
        self._timed(super().on_log, args, state, control, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """No pictures."""

    def _timed(self, method: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin = time.process_time()
        method(args, state, control, **kwargs)
        self.seconds += (time.process_time() - begin) * (state.global_step >= state.logging_steps)


class Total(TrainerCallback):
    """The seconds of all steps after the first logging window."""

    seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock at the window's end and after each later step."""
        if state.global_step == state.logging_steps:
            self._begin = time.process_time()
        elif state.global_step > state.logging_steps:
            self.seconds = time.process_time() - self._begin


def main(argv: Sequence[str] | None = None) -> int:
    """Train three logging windows, and print the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 256, "layers": 6, "batch": 4, "length": 128, "logging-steps": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"n_embd": given.width, "n_layer": given.layers, "n_head": max(given.width // 64, 1)}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_positions=given.length, **sizes, **ends))
    log, total = TimedLog(), Total()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=3 * given.logging_steps, per_device_train_batch_size=given.batch, use_cpu=True,
            logging_steps=given.logging_steps, report_to="none", disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        data = RandomTokens(args.max_steps * given.batch, given.length, 8192)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[total])
        log.attach(trainer)
        trainer.train()
    plain = total.seconds - log.seconds
    step = 1e3 * plain / (2 * given.logging_steps)
    tokens = f"{given.batch} x {given.length} tokens a step, logged every {given.logging_steps} steps"
    print(f"{model.num_parameters() / 1e6:.1f}M parameters, {tokens}: a step takes {step:.0f} ms without the log,")
    print(f"and {100 * log.seconds / plain:.2f} % more with it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
