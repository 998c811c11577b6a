"""What is frozen stays frozen, what is taught is what was asked for, and the loss is the one that is written down."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerControl, TrainerState

from hf_momentum import InputError
from hf_momentum.diagnosis.groups import chosen_groups, layer_groups
from hf_momentum.evaluation.suite import SuiteSplit
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.training.evaluated import Evaluated
from hf_momentum.training.examples import IGNORED, examples_of
from hf_momentum.training.predictions import Held, Predictions
from hf_momentum.training.repair import Plan
from hf_momentum.training.retrain import (
    Best,
    RepairTrainer,
    Trained,
    gain,
    lessons,
    retrain,
    weights_to_train,
    with_lora,
)
from hf_momentum.training.samples import Settings
from tests import repairable

OTHERS = ("adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor")


pytestmark = pytest.mark.usefixtures("quick_trainers")


def held_digits(evaluated, count=60, start=0):
    split = SuiteSplit("digits", "in distribution", source="digits", task="image_classification")
    rows = repairable.digits(count, start)
    return Held(split, rows, examples_of(evaluated, rows, split))


@pytest.fixture(scope="module")
def _seeing():
    evaluated = repairable.seeing()
    return evaluated, held_digits(evaluated), {name: one.clone() for name, one in evaluated.model.state_dict().items()}


@pytest.fixture
def seeing(_seeing):
    """A model with BatchNorm as it was, and a split."""
    evaluated, held, state = _seeing
    evaluated.model.load_state_dict(state)
    return evaluated, held


@pytest.fixture(scope="module")
def _reading():
    evaluated = repairable.classifier()
    held = repairable.held(evaluated, repairable.reviews(120, seed=1), "sequence_classification")
    return evaluated, held, {name: one.clone() for name, one in evaluated.model.state_dict().items()}


@pytest.fixture
def reading(_reading):
    """A model with Dropout as it was, and a split."""
    evaluated, held, state = _reading
    evaluated.model.load_state_dict(state)
    return evaluated, held


@pytest.fixture(scope="module")
def writing():
    """A language model and a split."""
    evaluated = repairable.language()
    return evaluated, repairable.held(evaluated, repairable.letters(12, seed=1), "causal_lm", block_size=10)


def names_of(evaluated, *groups):
    return weights_to_train(chosen_groups(layer_groups(evaluated.model), groups), evaluated.model)


def training(folder, task="sequence_classification", **fields):
    base = {
        "max_steps": 3,
        "eval_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    words = [f"--{name}={value}" for name, value in {**base, **fields}.items()]
    settings = Settings("m", SuiteSplit("d", "in distribution", task=task), device="cpu")
    return Plan(settings, str(folder), overrides=words).training(str(folder))


def trainer_of(evaluated, held, trained, folder, replay=1.0, distill=0.0, rates=None, **fields):
    task = held.split.task
    evaluated.model.eval()
    taught = lessons(held, held.predictions(evaluated, 64), replay, seed=0)
    return RepairTrainer(trained, taught, distill, rates, args=training(folder, task, **fields))


# ---- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", [*OPTIMIZERS, *OTHERS])
def test_what_is_frozen_does_not_move_under_any_optimizer(optim, seeing, tmp_path):
    """Weights and BatchNorm's statistics, bit for bit; and all that trains does move."""
    evaluated, held = seeing
    before = {name: one.clone() for name, one in evaluated.model.state_dict().items()}
    names = names_of(evaluated, "block.1", "head")
    trained = Trained.of(evaluated.model, names)
    rates = dict.fromkeys(names, 0.5) if optim in ("tam", "critical_adamw", "sgd") else None
    trainer = trainer_of(evaluated, held, trained, tmp_path, rates=rates, optim=optim)
    trainer.train()
    after = evaluated.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {*names, *trained.buffers}
    assert len(trained.buffers) == 9 and all("encoder.stages.1" in name for name in trained.buffers)
    kept = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    assert kept == {id(evaluated.model.get_parameter(name)) for name in names}


def test_a_frozen_dropout_drops_nothing_and_a_trained_one_does(reading, tmp_path):
    evaluated, held = reading
    trained = Trained.of(evaluated.model, names_of(evaluated, "block.1"))
    trainer = trainer_of(evaluated, held, trained, tmp_path, max_steps=1)
    seen = {}

    def note(name):
        def hook(module, _):
            seen[name] = module.training

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in evaluated.model.named_modules()]
    trainer.train()
    for hook in hooks:
        hook.remove()
    assert len([name for name in seen if name.endswith("dropout")]) >= 4
    for name, mode in seen.items():
        assert mode == name.startswith("bert.encoder.layer.1"), name


