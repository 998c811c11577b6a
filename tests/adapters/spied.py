"""Run a module as `__main__`, write to RUN what it trained: python -m tests.adapters.spied RUN MODULE [its arguments].

Imports nothing of hf_momentum before that module trains, so that its names come from where they should.
"""

import copy
import functools
import runpy
import sys
from typing import Any

import torch
import transformers
from transformers import TrainerCallback


class Spy(TrainerCallback):
    """Notes weights before and after, the batches between, and what optimizes."""

    seen: dict[str, Any]

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        from hf_momentum.integrations.what_runs import base_optimizer

        base = base_optimizer(optimizer)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
        self.seen = {"optimizer": type(base).__name__, "groups": copy.deepcopy(groups), "batches": []}
        self.seen["before"] = copy.deepcopy(model.state_dict())
        self.hook = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, positional, named):
        assert not positional
        self.seen["batches"].append(copy.deepcopy({k: v for k, v in named.items() if k != "num_items_in_batch"}))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.hook.remove()
        self.seen |= {"steps": state.global_step, "after": copy.deepcopy(model.state_dict())}


def give_to_every_trainer(spy: Spy) -> None:
    """Not by the list of default callbacks, which ms-swift replaces."""
    initialise = transformers.Trainer.__init__

    @functools.wraps(initialise)
    def with_a_spy(self, *arguments, **settings):
        initialise(self, *arguments, **settings)
        self.add_callback(spy)

    transformers.Trainer.__init__ = with_a_spy


if __name__ == "__main__":
    file, *sys.argv = sys.argv[1:]
    give_to_every_trainer(spy := Spy())
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    torch.save(spy.seen, file)
