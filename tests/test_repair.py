"""`hf-momentum repair` from its command line: what it keeps, what it takes back, and that the third split decides."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_momentum import InputError
from hf_momentum.cli import main
from hf_momentum.diagnosis.baselines_report import BaselinesReport
from hf_momentum.diagnosis.leaks import find_leaks
from hf_momentum.diagnosis.repair_report import RepairReport
from hf_momentum.evaluation.document import Document
from hf_momentum.evaluation.suite import SuiteSplit
from hf_momentum.training import repair
from hf_momentum.training.evaluated import Evaluated, load_evaluated
from hf_momentum.training.samples import Settings
from tests import repairable
from tests.conftest import write_rows

FAST = [
    "--device=cpu",
    "--batch_size=64",
    "--disable_tqdm=true",
    "--max_steps=8",
    "--eval_steps=4",
    "--save_steps=4",
    "--logging_steps=4",
]
HEAD = ["--layers=head", "--optim=critical_sgd", "--learning_rate=0.2"]


pytestmark = pytest.mark.usefixtures("quick_trainers")


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Reports without their pictures, which take longer than the repairs; one test has them drawn."""

    def write(document, folder):
        (folder / "report.html").write_text(document.to_markdown())
        return folder / "report.html"

    if "drawn" not in request.keywords:
        monkeypatch.setattr(Document, "write", write)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A classifier of texts with a fault in its head, and three splits."""
    folder = tmp_path_factory.mktemp("toy")
    repairable.saved(repairable.classifier(), folder / "model")
    rows = repairable.reviews(340, seed=1)
    repairable.written(folder, train=rows[:140], validation=rows[140:200], test=rows[200:300], whole=rows)
    return folder


def words(toy, out, *more, fast=FAST):
    given = [f"--model={toy / 'model'}", f"--data={toy / 'train.jsonl'}"]
    given += [f"--validation={toy / 'validation.jsonl'}", f"--test={toy / 'test.jsonl'}"]
    return ["repair", *given, f"--output_dir={out}", *fast, *more]


def bytes_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def right_by_hand(folder, rows):
    """One text at a time."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), repairable.word_tokenizer()
    with torch.no_grad():
        logits = [
            model(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)).logits for row in rows
        ]
    return [int(one.argmax()) == row["label"] for one, row in zip(logits, rows, strict=True)]


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def flips_of(old, new):
    counts = {"fixed": 0, "broken": 0, "right": 0, "wrong": 0}
    for first, second in zip(old, new, strict=True):
        counts[{(0, 1): "fixed", (1, 0): "broken", (1, 1): "right", (0, 0): "wrong"}[first, second]] += 1
    return counts


def mcnemar_by_hand(fixed, broken):
    count, fewer = fixed + broken, min(fixed, broken)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count)


# ---- kept, and taken back --------------------------------------------------------------------------------------------


@pytest.mark.drawn
def test_an_accepted_repair_is_a_model_that_predicts_what_the_report_says(toy, tmp_path, capsys):
    before = bytes_of(toy / "model")
    assert main(words(toy, tmp_path, *HEAD)) == 0
    assert bytes_of(toy / "model") == before, "the original is as it was"
    report = repairable.record(tmp_path)
    assert report["found"]["outcome"] == "accepted" and report["chosen"] == ["head"]
    for name in ("test", "validation"):
        rows = read(toy / f"{name}.jsonl")
        counted = flips_of(right_by_hand(toy / "model", rows), right_by_hand(tmp_path / "model", rows))
        said = report["verification" if name == "test" else "validation"]
        assert said["flips"] == counted and said["examples"] == len(rows)
        assert said["p_value"] == pytest.approx(mcnemar_by_hand(counted["fixed"], counted["broken"]))
    assert report["verification"]["flips"]["fixed"] > 10
    old, new = (load_file(place / "model" / "model.safetensors") for place in (toy, tmp_path))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert report["trained_parameters"] == sum(old[name].numel() for name in moved)
    printed = capsys.readouterr().out
    assert f"Repaired model: {tmp_path / 'model'}" in printed
    assert (
        RepairReport.from_json((tmp_path / "report.json").read_text()).to_json()
        == (tmp_path / "report.json").read_text()
    )
    text = (tmp_path / "report.md").read_text()
    assert text.count("Fixed: wrong before, right after.") == 1 and "hf-momentum repair --model" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        *("repair.json", "model", "plots", "report.html", "report.md", "report.json")
    }


