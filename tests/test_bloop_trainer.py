"""`BloopTrainer` as its user meets it: what it needs, what it logs, what it refuses, how it continues."""

import json
import logging
import math

import datasets
import pytest
import torch

from hf_momentum import BloopArguments, BloopTrainer, InputError, MomentumTrainer, MomentumTrainingArguments
from hf_momentum.errors import TrainingStopped
from hf_momentum.training import load_recipe
from hf_momentum.training.auxiliary import GlobalOrder
from hf_momentum.training.job import train
from tests.sharded_job import auxiliary_examples, examples, model_of
from tests.test_foreign_scripts import tiny_llama

MAIN = examples("even")
AUXILIARY = auxiliary_examples("even", 0)


def arguments(folder, **fields) -> MomentumTrainingArguments:
    base = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return MomentumTrainingArguments(output_dir=str(folder), **{**base, **fields})


def trainer_of(folder, bloop=None, auxiliary=AUXILIARY, kind=BloopTrainer, options=None, **fields) -> BloopTrainer:
    return kind(
        model_of("even", False, False),
        arguments(folder, **fields),
        train_dataset=MAIN,
        aux_train_dataset=auxiliary,
        bloop=BloopArguments(**{"lam": 0.5, **(bloop or {})}),
        **(options or {}),
    )


def weights(trainer) -> torch.Tensor:
    return torch.cat([param.detach().reshape(-1) for param in trainer.model.parameters()])


# ---- the data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize(("processes", "batch"), [(2, 6), (3, 4), (4, 3), (12, 1)])
def test_the_number_of_processes_does_not_change_the_order(processes, batch, shuffled):
    """Not over the end of the data either, where a batch holds the last and the first examples."""
    alone = iter(GlobalOrder(17, 12, 1, 0, seed=3, shuffled=shuffled))
    parts = [iter(GlobalOrder(17, batch, processes, p, seed=3, shuffled=shuffled)) for p in range(processes)]
    for _ in range(10):
        assert next(alone) == [index for part in parts for index in next(part)]


def test_every_pass_sees_every_example_once_in_another_order():
    order = GlobalOrder(17, 1, 1, 0, seed=3, shuffled=True)
    passes = [[order.index(17 * n + i) for i in range(17)] for n in range(3)]
    assert all(sorted(one) == list(range(17)) for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_a_walk_that_starts_later_goes_on_where_the_other_was():
    whole, rest = iter(GlobalOrder(17, 5, 1, 0, 3, True)), iter(GlobalOrder(17, 5, 1, 0, 3, True, start=15))
    first = [next(whole) for _ in range(6)]
    assert first[3:] == [next(rest) for _ in range(3)]


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["tam", "adamw_torch", "ahb_adamw"])
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_lambda_0_is_the_plain_trainer_bit_for_bit(tmp_path, optim, accumulation):
    fields = {"optim": optim, "gradient_accumulation_steps": accumulation}
    bloop = trainer_of(tmp_path / "a", {"lam": 0.0}, **fields)
    plain = MomentumTrainer(model_of("even", False, False), arguments(tmp_path / "b", **fields), train_dataset=MAIN)
    bloop.train(), plain.train()
    assert torch.equal(weights(bloop), weights(plain))
    assert all("bloop_ema" not in state for state in bloop.optimizer.state.values())


def test_mixed_is_the_weighted_sum_of_the_losses(tmp_path):
    """Against a Trainer whose loss is that sum."""

    class Sum(MomentumTrainer):
        at = 0

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            order = iter(GlobalOrder(len(AUXILIARY), 4, 1, 0, 0, True, start=4 * Sum.at))
            Sum.at += 1
            batch = self._prepare_inputs(self.data_collator([AUXILIARY[i] for i in next(order)]))
            return super().compute_loss(model, inputs) + 0.5 * super().compute_loss(model, batch)

    mixed = trainer_of(tmp_path / "a", {"surgery": "mixed"})
    other = Sum(model_of("even", False, False), arguments(tmp_path / "b"), train_dataset=MAIN)
    mixed.train(), other.train()
    assert torch.allclose(weights(mixed), weights(other), rtol=0, atol=2e-6)


