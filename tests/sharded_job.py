"""A program for `accelerate launch`: trains a tiny model with many optimizers under one layout, and records what ran.

`plan.json` holds `{"cases": [...], "processes": n}`; the weights of each case go to `<label>.pt` and the facts to
`facts.json` beside it. Without a launcher it is the single process that all layouts are compared with.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_momentum import BloopArguments, BloopTrainer, MomentumTrainer, MomentumTrainingArguments
from hf_momentum.integrations.what_runs import base_optimizer
from hf_momentum.kernels import Packed, Reduced
from hf_momentum.optim import MomentumOptimizer
from hf_momentum.optim.ahb import ObservesGradients
from hf_momentum.optim.piece_state import PieceState

SIZES = {
    "even": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "heads": 4, "layers": 2},
    # Nothing here divides by 3, and the norms have fewer rows than a fourth process would need.
    "odd": {"vocab_size": 131, "hidden_size": 56, "intermediate_size": 173, "heads": 7, "layers": 3},
    # On two processes: matrices whose half has 4096 elements and more beside others whose half has fewer.
    "wide": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "heads": 4, "layers": 2},
}
GLOBAL_BATCH, EXAMPLES, LENGTH, STEPS = 12, 24, 16, 20


class NaiveTAM(torch.optim.Optimizer):
    """TAM as one would write it for one process: its cosine is that of whatever the groups hold."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        local = [(p.to_local(), p.grad.to_local()) if isinstance(p, DTensor) else (p, p.grad) for p in held]
        momenta = [self.state[p].setdefault("m", torch.zeros_like(w)) for p, (w, _) in zip(held, local, strict=True)]
        dot, mm, gg = (
            sum(float((a * b).sum()) for a, b in pairs)
            for pairs in (
                [(m, g) for m, (_, g) in zip(momenta, local, strict=True)],
                [(m, m) for m in momenta],
                [(g, g) for _, g in local],
            )
        )
        cosine = dot / (mm * gg) ** 0.5 if mm * gg > 0 else 0.0
        group = self.param_groups[0]
        group["s"] = 0.9 * group.get("s", 0.0) + 0.1 * cosine
        for m, (w, g) in zip(momenta, local, strict=True):
            m.mul_(0.9).add_(g, alpha=(1 + group["s"]) / 2)
            w.sub_(m, alpha=group["lr"])


class ClipsFirst(MomentumTrainer):
    """Leaves the clipping to accelerate, by torch's `clip_grad_norm_` before the step."""

    clips_inside = False


def examples(size: str) -> list[dict[str, torch.Tensor]]:
    """Few and related sequences, so that the gradients of successive batches agree and a wrong cosine shows."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(SIZES[size]["vocab_size"], (3, LENGTH), generator=generator)
    rows = base[torch.arange(EXAMPLES) % 3].clone()
    rows[:, -2:] = torch.randint(SIZES[size]["vocab_size"], (EXAMPLES, 2), generator=generator)
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in rows]


def auxiliary_examples(size: str, number: int) -> list[dict[str, torch.Tensor]]:
    """Other sequences, related among themselves and a little to the main ones; no batch size divides their number."""
    generator = torch.Generator().manual_seed(10 + number)
    rows = torch.randint(SIZES[size]["vocab_size"], (1, LENGTH), generator=generator).repeat(17, 1)
    rows[:, : LENGTH // 2] = examples(size)[number]["input_ids"][: LENGTH // 2]
    rows[:, -3:] = torch.randint(SIZES[size]["vocab_size"], (17, 3), generator=generator)
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in rows]


def trainer_of(case: dict[str, Any], model: Any, args: MomentumTrainingArguments, **options: Any) -> MomentumTrainer:
    """The kind of trainer that a case asks for."""
    size, bloop = case.get("size", "even"), case.get("bloop")
    if bloop is None:
        kind = ClipsFirst if case.get("clips_first") else MomentumTrainer
        return kind(model, args, train_dataset=examples(size), **options)
    auxiliaries = {f"aux{k}": auxiliary_examples(size, k) for k in range(case.get("auxiliaries", 1))}
    return BloopTrainer(
        model,
        args,
        train_dataset=examples(size),
        aux_train_dataset=auxiliaries or None,
        bloop=BloopArguments(**bloop),
        **options,
    )


def model_of(size: str, tied: bool, lora: bool) -> Any:
    torch.manual_seed(0)
    numbers = dict(SIZES[size])
    config = LlamaConfig(
        num_hidden_layers=numbers.pop("layers"),
        num_attention_heads=numbers.pop("heads"),
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        **numbers,
    )
    model = LlamaForCausalLM(config)
    if not lora:
        return model
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def whole_weights(trainer: MomentumTrainer) -> dict[str, torch.Tensor]:
    """Every trained weight, whole, in float32; a collective."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    params = [p for p in model.parameters() if p.requires_grad]
    if hasattr(params[0], "ds_id"):
        import deepspeed

        gathered: Any = deepspeed.zero.GatheredParameters(params)
    else:
        gathered = nullcontext()
    with gathered:
        return {
            name.replace("_orig_mod.", ""): (p.full_tensor() if isinstance(p, DTensor) else p).detach().float().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }


@contextmanager
def wrong_scale(factor: float) -> Iterator[None]:
    """Read momenta that are stored in fewer bits as `factor` times what they are; only where no kernel runs."""
    read = Reduced.decoded
    Reduced.decoded = lambda state: [(1 if state.positive else factor) * value for value in read(state)]
    try:
        yield
    finally:
        Reduced.decoded = read


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def parts_of(optimizer: MomentumOptimizer) -> Iterable[tuple[str, torch.Tensor | Packed]]:
    """Every state tensor of this process by name, those of one holder's pieces one by one."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, PieceState):
                yield from ((name, part) for _, part in value.pieces.values())
            elif isinstance(value, torch.Tensor):
                yield name, local(value)


def held(trainer: MomentumTrainer, base: MomentumOptimizer) -> list[dict[str, Any]]:
    """For each process what it holds: digests of weights and state, and the state's elements and bytes by dtype."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    digests = {"weights": hashlib.sha256(), "state": hashlib.sha256()}
    shard = 0
    for param in model.parameters():
        if isinstance(param, DTensor):
            shard = param.device_mesh.get_local_rank(param.device_mesh.ndim - 1)
        digests["weights"].update(local(param).float().numpy().tobytes())
    counts: dict[str, list[int]] = {}
    largest = 0
    for name, part in parts_of(base):
        tensors = [part.codes, part.scales] if isinstance(part, Packed) else [part]
        for tensor in tensors:
            digests["state"].update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        kind = "int8" if isinstance(part, Packed) else str(part.dtype).removeprefix("torch.")
        elements, size = counts.setdefault(kind, [0, 0])
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        counts[kind] = [elements + tensors[0].numel(), size]
        if kind == "float32" and name != "previous_grad":
            largest = max(largest, tensors[0].numel())
    here = {name: digest.hexdigest() for name, digest in digests.items()}
    found = {**here, "shard": shard, "counts": counts, "largest_float32": largest}
    if not dist.is_initialized():
        return [found]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return everywhere