def test_the_optimizer_holds_what_trains_of_a_lora_model(reading, tmp_path):
    evaluated, held = reading
    adapted = adapted_model(evaluated)
    names = names_of(adapted, "block.1")
    assert names and all("layer.1." in name and ".lora_" in name for name in names)
    before = {name: one.clone() for name, one in adapted.model.state_dict().items()}
    trainer = trainer_of(adapted, held, Trained.of(adapted.model, names), tmp_path)
    trainer.train()
    after = adapted.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(names)


def adapted_model(evaluated):
    """With adapters on every query and value, that do something."""
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    return Evaluated("adapted", get_peft_model(repairable.copied(evaluated.model), config).eval(), evaluated.processor)


def test_groups_without_adapters_cannot_be_trained_by_them(reading):
    with pytest.raises(InputError, match=r"groups head have no adapters; choose groups that have"):
        names_of(adapted_model(reading[0]), "head")


def test_old_and_new_weights_mix_exactly_at_the_ends_and_linearly_between(seeing, tmp_path):
    evaluated, held = seeing
    trained = Trained.of(evaluated.model, names_of(evaluated, "block.1"))
    trainer_of(evaluated, held, trained, tmp_path).train()
    new = trained.now()
    for share, expected in ((0.0, trained.old), (1.0, new)):
        trained.put(trained.mixed(new, share))
        live = {**dict(evaluated.model.named_parameters()), **dict(evaluated.model.named_buffers())}
        assert all(torch.equal(live[name], expected[name]) for name in expected)
    assert any(not torch.equal(new[name], trained.old[name]) for name in new)
    quarter = trained.mixed(new, 0.25)
    for name, old in trained.old.items():
        if old.is_floating_point():
            torch.testing.assert_close(quarter[name], 0.75 * old + 0.25 * new[name])
        else:
            assert torch.equal(quarter[name], new[name]), "a number of batches is no mixture"


def test_the_old_model_is_asked_without_a_copy_of_it(reading, seeing, tmp_path):
    """Also when weights, statistics and adapters have moved on; and the modes of all modules are left as they are."""
    adapted = adapted_model(reading[0])
    cases = [(*reading, "block.1"), (*seeing, "block.1"), (adapted, reading[1], "block.0")]
    for number, (evaluated, held, group) in enumerate(cases):
        given = dict(held.examples.inputs(range(20)))
        evaluated.model.eval()
        with torch.no_grad():
            old = evaluated.model(**given).logits
        trained = Trained.of(evaluated.model, names_of(evaluated, group))
        trainer_of(evaluated, held, trained, tmp_path, learning_rate=0.05).train()
        trained.freeze_modes()
        modes = [module.training for module in evaluated.model.modules()]
        assert any(modes) or number == 2, "an adapter without dropout has nothing to train in another mode"
        assert torch.equal(trained.old_logits(given), old)
        assert modes == [module.training for module in evaluated.model.modules()]
        evaluated.model.eval()
        with torch.no_grad():
            assert not torch.equal(evaluated.model(**given).logits, old)


# ---- fresh adapters --------------------------------------------------------------------------------------------------


def test_fresh_adapters_stand_on_the_chosen_layers_alone(reading):
    evaluated, _ = reading
    chosen = chosen_groups(layer_groups(evaluated.model), ["block.1", "head"])
    made = [
        with_lora(Evaluated("m", repairable.copied(evaluated.model), None), chosen, 3, seed).model for seed in (0, 0, 1)
    ]
    inside = {name for name, module in evaluated.model.named_modules() if isinstance(module, nn.Linear)}
    wanted = {name for name in inside if name.startswith("bert.encoder.layer.1.") or name == "classifier"}
    config = made[0].peft_config["default"]
    adapters = {name: one for name, one in made[0].named_parameters() if ".lora_" in name}
    found = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapters}
    assert found == wanted and len(found) == 7 and config.r == 3
    first, again, other = ({n: p for n, p in one.named_parameters() if ".lora_A" in n} for one in made)
    assert all(torch.equal(first[name], again[name]) for name in first), "an interrupted repair begins with the same"
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_names_with_the_same_ending_are_not_adapted_too():
    model = nn.Module()
    model.layers, model.fc = nn.ModuleList([nn.Sequential(), nn.Sequential()]), nn.Linear(2, 2)
    for layer in model.layers:
        layer.fc = nn.Linear(2, 2)
    chosen = chosen_groups(layer_groups(model), ["fc"])
    adapted = with_lora(Evaluated("m", model, None), chosen, 2).model
    assert [name for name, _ in adapted.named_parameters() if ".lora_A" in name] == [
        "base_model.model.fc.lora_A.default.weight"
    ]