def test_what_is_logged(tmp_path):
    trainer = trainer_of(tmp_path, {"rho": "auto"}, max_steps=30)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all(math.isfinite(row["aux_loss"]) and row["aux_loss"] != row["loss"] for row in rows)
    assert all(-1 <= row["aux_cosine"] <= 1 and 0 <= row["removed_fraction"] <= 1 for row in rows)
    assert all(row["removed_fraction"] == pytest.approx(row["aux_cosine"] ** 2, abs=1e-6) for row in rows)
    assert "noise_ratio" not in rows[0] and rows[-1]["noise_ratio"] > 0 and 0 < rows[-1]["rho"] <= 0.1
    json.dumps(rows, allow_nan=False)


def test_a_rho_too_large_for_the_noise_is_said_once(tmp_path, caplog):
    trainer = trainer_of(tmp_path, {"rho": 1.0}, max_steps=1)
    with caplog.at_level(logging.WARNING, logger="hf_momentum"):
        for _ in range(2):
            trainer._warn_of_noise({"noise_ratio": 40.0, "rho": 0.05})
        trainer._warned = False
        trainer._warn_of_noise({"noise_ratio": 0.1, "rho": 0.05})
    (record,) = caplog.records
    assert "use rho 0.005, or rho auto" in record.getMessage() and "51 %" in record.getMessage()


def test_a_second_loss_on_the_main_batch(tmp_path):
    """By a function, and by a subclass; the same batches, so the same run."""

    def small_logits(model, inputs):
        return model(**inputs).logits.square().mean()

    class Small(BloopTrainer):
        def compute_aux_loss(self, model, inputs, name, num_items_in_batch=None):
            assert name == "main_batch"
            return small_logits(model, inputs)

    fields = {"gradient_accumulation_steps": 2}
    bloop = {"lam": 50.0}
    one = trainer_of(tmp_path / "a", bloop, None, options={"aux_loss_func": small_logits}, **fields)
    two = trainer_of(tmp_path / "b", bloop, None, kind=Small, **fields)
    one.train(), two.train()
    assert torch.equal(weights(one), weights(two))
    without = trainer_of(
        tmp_path / "c", {"lam": 0.0}, auxiliary=None, options={"aux_loss_func": small_logits}, **fields
    )
    without.train()
    batch = one._prepare_inputs(one.data_collator(MAIN))
    assert small_logits(one.model, batch) < small_logits(without.model, batch)


