"""`hf-momentum evaluate` against independent figures: lm_eval, scikit-learn, the Trainer, and models run by hand."""

import json
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
)

from hf_momentum import InputError
from hf_momentum.cli import main
from hf_momentum.evaluation.evaluation_report import EvaluationReport
from hf_momentum.evaluation.suite import SuiteSplit, read_suite
from hf_momentum.training import job, load_recipe
from hf_momentum.training.evaluate import Settings, evaluate, measure
from hf_momentum.training.evaluated import load_evaluated
from hf_momentum.training.examples import class_numbers, windows
from hf_momentum.training.suite_rows import load_rows
from hf_momentum.training.suite_trainer import suite_datasets, suite_metrics
from hf_momentum.training.tokenizer import byte_tokenizer
from tests.conftest import write_rows

TEXTS = [
    "The long river runs down to the sea. " * 6,
    "Short.",
    "naïve café",
    "def f(x):\n    return x + 1\n" * 4,
    "Zz",
] * 6
WORDS = ["good", "fine", "great", "bad", "poor", "awful"]


def llama(kind, folder, **options):
    torch.manual_seed(3)
    tokenizer = byte_tokenizer(64)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.4,  # so that logits are not all alike
        **options,
    )
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    write_rows(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    return llama(LlamaForCausalLM, folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    rows = [
        {"text": f"{word} film {number}", "label": int(number % 3 == 0), "year": 1990 + number % 4}
        for number, word in enumerate(WORDS * 20)
    ]
    write_rows(folder / "inside.jsonl", rows)
    write_rows(folder / "shifted.jsonl", [{**row, "label": 1 - row["label"]} for row in rows[:70]])
    return llama(LlamaForSequenceClassification, folder, num_labels=2)


def suite_of(text: str):
    return read_suite(text, "mine")


def rows_of(folder, suite, **settings):
    rows = {split.name: load_rows(split) for split in suite.splits}
    return measure(suite, rows, str(folder), Settings(str(folder), device="cpu", **settings))[0]


# ---- language models -------------------------------------------------------------------------------------------------


def code_suite(folder, **keys):
    return suite_of(
        yaml.safe_dump({"splits": {"code": {"role": "in_distribution", "source": f"{folder}/texts.jsonl", **keys}}})
    )


def test_windows_predict_every_token_once_from_all_that_fits_before_it():
    for count in range(1, 30):
        tokens = list(range(100, 100 + count))
        parts = list(windows(tokens, prefix=0, length=7))
        assert [token for part in parts for token in part.predicted] == tokens
        stream = [0, *tokens]
        for part in parts:
            whole = [*part.context, *part.predicted]
            assert len(whole) <= 8, "one more than the model takes: the last token is not fed"
            start = stream.index(whole[0])
            assert stream[start : start + len(whole)] == whole
        assert all(len(part.context) + len(part.predicted) == 8 for part in parts[1:])


def test_loss_of_documents_is_the_models_token_by_token(language):
    """By hand, without batches: each token's log-probability after the window's other tokens."""
    (measured,) = rows_of(language, code_suite(language), batch_size=7)
    evaluated = load_evaluated(str(language), "causal_lm", device="cpu")
    tokenizer, model = evaluated.processor, evaluated.model
    for text, row in list(zip(TEXTS, measured.rows, strict=True))[:5]:
        tokens = tokenizer(text)["input_ids"]
        nats = right = 0
        for part in windows(tokens, tokenizer.bos_token_id, 64):
            whole = [*part.context, *part.predicted]
            with torch.no_grad():
                logs = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
            for place in range(len(part.context) - 1, len(whole) - 1):
                nats -= float(logs[place, whole[place + 1]])
                right += int(logs[place].argmax() == whole[place + 1])
        assert row == pytest.approx([nats, len(tokens), right, len(text.encode())], rel=1e-5)


def test_batches_do_not_change_the_rows(language):
    one, many = (rows_of(language, code_suite(language), batch_size=size)[0].rows for size in (1, 16))
    np.testing.assert_allclose(one, many, rtol=1e-5)


def test_blocks_that_start_with_the_end_token_have_the_loss_that_training_reports(tiny, tmp_path):
    """Where documents fill the blocks of a recipe exactly, the two ways to cut text are one.

    The first document is a block by itself, so that all others start with the token that ends the one before.
    """
    first, *rest = "a" * 32, *("".join(chr(97 + (7 * i + j) % 26) for j in range(31)) for i in range(12))
    blocks = write_rows(tmp_path / "blocks.jsonl", [{"text": text} for text in (first, *rest)])
    documents = write_rows(tmp_path / "documents.jsonl", [{"text": text} for text in rest])
    words = tiny.words(tmp_path / "out", in_distribution=f"code={blocks}", must_not_forget=None)
    report = job.train(load_recipe(None, words)).report
    suite = suite_of(f"block_size: 32\nsplits: {{code: {{role: in_distribution, source: {documents}}}}}")
    (measured,) = rows_of(tmp_path / "out", suite, batch_size=4)
    ours = measured.rows.sum(0)
    assert ours[1] == 12 * 31
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(first, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        alone = float(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids, labels=ids).loss)
    assert (12 * ours[0] / ours[1] + alone) / 13 == pytest.approx(report.splits[0].after["loss"].value, rel=1e-5)


def test_lm_eval_and_ours_agree_on_the_perplexity_of_the_same_text(language, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{language}/texts.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}, {"metric": "word_perplexity"}],
    }
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(task))
    both = suite_of(
        yaml.safe_dump(
            {
                "splits": {
                    "ours": {"role": "in_distribution", "source": f"{language}/texts.jsonl"},
                    "theirs": {
                        "role": "shifted",
                        "kind": "domain",
                        "lm_eval": "texts",
                        "lm_eval_folder": str(tmp_path),
                    },
                }
            }
        )
    )
    report = evaluate(both, Settings(str(language), device="cpu"))
    ours, theirs = (split.scores for split in report.splits)
    assert theirs["bits_per_byte"].value == pytest.approx(ours["bits_per_byte"].value, rel=1e-4)
    assert theirs["byte_perplexity"].value == pytest.approx(2 ** ours["bits_per_byte"].value, rel=1e-4)
    # A byte is a token here, so the perplexity per token is theirs per byte.
    assert ours["perplexity"].value == pytest.approx(theirs["byte_perplexity"].value, rel=1e-4)
    assert report.splits[1].examples == len(TEXTS) and theirs["bits_per_byte"].low < theirs["bits_per_byte"].high
    with pytest.raises(InputError, match="has no metric 'acc'"):
        measure_task_with(both, language, "acc")