class Communication:
    """Counts the collectives that an optimizer itself issues, in `step` and in `observe_gradients`."""

    def __init__(self, optimizer: Any) -> None:
        self.calls = self.collectives = 0
        optimizer.step = self._counted(optimizer.step, calls=1)
        if isinstance(optimizer, ObservesGradients):
            optimizer.observe_gradients = self._counted(optimizer.observe_gradients, calls=0)

    def _counted(self, method: Any, calls: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with CommDebugMode() as mode:
                result = method(*args, **kwargs)
            self.calls += calls
            self.collectives += mode.get_total_counts()
            return result

        return counted


def averages(base: torch.optim.Optimizer) -> dict[str, int]:
    """Elements of Bloop's averages that this process holds, and of the tensors that hold them."""
    kept = [(holder, state["bloop_ema"]) for holder, state in base.state.items() if "bloop_ema" in state]
    return {
        "elements": sum(local(average).numel() for _, average in kept),
        "held": sum(local(holder).numel() for holder, _ in kept),
    }


def run(case: dict[str, Any], processes: int, folder: Path) -> dict[str, Any]:
    """Train one case and save its weights."""
    size, deepspeed_keys = case.get("size", "even"), case.get("deepspeed", {})
    accumulation = case.get("accumulation", 1)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    fields = {
        "optim": case.get("optim", "adamw_torch"),
        "optim_args": case.get("optim_args"),
        "learning_rate": case["lr"],
        "weight_decay": case.get("weight_decay", 0.1),
        "max_grad_norm": case.get("max_grad_norm", 1.0),
        "max_steps": case.get("steps", STEPS),
        "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        "bf16": case.get("bf16", False),
        "use_cpu": processes == 1 and not case.get("launched", False),
        "momentum_schedule": case.get("momentum_schedule"),
        "momentum_schedule_args": case.get("momentum_schedule_args"),
        **case.get("fields", {}),
    }
    args = MomentumTrainingArguments(output_dir=str(folder / "runs" / case["label"]), **fields)
    naive = {"optimizer_cls_and_kwargs": (NaiveTAM, {"lr": case["lr"]})} if case.get("naive") else {}
    model = model_of(size, case.get("tied", False), case.get("lora", False))
    model.to(getattr(torch, case.get("model_dtype", "float32")))
    trainer = trainer_of(case, model, args, **naive)
    if deepspeed_keys and trainer.is_deepspeed_enabled:
        config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
        for key, value in deepspeed_keys.items():
            *sections, last = key.split(".")
            place = config
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
    seen: dict[str, Any] = {}
    prepare = trainer._prepare_for_training

    def prepared(*arguments: Any, **keywords: Any) -> Any:
        result = prepare(*arguments, **keywords)
        base = base_optimizer(trainer.optimizer)
        seen["communication"], seen["base"] = Communication(base), base
        if case.get("forgets"):  # a checkpoint without the momenta
            base.state.clear()
        return result

    trainer._prepare_for_training = prepared
    with wrong_scale(case.get("wrong_scale", 1)):
        trainer.train(resume_from_checkpoint=case.get("resume"))
    base, communication = seen["base"], seen["communication"]
    weights = whole_weights(trainer)
    start = {name: p for name, p in model_of(size, case.get("tied", False), case.get("lora", False)).named_parameters()}
    ours = isinstance(base, MomentumOptimizer)
    scale = max(float(value.abs().max()) for value in weights.values())
    moved = max(float((value - start[name].detach()).abs().max()) for name, value in weights.items()) / scale
    main = not dist.is_initialized() or dist.get_rank() == 0
    if main:
        torch.save(weights, folder / f"{case['label']}.pt")
    history = trainer.state.log_history
    wrapper = None if not ours or base.wrapper is None else type(base.wrapper).__name__
    return {
        "label": case["label"],
        "num_processes": args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "optimizer": type(base).__name__,
        "kind": base.layout().kind if ours else None,
        "wrapper": wrapper,
        "calls": communication.calls,
        "collectives": communication.collectives,
        "steps": trainer.state.global_step,
        "moved": moved,
        "clips_inside": trainer.clips_inside,
        "held": held(trainer, base) if ours else None,
        "cosines": [entry["cosine"] for entry in history if "cosine" in entry],
        "surgery": {
            name: [entry[name] for entry in history if name in entry]
            for name in ("aux_loss", "aux_cosine", "removed_fraction", "noise_ratio", "rho")
        },
        "averages": averages(base),
        "layers": [
            {name: value for name, value in entry.items() if "/" in name} for entry in history if "loss" in entry
        ],
        "grad_norms": [entry["grad_norm"] for entry in history if entry.get("grad_norm") is not None],
    }


def main() -> None:
    """Run the plan; errors that the package raises on purpose are recorded as its answer."""
    from hf_momentum.errors import InputError, TrainingStopped

    path = Path(sys.argv[1])
    plan = json.loads(path.read_text())
    facts = []
    for case in plan["cases"]:
        try:
            facts.append(run(case, plan["processes"], path.parent))
        except (InputError, TrainingStopped) as error:
            facts.append({"label": case["label"], "error": str(error)})
    if not dist.is_initialized() or dist.get_rank() == 0:
        (path.parent / "facts.json").write_text(json.dumps(facts, indent=1))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