@pytest.mark.parametrize("kind", ["l2", "distance"])
def test_a_loss_of_the_weights_alone(tmp_path, kind):
    trainer = trainer_of(tmp_path, {"aux_loss": kind, "lam": 0.1}, auxiliary=None)
    start = weights(trainer).double()
    trainer.train()
    losses = [row["aux_loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx({"l2": float(start @ start) / 2, "distance": 0.0}[kind], rel=1e-6)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize(
    "bloop",
    [
        {},
        {"ema_order": "ema_first"},
        {"skip_nonfinite": True},
        {"aux_loss": "distance", "lam": [0.5, 0.1]},
        {"rho": "auto"},
    ],
    ids=["paper", "ema_first", "intact", "distance", "auto"],
)
@pytest.mark.parametrize("optim", ["tam", "adamw_torch"])
def test_a_resumed_run_has_the_same_bits(tmp_path, bloop, optim):
    fields = {"optim": optim, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = trainer_of(tmp_path, bloop, **fields)
    whole.train()
    resumed = trainer_of(tmp_path, bloop, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(resumed))
    averages = [[s["bloop_ema"] for s in trainer.optimizer.optimizer.state.values()] for trainer in (whole, resumed)]
    assert all(torch.equal(one, other) for one, other in zip(*averages, strict=True))


def test_resuming_with_another_lambda_is_said_and_with_other_auxiliaries_refused(tmp_path, caplog):
    fields = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(tmp_path, **fields).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    with caplog.at_level(logging.WARNING, logger="hf_momentum"):
        trainer_of(tmp_path, {"lam": 0.25}, **fields).train(resume_from_checkpoint=checkpoint)
    assert "lam was [0.5] and is [0.25] from here on" in caplog.text
    others = {"poems": AUXILIARY}
    with pytest.raises(InputError, match=r"saved with auxiliaries \['aux'\], this run has \['poems'\]"):
        trainer_of(tmp_path, auxiliary=others, **fields).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(InputError, match="saved with surgery bloop, this run has pcgrad"):
        trainer_of(tmp_path, {"surgery": "pcgrad"}, **fields).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_without_auxiliaries_begins_the_average_anew(tmp_path, caplog):
    fields = {"save_strategy": "steps", "save_steps": 3}
    MomentumTrainer(model_of("even", False, False), arguments(tmp_path, **fields), train_dataset=MAIN).train()
    with caplog.at_level(logging.WARNING, logger="hf_momentum"):
        trainer_of(tmp_path, **fields).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "the average of main gradients begins anew" in caplog.text


# ---- a gradient that is not finite ----------------------------------------------------------------------------------


def poisoned(trainer: BloopTrainer, objective: int, step: int) -> None:
    """At one step an element of the objective's gradient is infinite, though its loss is finite."""
    param = next(trainer.model.parameters())

    def hook(grad):
        if trainer._objective == objective and trainer.state.global_step == step:
            grad = grad.clone()
            grad.view(-1)[0] = math.inf
        return grad

    param.register_hook(hook)


@pytest.mark.parametrize("objective", [0, 1])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_move(tmp_path, objective):
    trainer, seen = trainer_of(tmp_path), []
    poisoned(trainer, objective, step=3)
    trainer._callback.on_step_end = lambda *args, **kwargs: seen.append(weights(trainer).clone())
    with pytest.raises(TrainingStopped, match="is not finite at step 4; the step was not taken"):
        trainer.train()
    assert len(seen) == 3 and torch.equal(weights(trainer), seen[-1])


@pytest.mark.parametrize("objective", [0, 1])
def test_such_a_step_can_be_skipped_with_nothing_moved(tmp_path, objective):
    trainer = trainer_of(tmp_path, {"skip_nonfinite": True})
    poisoned(trainer, objective, step=3)
    seen = []

    def look(*_):
        averages = [state["bloop_ema"].clone() for state in trainer.optimizer.optimizer.state.values()]
        seen.append((weights(trainer).clone(), averages))

    trainer._callback.on_step_end = lambda *args, **kwargs: look()
    trainer.train()
    assert len(seen) == 6
    (before, averages), (after, kept), (later, _) = seen[2:5]
    assert torch.equal(before, after) and all(torch.equal(a, b) for a, b in zip(averages, kept, strict=True))
    assert not torch.equal(after, later), "the next step is taken"


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auxiliary", "bloop", "message"),
    [
        ([], {}, "auxiliary dataset 'aux' is empty"),
        ({"poems": AUXILIARY, "none": []}, {}, "auxiliary dataset 'none' is empty"),
        (AUXILIARY, {"lam": -1.0}, "lam is -1.0"),
        (AUXILIARY, {"lam": [0.1, 0.2]}, "lam has 2 values for 1 auxiliaries"),
        (AUXILIARY, {"rho": 0.0}, "rho is 0.0"),
        (AUXILIARY, {"rho": 2}, "rho is 2.0"),
        (AUXILIARY, {"rho": "often"}, "rho is 'often'"),
        (AUXILIARY, {"surgery": "replay"}, "'replay' mixes examples"),
        (None, {}, "there is no auxiliary objective"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(tmp_path, auxiliary, bloop, message):
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, bloop, auxiliary)


def test_a_stream_is_refused(tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: iter(AUXILIARY))
    with pytest.raises(InputError, match="is a stream"):
        trainer_of(tmp_path, auxiliary=stream)


def test_columns_that_do_not_fit_the_model_are_named(tmp_path):
    rows = datasets.Dataset.from_dict({"question": ["why"] * 8, "answer": ["so"] * 8})
    with pytest.raises(InputError, match="has the columns question, answer, none of which the model takes"):
        trainer_of(tmp_path, auxiliary=rows)


def test_rows_without_labels_are_said_to_have_no_loss(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in AUXILIARY]
    with pytest.raises(InputError, match=r"auxiliary 'aux': no loss can be computed from its batches \(input_ids\)"):
        trainer_of(tmp_path, auxiliary=rows).train()


def test_a_loss_without_gradient_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, options={"aux_loss_func": lambda model, inputs: torch.tensor(1.0)})
    with pytest.raises(InputError, match="its loss has no gradient"):
        trainer.train()


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_a_recipe_with_an_auxiliary_objective(tiny, tmp_path):
    words = tiny.words(
        tmp_path / "out",
        aux_dataset=f"prose={tiny.folder / 'prose.jsonl'}",
        auxiliary=f"prose_too={tiny.folder / 'prose.jsonl'}",
        lam=0.3,
    )
    outcome = train(load_recipe(None, words))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "bloop, lambda 0.3, rho 0.01" in text and "prose_too" in text
    assert {split.role for split in outcome.report.splits} == {"in distribution", "must not forget", "auxiliary"}
    assert any("aux_loss" in row for row in outcome.report.history)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lam": -0.1, "aux_dataset": "prose=PROSE"}, "lam is -0.1"),
        ({"rho": 1.5, "aux_dataset": "prose=PROSE"}, "rho is 1.5"),
        ({"rho": "soon", "aux_dataset": "prose=PROSE"}, "rho is 'soon'"),
        ({"aux_dataset": "PROSE"}, "does not name a split; write NAME=SOURCE@SPLIT"),
        ({"surgery": "cut", "aux_dataset": "prose=PROSE"}, "'cut' is not accepted"),
        ({"surgery": "replay", "aux_dataset": "prose=PROSE", "aux_loss": "l2"}, "give exactly one"),
        ({"aux_loss": "l2", "lam": None, "aux_dataset": "l2=PROSE"}, "two auxiliaries have the same name"),
        ({"aux_dataset": "prose=missing.jsonl"}, "dataset file missing.jsonl does not exist"),
    ],
)
def test_bad_recipes_are_one_sentence(tiny, tmp_path, fields, message):
    fields = {
        k: v.replace("PROSE", str(tiny.folder / "prose.jsonl")) if isinstance(v, str) else v for k, v in fields.items()
    }
    with pytest.raises(InputError, match=message):
        train(load_recipe(None, tiny.words(tmp_path / "out", **fields)))
    assert not (tmp_path / "out").exists()


