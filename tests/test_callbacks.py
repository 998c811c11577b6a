"""An optimizer's inner quantities reach the log once per logging step, and a momentum schedule survives a resume."""

import itertools
import json

import pytest
import torch
from accelerate import DistributedType
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_momentum import AHBSGD, InputError, MomentumTrainer, MomentumTrainingArguments
from hf_momentum.errors import TrainingStopped
from hf_momentum.optim.momentum_laws import critical
from hf_momentum.training import DynamicsCallback, MomentumScheduleCallback, job, load_recipe
from tests.test_names import Quadratic, data
from tests.test_tam import HostReads
from tests.test_training import final_weights


def run(words) -> job.Outcome:
    return job.train(load_recipe(None, words))


def history(outcome: job.Outcome) -> list[dict]:
    return [entry for entry in outcome.report.history if "loss" in entry]


# ---- dynamics -------------------------------------------------------------------------------------------------------


def small_trainer(tmp_path, trainer=Trainer, arguments=TrainingArguments, **kwargs):
    common = {"max_steps": 6, "learning_rate": 0.05, "per_device_train_batch_size": 4, "logging_steps": 2}
    common |= {"save_strategy": "no", "disable_tqdm": True, "report_to": "none", "use_cpu": True}
    torch.manual_seed(0)
    return trainer(Quadratic(), arguments(output_dir=str(tmp_path), **{**common, **kwargs}), train_dataset=data())


def test_a_plain_trainer_logs_the_dynamics_of_our_optimizers(tmp_path):
    trainer = small_trainer(tmp_path, optim="tam")
    DynamicsCallback().attach(trainer)
    seen = []
    trainer.add_callback(type("Reporter", (TrainerSpy,), {"seen": seen})())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all({"cosine", "damping", "effective_lr"} <= set(entry) for entry in logged)
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    reported = [logs for logs in seen if "loss" in logs]
    assert [logs["damping"] for logs in reported] == [entry["damping"] for entry in logged], "reporters see them too"


def test_the_effective_rate_is_that_of_the_step_whose_rate_is_logged(tmp_path):
    """At its log the scheduler has already set the next step's rate."""
    trainer = small_trainer(tmp_path, optim="tam", optim_args="fixed_damping=0.5", logging_steps=1)
    DynamicsCallback().attach(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len({entry["learning_rate"] for entry in logged}) == 6, "the schedule decays"
    for entry in logged:
        assert entry["effective_lr"] == pytest.approx(entry["learning_rate"] * 0.5 / (1 - 0.9), rel=1e-6)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0], "looking changes nothing"


class TrainerSpy(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_the_update_norm_is_that_of_the_weights_that_moved(tmp_path):
    trainer = small_trainer(tmp_path, optim="sgd", logging_steps=1, max_steps=3)
    DynamicsCallback(update_norm=True).attach(trainer)
    weights = [torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]).clone()]

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone())

    trainer.add_callback(Keep())
    trainer.train()
    logged = [entry["update_norm"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [(b - a).norm().item() for a, b in itertools.pairwise(weights)]
    assert logged == pytest.approx(expected, rel=1e-5)


def test_per_layer_quantities_carry_the_names_of_the_parameters(tmp_path):
    trainer = small_trainer(
        tmp_path, MomentumTrainer, MomentumTrainingArguments, optim="tam", optim_args="granularity=tensor",
        log_dynamics_per_layer=True,
    )  # fmt: skip
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    names = [name for name, _ in trainer.model.named_parameters()]
    assert {f"smoothed_cosine/{name}" for name in names} | {f"tensor_cosine/{name}" for name in names} <= set(last)


def test_the_values_are_read_back_once_per_logging_step_and_not_in_between(tmp_path):
    trainer = small_trainer(
        tmp_path, MomentumTrainer, MomentumTrainingArguments, optim="ahb_sgd", log_dynamics_per_layer=True
    )
    trainer.create_optimizer()
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    trainer.optimizer.step()
    callback = DynamicsCallback(per_layer=True)
    trainer.state.log_history.append({})
    kwargs = {"optimizer": trainer.optimizer, "model": trainer.model}
    with HostReads() as reads:
        callback.on_log(trainer.args, trainer.state, trainer.control, logs={"eval_loss": 1.0}, **kwargs)
        assert reads.count == 0, "an evaluation's log reads nothing"
        callback.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0}, **kwargs)
    assert reads.count == 0, "one vector is copied as a whole, no value by itself"