def measure_task_with(suite, folder, metric):
    splits = (suite.splits[0], replace(suite.splits[1], metrics=(metric,)))
    return evaluate(replace(suite, splits=splits), Settings(str(folder), device="cpu"))


def test_a_trainer_evaluates_every_split_of_a_suite_as_the_command_does(language, tmp_path):
    suite = suite_of(
        f"""
        block_size: 40
        splits:
          code: {{role: in_distribution, source: {language}/texts.jsonl}}
          typos: {{role: shifted, of: code, corruption: typos, severities: [1, 5]}}
        """
    )
    evaluated = load_evaluated(str(language), "causal_lm", device="cpu")
    compute, counted = suite_metrics(suite)
    trainer = Trainer(
        evaluated.model,
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=4),
        eval_dataset=suite_datasets(suite, evaluated.processor),
        data_collator=default_data_collator,
        compute_metrics=compute,
        preprocess_logits_for_metrics=counted,
    )
    found = trainer.evaluate()
    # A Trainer feeds the last token too, so its windows of 40 predict 39.
    shorter = replace(suite, splits=tuple(replace(split, block_size=39) for split in suite.splits))
    for measured in rows_of(language, shorter):
        name, sums = measured.split.name, measured.rows.sum(0)
        assert found[f"eval_{name}_nll"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
        assert found[f"eval_{name}_token_accuracy"] == pytest.approx(sums[2] / sums[1], rel=1e-5)
        assert found[f"eval_{name}_perplexity"] == pytest.approx(math.exp(sums[0] / sums[1]), rel=1e-5)


def test_a_recipe_evaluates_a_suite_at_every_evaluation_step(tiny, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"""
        splits:
          code: {{role: in_distribution, source: {tiny.folder}/code.jsonl}}
          prose: {{role: must_not_forget, source: {tiny.folder}/prose.jsonl}}
        """
    )
    fields = {"evaluation_suite": path, "eval_strategy": "steps", "eval_steps": 2, "in_distribution": None}
    outcome = job.train(load_recipe(None, tiny.words(tmp_path / "out", must_not_forget=None, **fields)))
    logged = [entry for entry in outcome.report.history if "eval_code_nll" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[1]["eval_code_nll"] < logged[0]["eval_code_nll"], "it is trained on code"
    assert any("eval_prose_perplexity" in entry for entry in outcome.report.history)
    with pytest.raises(InputError, match="which a Trainer does not evaluate"):
        text = path.read_text() + "\n          arc: {role: must_not_forget, lm_eval: arc_easy}"
        path.write_text(text)
        job.prepare(load_recipe(None, tiny.words(tmp_path / "other", **fields)))
    nothing = {**fields, "eval_strategy": "no", "shifted": None, "must_not_forget": None}
    with pytest.raises(InputError, match="or an evaluation_suite with an eval_strategy"):
        job.prepare(load_recipe(None, tiny.words(tmp_path / "other", **nothing)))


# ---- classifiers -----------------------------------------------------------------------------------------------------


def review_suite(folder, more=""):
    return suite_of(
        f"""
        task: sequence_classification
        splits:
          inside: {{role: in_distribution, source: {folder}/inside.jsonl, group_column: year}}
          outside: {{role: shifted, kind: label, source: {folder}/shifted.jsonl}}
        {more}
        """
    )


def probabilities(folder, texts):
    """One text at a time, by hand."""
    evaluated = load_evaluated(str(folder), "sequence_classification", device="cpu")
    with torch.no_grad():
        logits = [evaluated.model(**evaluated.processor(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(logits).double().softmax(-1).numpy()


def expected_calibration_error(probability, labels, bins=15):
    confidence, right = probability.max(1), probability.argmax(1) == labels
    error = 0.0
    for low, high in zip(np.linspace(0, 1, bins + 1)[:-1], np.linspace(0, 1, bins + 1)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_scikit_learn_agrees_on_every_metric_of_a_classifier(classifier):
    report = evaluate(review_suite(classifier), Settings(str(classifier), device="cpu", batch_size=7))
    for split, name in zip(report.splits, ("inside", "shifted"), strict=True):
        rows = datasets.Dataset.from_json(f"{classifier}/{name}.jsonl")
        labels, probability = np.array(rows["label"]), probabilities(classifier, rows["text"])
        predicted = probability.argmax(1)
        assert 0.2 < accuracy_score(labels, predicted) < 0.8 and len(set(predicted)) == 2, "the model is no constant"
        expected = {
            "accuracy": accuracy_score(labels, predicted),
            "loss": log_loss(labels, probability),
            "f1": f1_score(labels, predicted, average="macro"),
            "calibration_error": expected_calibration_error(probability, labels),
        }
        assert {metric: one.value for metric, one in split.scores.items()} == pytest.approx(expected, rel=1e-5)
    inside = datasets.Dataset.from_json(f"{classifier}/inside.jsonl")
    right = probabilities(classifier, inside["text"]).argmax(1) == np.array(inside["label"])
    groups = {str(year): right[np.array(inside["year"]) == year].mean() for year in range(1990, 1994)}
    assert {name: one["accuracy"].value for name, one in report.splits[0].groups.items()} == pytest.approx(groups)
    text = report.document().to_markdown()
    worst = min(groups, key=groups.get)
    assert f"| {worst} |" in text.split("## Worst group")[1].split("Details")[0]


def test_classes_are_found_by_name_whatever_their_order():
    split = SuiteSplit("a", "in distribution", task="sequence_classification")
    named = datasets.Dataset.from_dict({"label": [0, 1, 1]}).cast_column(
        "label", datasets.ClassLabel(names=["neg", "pos"])
    )
    assert class_numbers(named, split, ["POS", "NEG"]) == [1, 0, 0]
    assert class_numbers(named, split, ["LABEL_0", "LABEL_1"]) == [0, 1, 1]
    numbers = datasets.Dataset.from_dict({"label": [1, 5]})
    assert class_numbers(numbers, split, ["1", "2", "5"]) == [0, 2], "a recipe calls outputs as the data call classes"
    with pytest.raises(InputError, match=r"has class 'neg', which the model lacks: its outputs are negative, positive"):
        class_numbers(named, split, ["negative", "positive"])
    with pytest.raises(InputError, match=r"has class '5', which the model lacks"):
        class_numbers(numbers, split, ["LABEL_0", "LABEL_1"])
    ours = SuiteSplit("a", "in distribution", task="sequence_classification", classes=("pos", "neg"))
    assert class_numbers(named, ours, ["LABEL_0", "LABEL_1"]) == [1, 0, 0]


def test_the_report_is_read_back_and_serves_as_baseline(classifier, tmp_path):
    report = evaluate(review_suite(classifier), Settings(str(classifier), device="cpu"))
    assert EvaluationReport.from_json(report.to_json()).to_json() == report.to_json()
    values = report.to_json()
    paths = []
    for number, (inside, outside) in enumerate([(0.6, 0.5), (0.8, 0.7)]):
        content = json.loads(values)
        content["model"] = f"baseline {number}"
        content["splits"][0]["scores"]["accuracy"]["value"] = inside
        content["splits"][1]["scores"]["accuracy"]["value"] = outside
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(content))
    settings = Settings(str(classifier), device="cpu", baselines=list(map(str, paths)))
    again = evaluate(review_suite(classifier), settings)
    (robust,) = again.robustness
    assert robust.effective.value == pytest.approx(robust.point.shifted - robust.line.at(robust.point.in_distribution))
    page = again.write(tmp_path / "out")
    assert (tmp_path / "out" / "plots" / "robustness_outside.png").is_file() and page.is_file()
    written = (tmp_path / "out" / "report.json").read_text()
    assert EvaluationReport.from_json(written).to_json() == again.to_json() == written
    card = (tmp_path / "out" / "card.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    (model,) = metadata["model-index"]
    assert [result["dataset"]["config"] for result in model["results"]] == ["inside", "outside"]
    assert "over examples" in card


def test_adapters_of_a_classifier_are_evaluated_as_the_run_reported_them(classifier, tmp_path):
    source = f"{classifier}/inside.jsonl"
    words = {
        "task": "sequence_classification",
        "model_name_or_path": classifier,
        "train_dataset": source,
        "in_distribution": f"inside={source}",
        "lora": True,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "output_dir": tmp_path / "out",
        "learning_rate": 0.01,
        "lora_modules_to_save": "score",
    }
    report = job.train(load_recipe(None, [f"--{key}={value}" for key, value in words.items()])).report
    said = report.splits[0].after
    for place in (tmp_path / "out", tmp_path / "out" / "checkpoint-3"):
        found = evaluate(review_suite(classifier), Settings(str(place), base=str(classifier), device="cpu"))
        assert found.splits[0].scores["accuracy"].value == pytest.approx(said["accuracy"].value)
        assert found.splits[0].scores["loss"].value == pytest.approx(said["loss"].value, rel=1e-5)
        change = found.changes[0].scores["loss"].value
        assert change == pytest.approx(said["loss"].value - report.splits[0].before["loss"].value, abs=1e-5)


def test_pictures_are_classified_and_corrupted(tmp_path):
    digits = load_digits()
    pictures = [np.kron(image / 16 * 255, np.ones((2, 2))).astype(np.uint8) for image in digits.images[:60]]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(number) for number in range(10)])}
    )
    rows = {"image": [Image.fromarray(picture) for picture in pictures], "label": digits.target[:60].tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "digits.parquet"))
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=10,
        initializer_range=0.5,
    )
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "vit")
    try:
        AutoImageProcessor.from_pretrained(tmp_path / "vit")
    except ImportError:
        pytest.skip("transformers 5.17 reads pictures with torchvision, which is not here")
    suite = suite_of(
        f"""
        task: image_classification
        splits:
          digits: {{role: in_distribution, source: {tmp_path}/digits.parquet}}
          noise: {{role: shifted, of: digits, corruption: gaussian_noise, severity: 5}}
        """
    )
    clean, noisy = rows_of(tmp_path / "vit", suite, batch_size=9)
    with torch.no_grad():
        inputs = processor(
            images=[Image.fromarray(picture).convert("RGB") for picture in pictures], return_tensors="pt"
        )
        logs = model(**inputs).logits.double().log_softmax(-1)
    assert clean.rows[:, 0] == pytest.approx(-logs[range(60), digits.target[:60]].numpy(), rel=1e-4)
    assert clean.rows[:, 5].tolist() == digits.target[:60].tolist() == noisy.rows[:, 5].tolist()
    assert not np.allclose(clean.rows[:, 0], noisy.rows[:, 0], rtol=1e-2)