def test_what_does_not_gain_is_rolled_back(toy, tmp_path, capsys):
    """By labels of the test split that are all wrong: there the mended model is worse."""
    rows = [{**row, "label": 1 - row["label"]} for row in read(toy / "test.jsonl")]
    test = write_rows(tmp_path / "test.jsonl", rows)
    before = bytes_of(toy / "model")
    assert main([*words(toy, tmp_path / "out", *HEAD), f"--test={test}"]) == repair.ROLLED_BACK == 3
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "training").exists()
    assert bytes_of(toy / "model") == before
    report = repairable.record(tmp_path / "out")
    assert report["found"]["outcome"] == "rolled back" and report["verification"]["flips"]["broken"] > 10
    assert report["validation"]["flips"]["fixed"] > 5, "validation, which knows nothing of it, gained"
    assert "The model stays as it was." in capsys.readouterr().out


def test_where_nothing_is_gained_on_validation_the_old_weights_are_kept(toy, tmp_path):
    assert main(words(toy, tmp_path, "--layers=head", "--optim=sgd", "--learning_rate=1e-12")) == 3
    report = repairable.record(tmp_path)
    assert report["share"] == 0 and report["decision"]["reasons"][0] == repair.UNCHANGED
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_right_has_nothing_to_repair(toy, tmp_path, capsys):
    rows = read(toy / "train.jsonl")
    known = [row for row, right in zip(rows, right_by_hand(toy / "model", rows), strict=True) if right]
    data = write_rows(tmp_path / "known.jsonl", known)
    assert main([*words(toy, tmp_path / "out", *HEAD), f"--data={data}", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "The model has every prediction of the data right." in " ".join(answer["summary"])
    assert answer["exit"] == 0 and answer["output_dir"] == str(tmp_path / "out")
    assert repairable.record(tmp_path / "out")["found"]["outcome"] == "nothing to repair"
    assert not (tmp_path / "out" / "model").exists()


def test_a_significant_loss_on_another_split_rolls_back(toy, tmp_path):
    """What the repair gains on the test split, it loses where the same words mean the opposite."""
    rows = read(toy / "whole.jsonl")[300:]
    write_rows(tmp_path / "news.jsonl", [{**row, "label": 1 - row["label"]} for row in rows])
    write_rows(tmp_path / "more.jsonl", rows)
    for name, status in (("news", 3), ("more", 0)):
        suite = tmp_path / f"{name}.yaml"
        suite.write_text(
            "task: sequence_classification\nsplits:\n"
            f"  test: {{role: must_not_forget, source: {tmp_path}/{name}.jsonl}}\n"
            f"  more: {{role: in_distribution, source: {tmp_path}/more.jsonl}}\n"
        )
        assert main(words(toy, tmp_path / name, *HEAD, f"--suite={suite}")) == status
        report = repairable.record(tmp_path / name)
        other, same = report["others"]
        assert same["flips"]["fixed"] > same["flips"]["broken"]
        assert (other["name"], other["role"]) == ("test", "must not forget")
        assert report["verification"]["role"] == "verification" and report["verification"]["p_value"] < 0.05
        assert (other["flips"]["broken"] > other["flips"]["fixed"]) == (status == 3)
        said = " ".join(report["decision"]["reasons"])
        assert ("a significant loss" in said) == (status == 3)


# ---- what it trains --------------------------------------------------------------------------------------------------


@pytest.fixture
def one_model(monkeypatch):
    """The diagnosis leaves out the model with random weights."""
    plain = repair.settings_of
    monkeypatch.setattr(repair, "settings_of", lambda given: plain({**given, "no_random": True}))


@pytest.mark.parametrize("rule", [["--top=1"], ["--budget=0.5", "--score=raw"]], ids=lambda one: one[0])
def test_the_rule_of_the_diagnosis_says_what_trains(rule, toy, tmp_path, one_model):
    status = main(words(toy, tmp_path, "--learning_rate=0.01", "--max_steps=4", *rule))
    report, diagnosis = repairable.record(tmp_path), repairable.record(tmp_path / "diagnosis")
    assert status == (0 if report["decision"]["accepted"] else 3)
    assert report["chosen"] == diagnosis["chosen"] != []
    sizes = {group["name"]: group["parameters"] for group in report["groups"]}
    assert report["trained_parameters"] == sum(sizes[name] for name in report["chosen"])
    if rule == ["--top=1"]:
        assert len(report["chosen"]) == 1
    if "--budget=0.5" in rule:
        assert report["trained_parameters"] <= 0.5 * report["all_parameters"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--optim=tam", "--learning_rate=0.05"], "tam, learning rate 0.05"),
        (
            ["--optim=sgd", "--optim_args=momentum=0.9", "--learning_rate=0.05", "--momentum_schedule=hybrid"],
            "momentum schedule hybrid",
        ),
        (["--optim=critical_sgd", "--learning_rate=0.2", "--distill=0.5"], "weight 0.5"),
    ],
    ids=["tam", "schedule", "distill"],
)
def test_any_optimizer_schedule_and_pull(more, said, toy, tmp_path):
    assert main(words(toy, tmp_path, "--layers=head", *more)) == 0
    report = repairable.record(tmp_path)
    assert said in report["optimizer"] + " ".join(report["notes"])


def test_the_shares_that_are_tried_are_those_asked_for(toy, tmp_path):
    main(words(toy, tmp_path, *HEAD, "--shares=0.1,0.9"))
    report = repairable.record(tmp_path)
    assert [one["share"] for one in report["mixtures"]] == [0, 0.1, 0.9]
    best = max(report["mixtures"], key=lambda one: (one["flips"]["fixed"] - one["flips"]["broken"], -one["loss"]))
    assert report["share"] == best["share"] and report["validation"]["flips"] == best["flips"]


def test_fresh_adapters_are_saved_as_adapters(toy, tmp_path):
    more = ["--layers=block.1", "--lora_r=2", "--optim=critical_adamw", "--learning_rate=0.05"]
    before = bytes_of(toy / "model")
    assert main(words(toy, tmp_path, *more)) == 0
    assert bytes_of(toy / "model") == before
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert config["r"] == 2
    stored = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert len(stored) == 12 and all(".layer.1." in name for name in stored)
    report = repairable.record(tmp_path)
    assert report["how"] == "LoRA" and report["trained_parameters"] == sum(one.numel() for one in stored.values())
    base = AutoModelForSequenceClassification.from_pretrained(toy / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "model").eval()
    rows, tokenizer = read(toy / "test.jsonl"), repairable.word_tokenizer()
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], return_tensors="pt")).logits
    new = [bool(one) for one in logits.argmax(1) == torch.tensor([row["label"] for row in rows])]
    assert flips_of(right_by_hand(toy / "model", rows), new) == report["verification"]["flips"]
    # Our own commands read it, too: the head is that of the base model.
    evaluated = load_evaluated(str(tmp_path / "model"), "sequence_classification", "cpu")
    assert evaluated.model.config.num_labels == 2