# ---- AHB and clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_momentum_trainer_lets_ahb_see_gradients_before_they_are_clipped(accumulation, tmp_path):
    """With lr 0 the weights stay, so the differences are those of the batches alone, clipped or not."""

    def differences(trainer_cls, arguments_cls, max_grad_norm):
        trainer = small_trainer(
            tmp_path, trainer_cls, arguments_cls, optim="ahb_sgd", learning_rate=0.0, max_grad_norm=max_grad_norm,
            gradient_accumulation_steps=accumulation, per_device_train_batch_size=2,
        )  # fmt: skip
        trainer.train()
        base = trainer.optimizer.optimizer
        assert type(base) is AHBSGD
        return base.param_groups[0]["squared_difference"].sum().item()

    unclipped = differences(Trainer, TrainingArguments, 0.0)
    assert unclipped > 0
    ours = (MomentumTrainer, MomentumTrainingArguments)
    assert differences(*ours, 1e-3) == pytest.approx(unclipped, rel=1e-6)
    assert differences(Trainer, TrainingArguments, 1e-3) < 1e-3 * unclipped


@pytest.mark.parametrize("optim", ["tam", "vradam", "ahb_sgd", "critical_adamw"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_momentum_trainer_clips_inside_the_step_with_the_same_weights_and_logs(optim, accumulation, tmp_path):
    found = []
    for inside in (True, False):
        cls = MomentumTrainer if inside else type("Outside", (MomentumTrainer,), {"clips_inside": False})
        trainer = small_trainer(
            tmp_path, cls, MomentumTrainingArguments, optim=optim, learning_rate=0.01, max_grad_norm=0.05,
            gradient_accumulation_steps=accumulation, per_device_train_batch_size=2, logging_steps=1,
        )  # fmt: skip
        assert trainer.train().global_step > 2
        assert (trainer.optimizer.optimizer.grad_norm is not None) == inside
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        found.append((torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), norms))
    (weights, norms), (expected, expected_norms) = found
    assert ((weights - expected).norm() / expected.norm()).item() < 1e-6
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert min(norms) > 0.05, "every step must be clipped"


def test_weights_that_the_optimizer_does_not_have_keep_the_clipping_outside(tmp_path):
    trainer = small_trainer(tmp_path, MomentumTrainer, MomentumTrainingArguments, optim="tam", max_grad_norm=0.05)
    trainer.create_optimizer()
    assert trainer.clips_inside
    held = trainer.optimizer.param_groups[0]["params"]
    held.pop()
    assert not trainer.clips_inside


# ---- the momentum schedule ------------------------------------------------------------------------------------------


def scheduled(tiny, folder, **fields):
    common = {"optim": "tam", "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "momentum_schedule": "hybrid"}
    return run(tiny.words(folder, **{**common, **fields}))


def test_a_schedule_follows_the_learning_rate_in_a_trainer(tiny, tmp_path):
    outcome = scheduled(tiny, tmp_path / "out", momentum_schedule="critical", lr_scheduler_type="linear")
    for entry in history(outcome):
        assert entry["scheduled_momentum"] == pytest.approx(critical(entry["learning_rate"]), abs=1e-9)
    assert len({entry["scheduled_momentum"] for entry in history(outcome)}) == 8
    assert (outcome.folder / "plots" / "dynamics.png").is_file()


@pytest.mark.parametrize("optim", [pytest.param("adamw_torch", marks=pytest.mark.slow), "sgd", "tam", "adatamw"])
def test_a_schedule_attaches_to_any_optimizer_and_resumes_bit_for_bit(optim, tiny, tmp_path):
    fields = {"optim": optim, "learning_rate": 1e-3, "momentum_schedule_args": "switch=fraction,fraction=0.7"}
    if optim == "sgd":
        fields["momentum_schedule_args"] += ",curvature=measured"
    straight = scheduled(tiny, tmp_path / "straight", **fields)
    checkpoint = tmp_path / "straight" / "checkpoint-4"
    resumed = scheduled(tiny, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **fields)
    assert history(straight)[-1]["scheduled_momentum"] == 0.9 != history(straight)[0]["scheduled_momentum"]
    ours, theirs = final_weights(resumed.folder), final_weights(straight.folder)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_latched_switch_stays_latched_over_a_resume(tiny, tmp_path):
    fields = {"momentum_schedule_args": "switch=metric,metric=eval_accuracy,threshold=0.0", "eval_strategy": "steps"}
    fields |= {"eval_steps": 3, "validation_dataset": tiny.folder / "code.jsonl"}
    straight = scheduled(tiny, tmp_path / "straight", **fields)
    momenta = [entry["scheduled_momentum"] for entry in history(straight)]
    assert momenta[:3] != [0.9] * 3 and momenta[3:] == [0.9] * 5, "an accuracy of 0 is reached at the first evaluation"
    checkpoint = tmp_path / "straight" / "checkpoint-4"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert saved["momentum_schedule"] == {"steps": 4, "switched": True, "curvature": None}
    never = fields["momentum_schedule_args"].replace("threshold=0.0", "threshold=2.0")
    resumed = scheduled(
        tiny, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **{**fields, "momentum_schedule_args": never}
    )
    assert [entry["scheduled_momentum"] for entry in history(resumed)][-4:] == [0.9] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optim": "adagrad"}, "Adagrad has neither momentum nor betas to schedule"),
        ({"optim": "critical_sgd"}, "CriticalSGD has neither momentum nor betas to schedule"),
        ({"momentum_schedule": "cosine"}, "law must be one of 'critical'"),
        ({"momentum_schedule_args": "swich=fraction"}, r"no argument 'swich' \(did you mean 'switch'"),
        ({"momentum_schedule_args": "switch=metric"}, "needs a threshold"),
        ({"momentum_schedule_args": "final=1.0"}, r"final must be a number in \[0, 1\)"),
        ({"momentum_schedule": None, "momentum_schedule_args": "final=0.5"}, "but no momentum_schedule"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_anything_is_written(fields, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        scheduled(tiny, tmp_path / "never", **fields)
    assert not (tmp_path / "never").exists()


def test_a_metric_that_is_not_evaluated_is_named(tiny, tmp_path):
    fields = {"momentum_schedule_args": "switch=metric,metric=eval_f1,threshold=0.5", "eval_strategy": "steps"}
    with pytest.raises(InputError, match=r"no metric 'eval_f1'; evaluated: eval_loss"):
        scheduled(tiny, tmp_path / "out", eval_steps=2, validation_dataset=tiny.folder / "code.jsonl", **fields)


def test_the_callback_works_in_a_plain_trainer(tmp_path):
    trainer = small_trainer(tmp_path, optim="sgd", lr_scheduler_type="constant")
    trainer.add_callback(MomentumScheduleCallback("critical"))
    trainer.train()
    assert trainer.optimizer.param_groups[0]["momentum"] == critical(0.05)
    assert json.dumps(trainer.state.log_history)


# ---- processes that would train apart -------------------------------------------------------------------------------


def test_an_unwrapped_model_under_several_processes_stops_before_its_first_step(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, MomentumTrainer, MomentumTrainingArguments, optim="tam")
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
    batch = default_data_collator(data())
    trainer.training_step(trainer.model, batch)
    several = property(lambda self: DistributedType.MULTI_CPU)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", several)
    with pytest.raises(TrainingStopped, match=r"not wrapped for them \(Quadratic\): each would train apart"):
        trainer.training_step(trainer.model, batch)


def test_the_card_of_a_run_is_what_is_written(tmp_path):
    trainer = small_trainer(tmp_path, MomentumTrainer, MomentumTrainingArguments, optim="tam")
    trainer.card = "# our card"
    trainer.create_model_card(model_name="ignored")
    assert (tmp_path / "README.md").read_text() == "# our card"
