"""Makes Accelerate's FSDP2 and DeepSpeed run on CPU processes; Python imports this at start when it is on PYTHONPATH.

For tests only. The real launcher files then start real FSDP2 and ZeRO on a machine without a GPU, over gloo. Each patch
waits for its library to be imported, so that a process which uses none of them stays as it is. And it spares the
processes' time: what the imports make is never garbage, and is not searched for it again and again.
"""

import atexit
import gc
import os
from types import ModuleType

import wrapt


def fsdp_on_cpu(state: ModuleType) -> None:
    """Accelerate turns a launch with FSDP into plain DDP on CPU processes, silently; and asks DeepSpeed for NCCL."""
    initialise, choose = state.PartialState.__init__, state.PartialState._prepare_backend

    def init(self, cpu: bool = False, **kwargs) -> None:
        initialise(self, cpu, **kwargs)
        shared = state.PartialState._shared_state
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if fsdp and shared.get("distributed_type") == state.DistributedType.MULTI_CPU:
            shared["distributed_type"] = state.DistributedType.MULTI_GPU

    def backend(self, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None):
        name, distributed_type = choose(self, cpu, sagemaker_dp, backend)
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return ("gloo" if name is None and launched and not cpu else name), distributed_type

    state.PartialState.__init__, state.PartialState._prepare_backend = init, backend


def bf16_on_cpu(training_args: ModuleType) -> None:
    """transformers refuses bf16 without a GPU unless use_cpu is set, and with use_cpu Accelerate skips DeepSpeed."""
    training_args.is_torch_bf16_gpu_available = lambda: True


def no_compiled_ops(deepspeed: ModuleType) -> None:
    """DeepSpeed would compile its shared-memory all-reduce at the first launch; gloo serves."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def imports_are_no_garbage(_: ModuleType) -> None:
    """A Trainer collects garbage after each run, which takes longer than a tiny run itself if all modules take part."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # extensions that look for leaks at the end would take it all for such


gc.set_threshold(50_000)
wrapt.register_post_import_hook(imports_are_no_garbage, "transformers.trainer")
wrapt.register_post_import_hook(fsdp_on_cpu, "accelerate.state")
wrapt.register_post_import_hook(bf16_on_cpu, "transformers.training_args")
wrapt.register_post_import_hook(no_compiled_ops, "deepspeed")