def test_a_lora_models_own_adapters_are_trained_in_the_chosen_groups(toy, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(toy / "model")
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    adapted = get_peft_model(base, config)
    repairable.saved(Evaluated("adapted", adapted, repairable.word_tokenizer()), tmp_path / "model")
    more = ["--layers=block.0,head", "--optim=critical_sgd", "--learning_rate=0.2", f"--model={tmp_path / 'model'}"]
    assert main([*words(toy, tmp_path / "out"), *more]) == 0
    old, new = (load_file(place / "model" / "adapter_model.safetensors") for place in (tmp_path, tmp_path / "out"))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all(".layer.0." in name or "classifier" in name for name in moved)
    assert {name for name in old if "classifier" in name or "layer.0" in name} == moved
    assert repairable.record(tmp_path / "out")["how"] == "LoRA"


# ---- other tasks -----------------------------------------------------------------------------------------------------


def test_pictures_by_a_model_with_batchnorm(tmp_path):
    repairable.saved(repairable.seeing(), tmp_path / "model")
    repairable.digits(300).to_parquet(str(tmp_path / "digits.parquet"))
    before = bytes_of(tmp_path / "model")
    given = [f"--model={tmp_path / 'model'}", f"--data={tmp_path / 'digits.parquet'}", "--layers=block.1,head"]
    out = tmp_path / "out"
    assert main(["repair", *given, f"--output_dir={out}", *FAST, "--learning_rate=0.1"]) == 0
    assert bytes_of(tmp_path / "model") == before
    old, new = (load_file(place / "model" / "model.safetensors") for place in (tmp_path, out))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all("stages.1" in name or "classifier" in name for name in moved)
    assert any("running_mean" in name for name in moved)
    # By hand: from_pretrained, one batch.
    report = repairable.record(out)
    settings = Settings(str(tmp_path / "model"), SuiteSplit("data", "in distribution", source=given[1][7:]))
    plan = repair.Plan(settings, str(out))
    rows, test = splits_of(plan, "image_classification")["test"], report["verification"]
    answers = []
    for place in (tmp_path / "model", out / "model"):
        processor = AutoImageProcessor.from_pretrained(place)
        pixels = processor(images=[one.convert("RGB") for one in rows["image"]], return_tensors="pt")
        with torch.no_grad():
            logits = AutoModelForImageClassification.from_pretrained(place).eval()(**pixels).logits
        answers.append([bool(one) for one in logits.argmax(1) == torch.tensor(rows["label"])])
    assert test["flips"] == flips_of(*answers) and test["examples"] == len(rows) == 90


def splits_of(plan, task):
    data = replace(plan.settings.data, task=task)
    plan = replace(plan, settings=replace(plan.settings, data=data))
    splits = repair.load_splits(plan, load_evaluated(plan.settings.model, task, "cpu"))
    return {"train": splits.data.rows, "validation": splits.validation.rows, "test": splits.test.rows}


def test_tokens_of_a_language_model(tmp_path, one_model):
    repairable.saved(repairable.language(), tmp_path / "model")
    files = repairable.written(
        tmp_path,
        train=repairable.letters(40, seed=1),
        validation=repairable.letters(10, seed=2),
        test=repairable.letters(25, seed=3),
    )
    given = [f"--model={tmp_path / 'model'}", f"--data={files['train']}", f"--validation={files['validation']}"]
    out = tmp_path / "out"
    more = [f"--test={files['test']}", f"--output_dir={out}", "--learning_rate=0.02", "--top=4"]
    status = main(["repair", *given, *more, *FAST, "--max_steps=30", "--eval_steps=10", "--save_steps=10"])
    report = repairable.record(out)
    assert status == 0, report["decision"]["reasons"]
    answers = []
    for place in (tmp_path / "model", out / "model"):
        evaluated = load_evaluated(str(place), "causal_lm", "cpu")
        tokens = []
        for row in read(files["test"]):
            ids = [evaluated.processor.bos_token_id, *evaluated.processor(row["text"])["input_ids"]]
            with torch.no_grad():
                best = evaluated.model(torch.tensor([ids])).logits[0, :-1].argmax(-1)
            tokens.append([bool(one) for one in best == torch.tensor(ids[1:])])
        answers.append(tokens)
    counted = flips_of(*([one for row in tokens for one in row] for tokens in answers))
    said = report["verification"]
    assert report["unit"] == "token" and said["flips"] == counted and said["examples"] == 25
    sums = [[sum(row) for row in tokens] for tokens in answers]
    better = sum(after > first for first, after in zip(*sums, strict=True))
    worse = sum(after < first for first, after in zip(*sums, strict=True))
    assert (said["rows_better"], said["rows_worse"]) == (better, worse)
    assert said["p_value"] == pytest.approx(mcnemar_by_hand(better, worse))


def test_texts_that_are_written(tmp_path):
    repairable.saved(repairable.language(), tmp_path / "model")
    rows = [{"prompt": f"{number}:{'abcd'[number % 4]}>", "reference": "yes"} for number in range(60)]
    files = repairable.written(tmp_path, train=rows[:24], validation=rows[24:36], test=rows[36:])
    given = [f"--model={tmp_path / 'model'}", f"--data={files['train']}", f"--validation={files['validation']}"]
    out = tmp_path / "out"
    more = [f"--test={files['test']}", f"--output_dir={out}", "--task=generation", "--max_new_tokens=4"]
    how = ["--layers=*", "--learning_rate=0.03", "--distill=0.1", "--max_steps=16"]
    assert main(["repair", *given, *more, *FAST, *how]) == 0, repairable.record(out)["decision"]["reasons"]
    said = repairable.record(out)["verification"]
    evaluated = load_evaluated(str(out / "model"), "generation", "cpu")
    right = 0
    for row in rows[36:]:
        ids = evaluated.processor(row["prompt"], return_tensors="pt")["input_ids"]
        output = evaluated.model.generate(ids, max_new_tokens=4, do_sample=False)
        right += evaluated.processor.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == "yes"
    assert said["flips"] == {"fixed": right, "broken": 0, "right": 0, "wrong": 24 - right} and right >= 20


# ---- three splits ----------------------------------------------------------------------------------------------------


def test_a_cut_makes_three_splits_that_share_nothing(toy, tmp_path):
    data = SuiteSplit("data", "in distribution", source=str(toy / "whole.jsonl"), task="sequence_classification")
    plan = repair.Plan(Settings(str(toy / "model"), data), str(tmp_path), cut=(0.6, 0.1, 0.3))
    found = splits_of(plan, "sequence_classification")
    assert [len(one) for one in found.values()] == pytest.approx([204, 34, 102], abs=1)
    assert sum(map(len, found.values())) == 340
    assert find_leaks({name: one["text"] for name, one in found.items()}) == []
    shares = [sum(one["label"]) / len(one) for one in found.values()]
    assert max(shares) - min(shares) < 0.05


def test_splits_that_share_examples_are_refused(toy, tmp_path, capsys):
    rows = read(toy / "test.jsonl") + read(toy / "train.jsonl")[:2]
    test = write_rows(tmp_path / "test.jsonl", rows)
    assert main([*words(toy, tmp_path / "out", *HEAD), f"--test={test}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "2 examples of 'data' are also in 'test'" in line and "--cut" in line
    # The slip is mended in the same folder: nothing of a repair is in it yet.
    assert main(words(toy, tmp_path / "out", *HEAD)) == 0


def test_nothing_of_the_test_split_is_in_the_weights_and_validation_chooses(toy, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [{**row, "label": 0} for row in repairable.reviews(70, seed=7)])
    flipped = write_rows(
        tmp_path / "flipped.jsonl", [{**row, "label": 1 - row["label"]} for row in read(toy / "validation.jsonl")]
    )
    cases = {"plain": [], "other test": [f"--test={other}"], "other validation": [f"--validation={flipped}"]}
    bests, reports = {}, {}
    for name, more in cases.items():
        main([*words(toy, tmp_path / name, *HEAD, "--keep_checkpoints", "--save_steps=100"), *more])
        (best,) = (tmp_path / name / "training").glob("best-*.safetensors")
        bests[name], reports[name] = load_file(best), repairable.record(tmp_path / name)
    for name, one in bests["plain"].items():
        assert torch.equal(bests["other test"][name], one)
    assert reports["plain"]["share"] == reports["other test"]["share"] > 0
    assert reports["plain"]["verification"] != reports["other test"]["verification"]
    assert reports["other validation"]["share"] == 0, "where the labels are turned round, the old weights are best"


# ---- a repair that dies ----------------------------------------------------------------------------------------------

# Dropout draws, batches are drawn, the replay is drawn, the best is not the last, and the last step ends no epoch.
LONG = ["--layers=block.1,head", "--optim=adatamw", "--learning_rate=0.01", "--max_steps=11", "--eval_steps=2"]
LONG += ["--patience=0", "--seed=3", "--distill=0.3"]


class Died(BaseException):
    pass


def compared(folder):
    """A report without what may differ: times, and the Trainer's own accounts."""
    found = repairable.record(folder)
    history = [one for one in found["history"] if "train_runtime" not in one]
    left_out = ("facts", "command", "history", "found")
    return {name: value for name, value in found.items() if name not in left_out}, history


def weights_of(folder):
    (file,) = (folder / "model").glob("*model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    """The folder and exit status of a repair that nothing happens to, done once."""
    done = {}

    def run(more):
        if more not in done:
            folder = tmp_path_factory.mktemp("straight")
            done[more] = folder, main(words(toy, folder, *LONG, *more, "--keep_checkpoints"))
        return done[more]

    return run


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("step 7", []),
        ("step 7", ["--layers=block.1", "--lora_r=2"]),
        ("verification", []),
        ("verification", ["--patience=1", "--save_steps=2"]),
    ],
    ids=["training", "adapters", "after the last step", "after patience"],
)
def test_a_repair_that_died_goes_on_and_ends_bit_for_bit(where, more, undisturbed, toy, tmp_path, monkeypatch):
    given = [*LONG, *more]
    straight, status = undisturbed(tuple(more))

    def dying(*args, **kwargs):
        raise Died

    with monkeypatch.context() as patch:
        if where == "verification":
            patch.setattr(repair, "verified", dying)
        else:
            patch.setattr("hf_momentum.training.retrain.RepairTrainer.compute_loss", dying_at(7))
        with pytest.raises(Died):
            main(words(toy, tmp_path / "out", *given, "--keep_checkpoints"))
    left = {path.name for path in (tmp_path / "out" / "training").iterdir()}
    assert any(name.startswith("checkpoint-") for name in left)
    steps = counted_steps(monkeypatch)
    assert main(words(toy, tmp_path / "out", *given, "--keep_checkpoints")) == status
    expected = {"verification": 0}.get(where, 11 - 4)
    assert len(steps) == expected, "it went on, and did not begin again"
    report = repairable.record(tmp_path / "out")
    assert (report["steps"] < 11) == ("--patience=1" in more), report["stopped"]
    assert compared(tmp_path / "out") == compared(straight)
    ends = [load_best(folder) for folder in (straight, tmp_path / "out")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    if status == 0:
        first, second = weights_of(straight), weights_of(tmp_path / "out")
        assert all(torch.equal(first[name], second[name]) for name in first)


def load_best(folder):
    step = max(int(path.stem.rpartition("-")[2]) for path in (folder / "training").glob("best-*.safetensors"))
    return load_file(folder / "training" / f"best-{step}.safetensors")


def dying_at(step):
    from hf_momentum.training.retrain import RepairTrainer

    plain = RepairTrainer.compute_loss

    def compute(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Died
        return plain(self, *args, **kwargs)

    return compute


def counted_steps(monkeypatch):
    from hf_momentum.training.retrain import RepairTrainer

    plain, steps = RepairTrainer.compute_loss, []

    def compute(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(RepairTrainer, "compute_loss", compute)
    return steps


@pytest.mark.slow
def test_a_killed_repair_goes_on_and_ends_bit_for_bit(toy, tmp_path):
    """By SIGKILL, at a moment of its own choosing after the first checkpoint, several times."""
    given = [*LONG, "--max_steps=60", "--save_steps=4"]
    call = [sys.executable, "-m", "hf_momentum", *words(toy, tmp_path / "out", *given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert main(words(toy, tmp_path / "straight", *given)) == 0
    for kill in range(2):
        process = subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        known = set((tmp_path / "out" / "training").glob("checkpoint-*"))
        while not set((tmp_path / "out" / "training").glob("checkpoint-*/complete.json")) - {
            one / "complete.json" for one in known
        }:
            assert process.poll() is None, f"it ended before it was killed the {kill + 1}. time"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(call, env=environment, check=False).returncode == 0
    assert compared(tmp_path / "out")[0] == compared(tmp_path / "straight")[0]
    first, second = weights_of(tmp_path / "straight"), weights_of(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- folders that hold something -------------------------------------------------------------------------------------


def test_another_repair_in_the_same_folder_is_refused(toy, tmp_path, capsys):
    assert main(words(toy, tmp_path, *HEAD)) == 0
    before = bytes_of(tmp_path / "model")
    assert main(words(toy, tmp_path, *HEAD, "--replay=2")) == 2
    assert "holds a repair with other settings; name another --output_dir" in capsys.readouterr().err
    assert main(words(toy, tmp_path, *HEAD)) == 0 and bytes_of(tmp_path / "model") == before


@pytest.mark.parametrize("out", ["", "model"], ids=["above the model", "the model"])
def test_the_original_is_never_written_over(out, toy, tmp_path, capsys):
    """OUT/model of an accepted repair would be the model itself."""
    repairable.saved(repairable.classifier(), tmp_path / "model")
    before = bytes_of(tmp_path / "model")
    assert main([*words(toy, tmp_path / out, *HEAD), f"--model={tmp_path / 'model'}"]) == 2
    said = capsys.readouterr().err
    assert "is the model, which a repair does not change" in said or "holds model, which is of no repair" in said
    assert bytes_of(tmp_path / "model") == before


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--replay=-1"], "replay must be at least 0, got -1.0"),
        (["--distill=-0.5"], "distill must be at least 0, got -0.5"),
        (["--patience=-2"], "patience must be at least 0, got -2"),
        (["--shares=0.5,1.5"], "shares must be numbers above 0 and up to 1, got 0.5, 1.5"),
        (["--shares="], "shares must be numbers above 0 and up to 1, got none"),
        (["--shares=half"], "shares must be numbers with commas"),
        (["--alpha=0"], "alpha must be between 0 and 1, got 0.0"),
        (["--lora_r=0"], "lora_r must be at least 1, got 0"),
        (["--cut=0.5,0.5"], "cut must be three shares above 0 with the sum 1"),
        (["--cut=0.5,0.5,0.5"], "cut must be three shares above 0 with the sum 1"),
        (["--eval_steps=0.1"], "eval_steps must be a whole number of at least 1, got 0.1"),
        (["--eval_strategy=steps"], "--eval_strategy is not for a repair; validation is measured every eval_steps"),
        (["--num_train_epochs", "3"], "--num_train_epochs is not for a repair; give max_steps"),
        (["--resume-from-checkpoint=x"], "--resume_from_checkpoint is not for a repair; the same command"),
        (["--load_best_model_at_end"], "--load_best_model_at_end is not for a repair"),
        (["--push_to_hub"], "--push_to_hub is not for a repair"),
        (["--deepspeed=z.json"], "--deepspeed is not for a repair"),
        (["--fsdp=full_shard"], "--fsdp is not for a repair"),
        (["--max_stepz=3"], "unknown argument '--max_stepz'"),
        (["--optim=tamm"], "tamm"),
        (["--score=contrats"], "score 'contrats' is not accepted"),
        (["--layers=tail"], "no group matches 'tail'"),
        (["--layers=embeddings", "--lora_r=2"], "groups embeddings have no linear layer for LoRA to adapt"),
        (["--top=2", "--budget=0.5"], "top"),
        (["--baselines", "--seeds=0"], "seeds must be at least 1, got 0"),
        (["--baselines", "--lora_r=2"], "baselines train weights; leave lora_r out"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_what_cannot_be_used_is_refused_in_one_line(more, message, toy, tmp_path, capsys):
    assert main(words(toy, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("error: ") and message in printed[-1]
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("name", ["validation", "test"])
def test_both_other_splits_are_given_or_neither(name, toy, tmp_path, capsys):
    given = [word for word in words(toy, tmp_path) if not word.startswith(f"--{name}=")]
    assert main(given) == 2
    assert f"give --{name}, too, or neither: then --cut makes three parts" in capsys.readouterr().err


def test_an_output_dir_among_the_training_arguments_is_refused(toy, tmp_path):
    settings = Settings(str(toy / "model"), SuiteSplit("d", "in distribution", task="sequence_classification"))
    with pytest.raises(InputError, match=r"--output_dir is not for a repair; give the repair's --output_dir"):
        repair.Plan(settings, str(tmp_path), overrides=["--output_dir=x"]).training("y")


# ---- was the diagnosis worth anything? -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared_ways(toy, tmp_path_factory):
    """All ways to retrain at two seeds, once."""
    folder = tmp_path_factory.mktemp("baselines")
    more = ["--baselines", "--seeds=2", "--learning_rates=0.05,0.2", "--top=2", "--optim=critical_sgd"]
    given = words(toy, folder, *more, "--max_steps=2", "--eval_steps=2", "--shares=1", "--max_examples=60")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Document, "write", lambda document, place: place / "report.html")
        assert main(given) == 0
    return folder, given


def records_of(folder):
    lines = (folder / "runs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_all_ways_are_run_at_equal_steps(compared_ways):
    folder, _ = compared_ways
    runs = [line for line in records_of(folder) if line["what"] == "run"]
    groups = ["embeddings", "block.0", "block.1", "pooler", "head"]
    ways = ["chosen", "full", "head", "random", "relative_lr", *(f"group:{name}" for name in groups)]
    assert [(run["seed"], run["method"]) for run in runs] == [(seed, way) for seed in (0, 1) for way in ways]
    assert {run["steps"] for run in runs} == {2} and {run["learning_rate"] for run in runs} <= {0.05, 0.2}
    by_way = {(run["seed"], run["method"]): run for run in runs}
    sizes = {name: by_way[0, f"group:{name}"]["parameters"] for name in groups}
    for seed in (0, 1):
        chosen, random = by_way[seed, "chosen"], by_way[seed, "random"]
        assert len(chosen["groups"]) == len(random["groups"]) == 2 and chosen["groups"] != random["groups"]
        assert by_way[seed, "head"]["groups"] == ["head"]
        assert by_way[seed, "full"]["parameters"] == by_way[seed, "relative_lr"]["parameters"] == sum(sizes.values())
        same = {name: by_way[seed, "head"][name] for name in ("flips", "learning_rate", "share", "p_value")}
        assert {name: by_way[seed, "group:head"][name] for name in same} == same, "the same training, the same end"
        assert by_way[seed, "full"]["flips"] != by_way[seed, "group:embeddings"]["flips"]
    assert any(run["flips"]["fixed"] > 5 for run in runs)
    report = BaselinesReport.from_json((folder / "report.json").read_text())
    assert (
        report.seeds == [0, 1]
        and report.net("head")[0] == by_way[0, "head"]["flips"]["fixed"] - (by_way[0, "head"]["flips"]["broken"])
    )


def test_only_runs_that_are_lacking_are_run_again(compared_ways, tmp_path, monkeypatch):
    """Lines that were lost, and one that a dying process left half written."""
    folder, given = compared_ways
    before, report = records_of(folder), json.loads((folder / "report.json").read_text())
    kept = [line for line in before if (line.get("method"), line["seed"]) not in (("head", 0), ("random", 1))]
    (folder / "runs.jsonl").write_text("\n".join(json.dumps(line) for line in kept) + '\n{"what": "run", "se')
    from hf_momentum.training import repair_baselines

    plain, made = repair_baselines._Bench.measure, []

    def measure(self, way, rates):
        made.append((way.method, self.plan.settings.seed))
        return plain(self, way, rates)

    monkeypatch.setattr(repair_baselines._Bench, "measure", measure)
    assert main(given) == 0
    assert made == [("head", 0), ("random", 1)]
    again = json.loads((folder / "report.json").read_text())
    assert {**again, "facts": None} == {**report, "facts": None}
    made.clear()
    assert main(given) == 0 and not made
    assert sorted(map(json.dumps, records_of(folder)[: len(kept)])) == sorted(map(json.dumps, kept))