def test_adapters_need_linear_layers_and_a_model_without_any(reading):
    evaluated, _ = reading
    groups = layer_groups(evaluated.model)
    with pytest.raises(InputError, match=r"groups embeddings have no linear layer for LoRA to adapt"):
        with_lora(evaluated, chosen_groups(groups, ["embeddings"]), 2)
    adapted = adapted_model(evaluated)
    with pytest.raises(InputError, match=r"lora_r is for a model without adapters"):
        with_lora(adapted, layer_groups(adapted.model), 2)


# ---- lessons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("replay", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (100.0, None)])
def test_each_error_is_taught_with_as_many_right_examples_as_asked_for(replay, expected, reading):
    evaluated, held = reading
    before = held.predictions(evaluated, 64)
    right = np.concatenate(before.right)
    taught = lessons(held, before, replay, seed=0)
    wrong = set(np.flatnonzero(~right).tolist())
    known = [index for index in taught.indices if index not in wrong]
    assert 10 < len(wrong) < 60 and wrong <= set(taught.indices)
    assert len(known) == (int(right.sum()) if expected is None else round(expected * len(wrong)))
    assert len(set(taught.indices)) == len(taught), "none twice"
    assert all(bool(taught.right[index]) == bool(right[index]) for index in taught.indices)


def test_the_seed_draws_the_replay(reading):
    evaluated, held = reading
    before = held.predictions(evaluated, 64)
    first, again, other = (lessons(held, before, 0.5, seed).indices for seed in (0, 0, 1))
    assert first == again and set(first) != set(other)


def test_of_a_language_model_wrong_tokens_count_with_as_many_right_ones(writing):
    evaluated, held = writing
    # An untrained model has hardly anything right, so that what is right is made up.
    generator = np.random.default_rng(0)
    sizes = [len(one) for one in held.predictions(evaluated, 8).right]
    before = Predictions([generator.random(size) < 0.7 for size in sizes], 1.0)
    taught = lessons(held, before, 0.5, seed=0)
    wrong = right = 0
    for index, mask in taught.masks.items():
        start = len(mask) - len(before.right[index])
        assert len(mask) == held.examples.sizes[index] and not mask[:start].any(), "context is not predicted"
        one = torch.from_numpy(before.right[index])
        assert mask[start:][~one].all(), "every wrong token counts"
        wrong, right = wrong + int((~one).sum()), right + int((mask[start:] & one).sum())
    assert any(held.examples.sizes[index] > len(before.right[index]) for index in taught.masks)
    assert wrong == sum(int((~one).sum()) for one in before.right) > 50
    assert right == pytest.approx(0.5 * wrong, rel=0.25)
    none = lessons(held, before, 0.0, seed=0)
    assert sum(int(mask.sum()) for mask in none.masks.values()) == wrong


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_of_tokens_is_the_mean_over_those_that_count(writing, tmp_path):
    evaluated, held = writing
    generator = np.random.default_rng(0)
    before = Predictions([generator.random(len(one)) < 0.5 for one in held.predictions(evaluated, 8).right], 1.0)
    taught = lessons(held, before, 0.5, seed=0)
    trained = Trained.of(evaluated.model, names_of(evaluated, "block.1"))
    trainer = RepairTrainer(trained, taught, args=training(tmp_path, "causal_lm"))
    batch = taught.batch([taught[place] for place in range(7)])
    found = trainer.compute_loss(evaluated.model, batch)
    total, count = 0.0, 0
    for place in range(7):
        index = taught.indices[place]
        with torch.no_grad():
            logs = evaluated.model(**held.examples.inputs([index])).logits[0].log_softmax(-1)
        targets = held.examples.targets([index])[0]
        for position, token in enumerate(targets.tolist()):
            if token != IGNORED and taught.masks[index][position]:
                total, count = total - float(logs[position, token]), count + 1
    assert count < sum(int((held.examples.targets([index]) != IGNORED).sum()) for index in taught.indices[:7])
    assert found.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("which", ["examples", "tokens"])