# ---- generation ------------------------------------------------------------------------------------------------------


def test_what_a_model_writes_is_its_most_likely_text_whatever_the_batch(language, tmp_path):
    """References are what token by token comes out most likely; half of them are spoilt."""
    evaluated = load_evaluated(str(language), "generation", device="cpu")
    tokenizer, model = evaluated.processor, evaluated.model
    prompts = ["The river", "x", "def f", "a longer prompt than the others"]
    written = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                token = model(ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
        written.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    rows = [
        {"prompt": prompt, "reference": text if number % 2 else text + "!"}
        for number, (prompt, text) in enumerate(zip(prompts, written, strict=True))
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    suite = suite_of(
        f"task: generation\nmax_new_tokens: 6\nsplits: {{answers: {{role: in_distribution, source: {source}}}}}"
    )
    (measured,) = rows_of(language, suite, batch_size=4)
    assert measured.rows[:, 1].tolist() == [0, 1, 0, 1]


# ---- the command, and what is wrong with its input -------------------------------------------------------------------


def test_the_command_writes_a_report_that_says_what_its_intervals_are(classifier, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(review_suite(classifier).to_yaml())
    words = ["--model", str(classifier), "--suite", str(path), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["evaluate", *words, "--max_examples", "40", "--base", str(classifier)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip().startswith("Accuracy in distribution (inside): 0.") and "Report: " in printed
    assert "Intervals are over examples" in printed
    text = (tmp_path / "out" / "report.md").read_text()
    assert "bootstrap interval over the examples" in text and "## Calibration" in text
    assert "| inside | in distribution | 40 |" in text
    # Against itself nothing has changed, and the report must not find a difference.
    assert "no significant difference in accuracy, +0.000 [+0.000, +0.000]" in text
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "M", "--suite", "nowhere"], "no suite 'nowhere'"),
        (["--model", "no/such", "--suite", "S"], "model 'no/such' is neither a folder here nor reachable"),
        (["--model", "M", "--suite", "S", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (
            ["--model", "M", "--suite", "S", "--dtype", "float31"],
            "dtype 'float31' is not accepted (did you mean 'float32'",
        ),
        (["--model", "M", "--suite", "S", "--device", "gpu7"], "device 'gpu7' cannot be used here"),
        (["--model", "M", "--suite", "S", "--baselines", "none.json"], "baseline none.json does not exist"),
        (["--model", "M", "--suite", "S", "--source", "inside=none.jsonl"], "dataset file none.jsonl does not exist"),
        (["--model", "L", "--suite", "S"], "has no weights for sequence_classification: score.weight would be random"),
        (["--model", "M"], "the following arguments are required: --suite"),
    ],
)
def test_bad_input_is_one_line(words, message, classifier, language, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(review_suite(classifier).to_yaml())
    known = {"M": str(classifier), "L": str(language), "S": str(path)}
    assert main(["evaluate", *(known.get(word, word) for word in words)]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ") and message in printed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 0}, {"text": "b", "label": None}], "has no labels: row 1 of"),
        ([{"text": "a", "label": -1}], "has no labels: row 0 of"),
        ([{"text": "a"}], "has no column 'label'; it has text"),
        ([{"text": "a", "label": 0}, {"text": None, "label": 0}], "column 'text' is empty in some rows"),
        ([{"text": "a", "label": 2}], "has class '2', which the model lacks"),
    ],
)
def test_splits_without_labels_that_a_model_knows_are_refused(rows, message, classifier, tmp_path):
    write_rows(tmp_path / "inside.jsonl", rows)
    write_rows(tmp_path / "shifted.jsonl", [{"text": "a", "label": 0}])
    text = review_suite(tmp_path).to_yaml().replace("group_column: year", "group_column: text")
    with pytest.raises(InputError) as caught:
        evaluate(suite_of(text), Settings(str(classifier), device="cpu"))
    assert message in str(caught.value) and "split 'inside'" in str(caught.value)


def test_a_file_that_is_no_report_is_no_baseline(classifier, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="is no report of `hf-momentum evaluate`"):
        evaluate(review_suite(classifier), Settings(str(classifier), baselines=[str(tmp_path / "a.json")]))


def test_a_checkpoint_of_shards_is_put_together_first(language, tmp_path):
    """As FSDP leaves one: weights in a file that from_pretrained does not know, the description one folder up."""
    model = LlamaForCausalLM.from_pretrained(language)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    torch.save(model.state_dict(), checkpoint / "pytorch_model_fsdp.bin")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    for path in language.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    whole, sharded = (rows_of(place, code_suite(language))[0].rows for place in (language, checkpoint))
    np.testing.assert_array_equal(whole, sharded)