def test_replay_mixes_examples(tiny, tmp_path):
    words = tiny.words(tmp_path / "out", aux_dataset=f"p={tiny.folder / 'prose.jsonl'}", surgery="replay", lam=1.0)
    outcome = train(load_recipe(None, words))
    assert not any("aux_loss" in row for row in outcome.report.history)


# ---- TRL ------------------------------------------------------------------------------------------------------------


def test_trl_trainers_take_the_mix_in(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl import DPOConfig, SFTConfig

    from hf_momentum.training.bloop_trl import BloopDPOTrainer, BloopSFTTrainer
    from hf_momentum.training.tokenizer import byte_tokenizer

    common = {
        "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "optim": "tam", "learning_rate": 0.01,
        "disable_tqdm": True,
    }  # fmt: skip
    model = str(tiny_llama(tmp_path / "model"))
    text = datasets.Dataset.from_dict({"text": [f"line {i} of the text" for i in range(8)]})
    other = datasets.Dataset.from_dict({"text": [f"{i} {i} {i}" for i in range(5)]})
    sft = BloopSFTTrainer(
        model, args=SFTConfig(output_dir=str(tmp_path / "sft"), **common), train_dataset=text,
        processing_class=byte_tokenizer(128), aux_train_dataset=other, bloop=BloopArguments(lam=0.5),
    )  # fmt: skip
    sft.train()
    with pytest.raises(InputError, match="there is no auxiliary objective"):
        BloopSFTTrainer(
            model, args=SFTConfig(output_dir=str(tmp_path / "none"), **common), train_dataset=text,
            processing_class=byte_tokenizer(128),
        )  # fmt: skip
    rows = [row for row in sft.state.log_history if "loss" in row]
    assert len(rows) == 3 and all("aux_loss" in row and "mean_token_accuracy" in row for row in rows)

    def pairs(prompt: str, count: int) -> datasets.Dataset:
        answers = {kind: [f"{kind} {i}" for i in range(count)] for kind in ("chosen", "rejected")}
        return datasets.Dataset.from_dict({"prompt": [prompt] * count, **answers})

    dpo = BloopDPOTrainer(
        model, args=DPOConfig(output_dir=str(tmp_path / "dpo"), **common),
        train_dataset=pairs("say ", 6), processing_class=byte_tokenizer(128),
        aux_train_dataset=pairs("tell ", 4), bloop=BloopArguments(lam=0.5),
    )  # fmt: skip
    dpo.train()
    rows = [row for row in dpo.state.log_history if "loss" in row]
    assert len(rows) == 3 and all(math.isfinite(row["aux_loss"]) for row in rows)