def test_the_pull_is_the_divergence_from_the_old_model_over_what_it_had_right(which, reading, writing, tmp_path):
    evaluated, held = reading if which == "examples" else writing
    given = held.predictions(evaluated, 64)
    if which == "tokens":
        generator = np.random.default_rng(0)
        given = Predictions([generator.random(len(one)) < 0.5 for one in given.right], 1.0)
    taught = lessons(held, given, 1.0, seed=0)
    names = names_of(evaluated, "head")
    trained = Trained.of(evaluated.model, names)
    trainers = [
        RepairTrainer(trained, taught, weight, args=training(tmp_path, held.split.task)) for weight in (0.0, 2.0)
    ]
    batch = taught.batch([taught[place] for place in range(len(taught) - 9, len(taught))])
    assert bool(batch["was_right"].any())
    plain, pulled = (trainer.compute_loss(evaluated.model, batch).item() for trainer in trainers)
    assert pulled == pytest.approx(plain, abs=1e-6), "where it has not moved there is no pull"
    inputs = {name: one for name, one in batch.items() if name not in ("targets", "counted", "was_right")}
    with torch.no_grad():
        old = evaluated.model(**inputs).logits.double().log_softmax(-1)
        evaluated.model.get_parameter(names[0]).mul_(1.3)
        new = evaluated.model(**inputs).logits.double().log_softmax(-1)
    divergences = (old.exp() * (old - new)).sum(-1)[batch["was_right"]]
    plain, pulled = (trainer.compute_loss(evaluated.model, batch).item() for trainer in trainers)
    assert divergences.mean() > 1e-4
    assert pulled - plain == pytest.approx(2 * divergences.mean().item(), rel=1e-3)
    trained.put(trained.old)


def test_an_answer_that_was_right_is_pulled_at_all_its_tokens():
    evaluated = repairable.language()
    rows = [{"prompt": "a" * size, "reference": "bb"} for size in (3, 5, 4, 7)]
    held = repairable.held(evaluated, rows, "generation")
    before = Predictions([np.array([one]) for one in (True, False, True, False)], 1.0)
    batch = lessons(held, before, 1.0, seed=0).batch([{"index": index} for index in (1, 0, 3, 2)])
    assert torch.equal(batch["counted"], batch["targets"] != IGNORED)
    assert batch["was_right"].sum(1).tolist() == [0, 3, 0, 3], "two letters and the end"


