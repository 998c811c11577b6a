"""A program for `accelerate launch`: runs several recipes in one launch and records what really ran."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from hf_momentum.errors import InputError
from hf_momentum.training import job, load_recipe


def main() -> None:
    """Read `[[name, words], ...]` from a file; write `facts.json` beside it at the end."""
    plan = Path(sys.argv[1])
    facts = []
    for name, words in json.loads(plan.read_text()):
        recipe = load_recipe(None, words)
        try:
            job.train(recipe)
            error = None
        except InputError as problem:
            error = str(problem)
        state = recipe.training.distributed_state
        facts.append(
            {
                "name": name,
                "num_processes": state.num_processes,
                "distributed_type": state.distributed_type.value,
                "backend": dist.get_backend() if dist.is_initialized() else None,
                "error": error,
            }
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        (plan.parent / "facts.json").write_text(json.dumps(facts))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