def test_batches_in_parts_are_the_batch(reading, tmp_path):
    evaluated, held = reading
    ends = []
    for fields in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        trained = Trained.of(evaluated.model, names_of(evaluated, "head"))
        trainer_of(evaluated, held, trained, tmp_path, optim="sgd", learning_rate=0.1, **fields).train()
        ends.append(trained.now())
        trained.put(trained.old)
    for name, one in ends[0].items():
        torch.testing.assert_close(ends[1][name], one, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(trained.old[name], one, rtol=1e-3)


def test_each_weight_has_its_own_factor_of_the_learning_rate(reading, tmp_path):
    """With plain SGD a factor is one of the step."""
    evaluated, held = reading
    names = names_of(evaluated, "block.1", "head")
    factors = {name: (0.0, 0.25, 1.0)[number % 3] for number, name in enumerate(names)}
    given = {"optim": "sgd", "max_steps": 1, "weight_decay": 0.0, "learning_rate": 0.5, "max_grad_norm": 0}
    steps = []
    for rates in (None, factors):
        trained = Trained.of(evaluated.model, names)
        trainer = trainer_of(evaluated, held, trained, tmp_path, rates=rates, **given)
        trainer.train()
        steps.append({name: one - trained.old[name] for name, one in trained.now().items() if name in names})
        trained.put(trained.old)
    for name, factor in factors.items():
        torch.testing.assert_close(steps[1][name], factor * steps[0][name], rtol=1e-3, atol=1e-6)
    assert max(float(one.abs().max()) for one in steps[0].values()) > 1e-3


# ---- the best on validation ------------------------------------------------------------------------------------------


def predicted(right: int, loss: float) -> Predictions:
    return Predictions([np.array([place < right for place in range(10)])], loss)


# Measurements after steps 2, 4, ...: right ones of 10, and the loss.
COURSE = [(5, 0.9), (7, 0.8), (7, 0.7), (6, 0.1), (7, 0.75), (7, 0.7), (9, 0.6)]


class Course:
    """A training of which validation is known before: at step n the weight is n."""

    def __init__(self, folder=None, patience=0):
        self.model = nn.Sequential(nn.Linear(1, 1, bias=False))
        self.trained = Trained.of(self.model, ["0.weight"])
        self.best = Best(self.trained, self.measure, predicted(5, 1.0), 2, patience, folder)
        self.args = training("out")
        self.step = 0

    def measure(self):
        return predicted(*COURSE[self.step // 2 - 1])

    def run(self, first=1, last=14, saves=()):
        for self.step in range(first, last + 1):
            with torch.no_grad():
                self.model[0].weight.fill_(self.step)
            state, control = TrainerState(global_step=self.step, max_steps=14), TrainerControl()
            self.best.on_step_end(self.args, state, control)
            if self.step in saves:
                self.best.on_save(self.args, state, control)
            if control.should_training_stop:
                break
        return self

    @property
    def kept(self):
        return self.best.tensors["0.weight"].item()


def test_the_best_are_those_with_the_most_gained_and_of_equal_ones_the_least_loss():
    found = [Course().run(last=last) for last in (2, 4, 6, 12, 14)]
    assert [course.kept for course in found] == [2, 4, 6, 6, 14]
    assert [entry["step"] for entry in found[-1].best.log] == [2, 4, 6, 8, 10, 12, 14]
    assert found[-1].best.log[1] == {"step": 4, "validation_net": 2, "eval_loss": 0.8, "validation_accuracy": 0.7}


@pytest.mark.parametrize(("patience", "steps", "kept"), [(0, 14, 14), (1, 8, 6), (3, 12, 6), (4, 14, 14)])
def test_training_ends_when_patience_does(patience, steps, kept):
    course = Course(patience=patience).run()
    assert (course.step, course.kept, course.best.ended) == (steps, kept, patience in (1, 3))


@pytest.mark.parametrize("checkpoint", [3, 4, 6, 9])
@pytest.mark.parametrize("died", [10, 14])
def test_a_run_that_died_goes_on_with_what_was_best_at_its_checkpoint(checkpoint, died, tmp_path):
    whole = Course(patience=4).run()
    Course(tmp_path, patience=4).run(last=died, saves=(checkpoint,))
    resumed = Course(tmp_path, patience=4)
    resumed.best.continue_from(checkpoint)
    straight = Course(patience=4).run(last=checkpoint)
    assert resumed.kept == straight.kept
    assert (resumed.best.waited, resumed.best.log) == (straight.best.waited, straight.best.log)
    resumed.run(first=checkpoint + 1)
    assert (resumed.kept, resumed.best.log, resumed.step) == (whole.kept, whole.best.log, whole.step)


def test_checkpoints_leave_one_file_of_weights(tmp_path):
    Course(tmp_path).run(saves=range(15))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-14.safetensors", "best.json"]


# ---- all of it -------------------------------------------------------------------------------------------------------


def test_the_best_weights_are_mixed_as_validation_likes_best(reading, tmp_path):
    evaluated, held = reading
    validation = repairable.held(evaluated, repairable.reviews(60, seed=2), "sequence_classification", "validation")
    before = validation.predictions(evaluated, 64)
    old = {name: one.clone() for name, one in evaluated.model.state_dict().items()}
    trained = Trained.of(evaluated.model, names_of(evaluated, "head"))
    taught = lessons(held, held.predictions(evaluated, 64), 1.0, seed=0)
    arguments = training(tmp_path, optim="critical_sgd", learning_rate=0.3, max_steps=8, eval_steps=2)
    found = retrain(evaluated, trained, taught, validation, before, arguments, shares=(0.25, 0.5))
    assert [one.share for one in found.mixtures] == [0.0, 0.25, 0.5] and found.steps == 8
    assert found.mixtures[0].flips.fixed == found.mixtures[0].flips.broken == 0
    now = gain(before, validation.predictions(evaluated, 64))
    (taken,) = [one for one in found.mixtures if one.share == found.share]
    assert now == taken.flips and now.net == max(one.flips.net for one in found.mixtures) > 0
    assert [entry["step"] for entry in found.history if "validation_net" in entry] == [2, 4, 6, 8]
    assert not evaluated.model.training
    live = evaluated.model.state_dict()
    for name in trained.names:
        torch.testing.assert_close(live[name], old[name] + found.share * (found.new[name] - old[name]))


def test_a_gain_of_nothing_leaves_the_old_weights(reading, tmp_path):
    """Training at a rate of 0 mends nothing; then the old weights are the best mixture."""
    evaluated, held = reading
    before = held.predictions(evaluated, 64)
    trained = Trained.of(evaluated.model, names_of(evaluated, "head"))
    arguments = training(tmp_path, optim="sgd", learning_rate=1e-12, max_steps=2)
    found = retrain(evaluated, trained, lessons(held, before, 1.0, 0), held, before, arguments)
    assert found.share == 0 and all(one.flips.net == 0 for one in found.mixtures)
    assert all(torch.equal(one, trained.old[name]) for name, one in trained.now().items())
