"""`hf-momentum diagnose` against gradients taken by hand in float64, one example at a time."""

import copy
import json
import random
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from hf_momentum import InputError
from hf_momentum.cli import main
from hf_momentum.diagnosis.diagnosis_report import DiagnosisReport
from hf_momentum.diagnosis.groups import layer_groups, plain_name
from hf_momentum.diagnosis.results import SCORES
from hf_momentum.evaluation.suite import SuiteSplit
from hf_momentum.training import job, load_recipe, samples
from hf_momentum.training.diagnose import check, diagnosed, settings_of
from hf_momentum.training.differentiable import differentiable
from hf_momentum.training.evaluated import Evaluated, load_evaluated, untrained
from hf_momentum.training.examples import IGNORED
from hf_momentum.training.samples import Data, Settings, attribute, matched
from hf_momentum.training.tokenizer import byte_tokenizer
from tests.conftest import write_rows

CONTEXT = 32
ADJECTIVES = ["good", "fine", "great", "bad", "poor", "awful", "odd", "dull"]
TEXTS = [f"{adjective} film, {number} of {number % 7 + 2}" for number, adjective in enumerate(ADJECTIVES * 4)]
CLASSES = 3


@pytest.fixture(autouse=True)
def few_units(monkeypatch):
    """Micro-batches of several examples, of which there would otherwise have to be dozens."""
    monkeypatch.setattr(samples, "_UNITS", 4)


def saved(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def bert(folder, **options):
    """With dropout; its head is moved so that each class is predicted of some texts."""
    torch.manual_seed(5)
    tokenizer = byte_tokenizer(CONTEXT)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=CLASSES,
        initializer_range=0.5,
        **options,
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.bias -= model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits.mean(0)
    return saved(model, tokenizer, folder)


def llama(folder, **options):
    torch.manual_seed(3)
    tokenizer = byte_tokenizer(CONTEXT)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        **options,
    )
    return saved(LlamaForCausalLM(config), tokenizer, folder)


def predicted(folder, texts):
    """One text at a time, cut as the model needs it."""
    evaluated = load_evaluated(str(folder), "sequence_classification", "cpu", "float32")
    found = []
    for text in texts:
        given = evaluated.processor(text, return_tensors="pt", truncation=True, max_length=CONTEXT)
        with torch.no_grad():
            found.append(int(evaluated.model(**given).logits.argmax()))
    return found


def half_wrong(predictions, wrong=lambda number: number % 3 > 0, step=1):
    """Labels of which the predictions miss a part: two of three, unless given."""
    return [(one + step) % CLASSES if wrong(number) else one for number, one in enumerate(predictions)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = bert(tmp_path_factory.mktemp("classifier"))
    predictions = predicted(folder, TEXTS)
    labels = half_wrong(predictions, step=2)
    write_rows(folder / "data.jsonl", [{"text": t, "label": n} for t, n in zip(TEXTS, labels, strict=True)])
    write_rows(folder / "right.jsonl", [{"text": t, "label": n} for t, n in zip(TEXTS, predictions, strict=True)])
    return SimpleNamespace(folder=folder, data=folder / "data.jsonl", predictions=predictions, labels=labels)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = llama(tmp_path_factory.mktemp("language"))
    write_rows(folder / "data.jsonl", [{"text": text * 2} for text in TEXTS[:14]])
    write_rows(folder / "other.jsonl", [{"text": text * 2} for text in TEXTS[14:26]])
    return SimpleNamespace(folder=folder, data=folder / "data.jsonl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(2)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    model = ResNetForImageClassification(config)
    chance = np.random.default_rng(0)
    images = [Image.fromarray(chance.integers(0, 256, (16, 16), dtype=np.uint8)) for _ in range(30)]
    processor = ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        model.train()(2 * pixels)  # running statistics of its own, which are not those of a batch
        model.eval().classifier[1].bias -= model(pixels).logits.mean(0)
    saved(model, processor, folder)
    with torch.no_grad():
        predictions = [int(model(**processor(images=[one], return_tensors="pt")).logits.argmax()) for one in images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": images, "label": half_wrong(predictions)}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "data.parquet"))
    return SimpleNamespace(folder=folder, data=folder / "data.parquet", images=images, labels=rows["label"])


def command(model, data, out, *more):
    """Run the command; its report."""
    words = ["diagnose", "--model", str(model), "--data", str(data), "--device", "cpu", "--output_dir", str(out)]
    assert main([*words, *map(str, more)]) == 0
    for name in ("report.html", "report.md"):
        assert (out / name).stat().st_size > 500
    return DiagnosisReport.from_json((out / "report.json").read_text())


def report_of(model, data, **words):
    """What the command would write, without its pages and, unless it is asked for, without the random model."""
    settings = settings_of({"model": str(model), "data": str(data), "device": "cpu", "no_random": True, **words})
    check(settings)
    return diagnosed(Data.load(settings), settings)[0]


def by_hand(model, loss, names=None):
    """The scores of a mean loss in float64, from their definitions; `names` of the parameters, if not the model's."""
    model.zero_grad()
    loss.backward()
    named = dict(model.named_parameters())
    found = {name: [] for name in SCORES}
    for group in names or [group.weights for group in layer_groups(model)]:
        gradient = torch.cat([named[name].grad.flatten() for name in group])
        weight = torch.cat([named[name].detach().flatten() for name in group])
        found["raw"].append(float(gradient.norm()))
        found["rms"].append(float(gradient.norm() / len(gradient) ** 0.5))
        found["relative"].append(float(gradient.norm() / weight.norm()))
        found["taylor"].append(float((weight * gradient).abs().sum()))
    return found


def values(attribution):
    return {name: [one.value for one in attribution.scores[name]] for name in SCORES}


def agrees(compared, wrong, right, rel=1e-5):
    """Scores of a diagnosis with those by hand of what is wrong and what is right."""
    for found, expected in ((compared.errors, wrong), (compared.right, right)):
        for name in SCORES:
            assert [one.value for one in found.scores[name]] == pytest.approx(expected[name], rel=rel), name
    ratio = np.array(wrong["raw"]) / np.array(right["raw"])
    assert compared.values("contrast") == pytest.approx(ratio.tolist(), rel=2 * rel)
    for column in (compared.contrast, *compared.errors.scores.values()):
        assert all(one.low < one.value < one.high for one in column)


# ---- the scores are those of the definitions -------------------------------------------------------------------------


def text_loss(model, tokenizer, texts, labels):
    """The mean over texts, each by itself."""
    losses = []
    for text, label in zip(texts, labels, strict=True):
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=CONTEXT)
        losses.append(functional.cross_entropy(model(**given).logits, torch.tensor([label])))
    return torch.stack(losses).mean()


def parted(items, labels, predictions):
    """Wrong and right ones, with their labels."""
    rows = list(zip(items, labels, predictions, strict=True))
    wrong = [(item, label) for item, label, guess in rows if label != guess]
    right = [(item, label) for item, label, guess in rows if label == guess]
    return tuple(zip(*wrong, strict=True)), tuple(zip(*right, strict=True))


def test_scores_of_a_text_classifier(classifier, tmp_path, capsys):
    """In each class as much is wrong as right at least, so that all of what is right is beside it."""
    report = command(classifier.folder, classifier.data, tmp_path)
    wrong, right = parted(TEXTS, classifier.labels, classifier.predictions)
    assert all(wrong[1].count(one) >= right[1].count(one) > 0 for one in range(CLASSES))
    assert (report.looked_at, report.errors, report.right) == (32, len(wrong[0]), len(right[0]))
    assert report.trained.errors.predictions == len(wrong[0]) and report.trained.right.predictions == len(right[0])
    evaluated = load_evaluated(str(classifier.folder), "sequence_classification", "cpu", "float32")
    model, tokenizer = evaluated.model.double(), evaluated.processor
    loss = text_loss(model, tokenizer, *wrong)
    expected = by_hand(model, loss)
    beside = by_hand(model, text_loss(model, tokenizer, *right))
    agrees(report.trained, expected, beside)
    assert report.trained.errors.loss == pytest.approx(loss.item(), rel=1e-6)
    assert report.names == ["embeddings", "block.0", "block.1", "pooler", "head"]
    assert [group.parameters for group in report.groups] == [group.numel for group in layer_groups(model)]
    contrast = np.array(expected["raw"]) / np.array(beside["raw"])
    first = [report.names[place] for place in np.argsort(-contrast)]
    assert report.ranking == first and report.chosen == [name for name in report.names if name in first[:3]]
    printed = capsys.readouterr().out
    assert report.verdict() in printed and f"{len(wrong[0])} of 32 examples are wrong" in printed


def test_scores_of_an_image_classifier_with_batch_norm(pictures, tmp_path):
    report = command(pictures.folder, pictures.data, tmp_path, "--batch_size", 3, "--no-random")
    evaluated = load_evaluated(str(pictures.folder), "image_classification", "cpu", "float32")
    model, processor = evaluated.model.double(), evaluated.processor

    def logits(image):
        return model(processor(images=[image], return_tensors="pt")["pixel_values"].double()).logits

    def loss(images, labels):
        each = [
            functional.cross_entropy(logits(one), torch.tensor([label]))
            for one, label in zip(images, labels, strict=True)
        ]
        return torch.stack(each).mean()

    with torch.no_grad():
        predictions = [int(logits(image).argmax()) for image in pictures.images]
    wrong, right = parted(pictures.images, pictures.labels, predictions)
    assert (report.errors, report.right) == (len(wrong[0]), len(right[0])) and len(set(predictions)) == CLASSES
    counts = [min(wrong[1].count(one), right[1].count(one)) for one in range(CLASSES)]
    assert counts == [right[1].count(one) for one in range(CLASSES)]
    agrees(report.trained, by_hand(model, loss(*wrong)), by_hand(model, loss(*right)))
    assert report.names == ["embeddings", "block.0", "block.1", "head"]


def split_of(place, task="causal_lm", **fields):
    return SuiteSplit("data", "in distribution", source=str(place), task=task, **fields)


def found_of(model, data, task="causal_lm", against=None, fields=(), **settings):
    """What `attribute` finds, and the settings and data that it was given."""
    fields = dict(fields)
    other = None if against is None else split_of(against, task, **fields)
    made = Settings(str(model), split_of(data, task, **fields), other, device="cpu", **settings)
    loaded = Data.load(made)
    return SimpleNamespace(settings=made, data=loaded, found=attribute(loaded.evaluated, loaded, made))


def token_losses(model, examples, masks):
    """The mean over the tokens in masks, each example by itself; and whether each of its tokens is right."""
    losses, right = [], {}
    for index, mask in masks.items():
        logits = model(**examples.inputs([index])).logits[0]
        targets = examples.targets([index])[0]
        right[index] = (logits.argmax(-1) == targets) | (targets == IGNORED)
        if mask[: len(targets)].any():
            chosen = mask[: len(targets)]
            losses.append(functional.cross_entropy(logits[chosen], targets[chosen], reduction="none"))
        assert not mask[len(targets) :].any(), "padding is no prediction"
    return torch.cat(losses).mean(), right


@pytest.mark.parametrize("against", [False, True])
def test_scores_of_a_language_model(language, against):
    other = language.folder / "other.jsonl"
    case = found_of(language.folder, language.data, against=other if against else None, batch_size=4)
    found, examples = case.found, case.data.examples
    source = case.data.against or examples
    model = copy.deepcopy(case.data.evaluated.model).double()
    loss, right = token_losses(model, examples, found.wrong.masks)
    for index, mask in found.wrong.masks.items():
        assert torch.equal(mask[: len(right[index])], ~right[index]), "every wrong token, and no other"
    wrong = by_hand(model, loss)
    assert found.compared.errors.loss == pytest.approx(loss.item(), rel=1e-6)
    loss, right = token_losses(model, source, found.good.masks)
    for index, mask in found.good.masks.items():
        targets = source.targets([index])[0]
        assert not (mask[: len(targets)] & (~right[index] | (targets == IGNORED))).any(), "right tokens only"
    agrees(found.compared, wrong, by_hand(model, loss))
    if against:
        assert sorted(found.wrong.indices) == list(range(len(examples)))
        assert sorted(found.good.indices) == list(range(len(source)))
    else:
        assert sorted([*found.wrong.indices, *found.good.indices]) == list(range(len(examples)))
        assert abs(len(found.wrong.indices) - len(found.good.indices)) <= 1
    assert found.errors + found.right == found.looked_at
    more = {"against": str(other)} if against else {}
    report = report_of(language.folder, language.data, batch_size=4, **more)
    assert report.unit == "token" and report.looked_at == found.looked_at
    assert values(report.trained.errors) == values(found.compared.errors)
    assert report.trained.values("contrast") == found.compared.values("contrast")
    assert ("What is right was taken from" in report.notes[0]) == against


def test_scores_of_a_model_that_writes(language, tmp_path):
    """An error is a text that is not the reference; its loss is the mean over the reference's tokens and its end."""
    evaluated = load_evaluated(str(language.folder), "generation", "cpu", "float32")
    tokenizer, model = evaluated.processor, evaluated.model
    prompts = [f"{word} {number}" for number, word in enumerate(ADJECTIVES * 3)]
    rows, right = [], []
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(3):
            with torch.no_grad():
                token = model(ids).logits[:, -1].argmax(-1, keepdim=True)
            assert token != tokenizer.eos_token_id
            ids = torch.cat([ids, token], 1)
        written = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        right.append(number % 3 == 0)
        rows.append({"prompt": prompt, "reference": written if right[-1] else "no such text"})
    source = write_rows(tmp_path / "rows.jsonl", rows)
    more = ["--task", "generation", "--max_new_tokens", 3, "--no-random"]
    report = command(language.folder, source, tmp_path / "out", *more)
    assert report.unit == "example"
    assert (report.errors, report.right) == (len(prompts) - sum(right), sum(right))
    model.double()

    def loss(some):
        each = []
        for row in some:
            prompt, reference = (tokenizer(row[name])["input_ids"] for name in ("prompt", "reference"))
            reference = [*reference, tokenizer.eos_token_id]
            logits = model(torch.tensor([[*prompt, *reference]])).logits[0, len(prompt) - 1 : -1]
            each.append(functional.cross_entropy(logits, torch.tensor(reference)))
        return torch.stack(each).mean()

    wrong = by_hand(model, loss([row for row, good in zip(rows, right, strict=True) if not good]))
    agrees(report.trained, wrong, by_hand(model, loss([row for row, good in zip(rows, right, strict=True) if good])))


# ---- the samples -----------------------------------------------------------------------------------------------------


def test_right_predictions_are_drawn_to_match_the_classes_of_the_errors(classifier, tmp_path):
    """One in four is wrong: of each class as many right ones as wrong, all of them right, none twice."""
    labels = half_wrong(classifier.predictions, lambda number: number % 4 == 0)
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    drawn = []
    for seed in (0, 1):
        found = found_of(classifier.folder, source, "sequence_classification", seed=seed).found
        wrong = [labels[index] for index in found.wrong.indices]
        good = [labels[index] for index in found.good.indices]
        assert len(wrong) == 8 and len(set(found.good.indices)) == len(good)
        assert all(labels[index] == classifier.predictions[index] for index in found.good.indices)
        rights = [label for label, guess in zip(labels, classifier.predictions, strict=True) if label == guess]
        for one in range(CLASSES):
            assert good.count(one) == min(wrong.count(one), rights.count(one))
        drawn.append(set(found.good.indices))
    assert drawn[0] != drawn[1], "by the seed"


@pytest.mark.parametrize("seed", range(3))
def test_matching_takes_what_there_is(seed):
    chance = np.random.default_rng(seed)
    classes = chance.integers(0, 4, 200).tolist()
    right = chance.permutation(200)[:120].tolist()
    wanted = [0] * 50 + [1] * 3 + [9] * 2
    drawn = matched(right, classes, wanted, seed)
    there = [classes[index] for index in right]
    assert [classes[i] for i in drawn].count(0) == min(50, there.count(0))
    assert [classes[i] for i in drawn].count(1) == 3
    assert len(drawn) == len(set(drawn)) and set(drawn) <= set(right)
    assert len(matched(right, [], [0] * 40, seed)) == 40, "without classes only the number is matched"


def learned(folder, source):
    """A language model that has learned its texts in part: for most tokens right is more frequent than wrong."""
    evaluated = load_evaluated(str(folder), "causal_lm", "cpu", "float32")
    model = evaluated.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    texts = [json.loads(line)["text"][: CONTEXT - 1] for line in source.read_text().splitlines()]
    batch = evaluated.processor(texts, return_tensors="pt", padding=True)
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    for _ in range(40):
        model(**batch, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def kinds(examples, masks):
    """How often each token is the target at the places in the masks, one for each example."""
    chosen = [examples.targets([index])[0][mask[: examples.sizes[index]]] for index, mask in masks.items()]
    return torch.bincount(torch.cat(chosen), minlength=257).double()


def test_as_many_right_tokens_of_each_kind_are_expected_as_were_wrong(language, tmp_path):
    """Each right token of the second half is taken with probability wrong / right of its kind in the first half."""
    saved(learned(language.folder, language.data), byte_tokenizer(CONTEXT), tmp_path)
    taken, expected, variance = (torch.zeros(257, dtype=torch.float64) for _ in range(3))
    for seed in range(4):
        case = found_of(tmp_path, language.data, seed=seed, batch_size=8)
        examples, found = case.data.examples, case.found
        halves = []
        for sample in (found.wrong, found.good):
            right = {}
            for index in sample.indices:
                with torch.no_grad():
                    logits = case.data.evaluated.model(**examples.inputs([index])).logits[0]
                right[index] = logits.argmax(-1) == examples.targets([index])[0]
            halves.append(kinds(examples, right))
        share = (kinds(examples, found.wrong.masks) / halves[0].clamp(min=1e-9)).clamp(max=1)
        taken += kinds(examples, found.good.masks)
        expected += share * halves[1]
        variance += share * (1 - share) * halves[1]
    assert float(expected.sum()) < 0.5 * float(halves[1].sum()) * 4, "else nearly all right tokens would be taken"
    assert abs(float((taken - expected).sum())) < 4 * float(variance.sum()) ** 0.5
    assert ((taken - expected).abs() <= 4 * variance.sqrt() + 1e-6).all(), "of each kind"


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(language, tmp_path_factory):
    """Adapters that do something: their second matrices are not zero."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("adapter")
    base = LlamaForCausalLM.from_pretrained(language.folder)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=False)
    return saved(get_peft_model(base, config), byte_tokenizer(CONTEXT), folder)


def merged(language, adapter):
    base = LlamaForCausalLM.from_pretrained(language.folder, dtype=torch.float64)
    before = {name: value.clone() for name, value in base.named_parameters()}
    whole = PeftModel.from_pretrained(base, adapter).double().merge_and_unload()
    whole.requires_grad_(True)
    return whole, {name: (value - before[name]).detach() for name, value in whole.named_parameters()}


def test_the_gradient_of_adapted_weights_is_that_of_the_merged_ones(language, adapter):
    case = found_of(adapter, language.data, batch_size=4)
    evaluated, examples = case.data.evaluated, case.data.examples
    whole, _ = merged(language, adapter)
    batch = list(range(8))
    targets = examples.targets(batch)
    named = dict(evaluated.model.named_parameters())
    with differentiable(evaluated, case.found.groups) as ready:
        logits, targets, _ = ready.logits(examples, batch)
        functional.cross_entropy(logits.transpose(1, 2), targets).backward()
        found = {plain_name(name): named[name].grad for group in case.found.groups for name in group.weights}
    functional.cross_entropy(whole(**examples.inputs(batch)).logits.transpose(1, 2), targets).backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert float((found[name].double() - gradient).norm() / gradient.norm()) < 1e-6, name


@pytest.mark.parametrize("weights", ["base", "delta"])
def test_scores_of_adapted_weights(language, adapter, weights):
    report = report_of(adapter, language.data, lora_weights=weights, no_random=False)
    case = found_of(adapter, language.data, lora_weights=weights)
    assert values(report.trained.errors) == values(case.found.compared.errors)
    whole, delta = merged(language, adapter)
    loss, _ = token_losses(whole, case.data.examples, case.found.wrong.masks)
    loss.backward()
    base = {name: value.detach() - delta[name] for name, value in whole.named_parameters()}
    measured = base if weights == "base" else delta
    found = values(report.trained.errors)
    for place, group in enumerate(case.found.groups):
        names = [plain_name(name) for name in group.weights]
        gradient = torch.cat([whole.get_parameter(name).grad.flatten() for name in names])
        weight = torch.cat([measured[name].detach().flatten() for name in names])
        relative = float(gradient.norm() / weight.norm()) if weight.any() else 0.0
        assert found["raw"][place] == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert found["relative"][place] == pytest.approx(relative, rel=1e-5)
        assert found["taylor"][place] == pytest.approx(float((weight * gradient).abs().sum()), rel=1e-5)
    adapted = [group.name for group in case.found.groups if group.adapters]
    assert adapted == ["embeddings", "block.0", "block.1"]
    what = "the base weights" if weights == "base" else "the product of the adapters"
    assert f"relative and taylor measure it against {what}." in " ".join(report.notes)
    assert report.random is not None and len(report.random.errors.scores["raw"]) == len(report.groups)


def test_delta_is_refused_where_it_is_not_known(tmp_path, language):
    """Adapters of a parameter that is not a layer's weight, such as those of all experts together."""
    torch.manual_seed(9)
    config = MixtralConfig(
        vocab_size=len(byte_tokenizer(CONTEXT)),
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        max_position_embeddings=CONTEXT,
    )
    saved(MixtralForCausalLM(config), byte_tokenizer(CONTEXT), tmp_path / "base")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    saved(get_peft_model(model, config), byte_tokenizer(CONTEXT), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"delta cannot be used with adapters of a single parameter, \S+experts\."):
        report_of(tmp_path / "adapter", language.data, lora_weights="delta")
    assert report_of(tmp_path / "adapter", language.data, lora_weights="base").names[1] == "block.0"


def test_a_classifier_with_adapters_whose_head_was_saved_with_them(classifier, tmp_path):
    base = BertForSequenceClassification.from_pretrained(classifier.folder)
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    saved(get_peft_model(base, config), byte_tokenizer(CONTEXT), tmp_path / "adapter")
    report = report_of(tmp_path / "adapter", classifier.data)
    assert report.task == "sequence_classification", "as the adapters say"
    evaluated = load_evaluated(str(tmp_path / "adapter"), "sequence_classification", "cpu", "float32")
    model = evaluated.model.double()
    model.requires_grad_(True)
    guesses = predicted(tmp_path / "adapter", TEXTS)
    wrong, _ = parted(TEXTS, classifier.labels, guesses)
    names = [group.weights for group in layer_groups(model)]
    expected = by_hand(model, text_loss(model, evaluated.processor, *wrong), names)
    found = values(report.trained.errors)
    for name in SCORES:
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_an_output_layer_of_its_own_beside_adapters_has_a_random_one_beside_it(tmp_path, language):
    """Saved with the adapters, so that it is no longer the embeddings', which the model of random weights shares."""
    folder = llama(tmp_path / "tied", tie_word_embeddings=True)
    torch.manual_seed(8)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), config)
    saved(model, byte_tokenizer(CONTEXT), tmp_path / "adapter")
    report = report_of(tmp_path / "adapter", language.data, no_random=False)
    assert "head" in report.names and report.random is not None


# ---- what the command can be asked -----------------------------------------------------------------------------------


def test_a_checkpoint_of_a_run_is_diagnosed(tiny, tmp_path):
    words = tiny.words(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=2, scratch_steps=1)
    job.train(load_recipe(None, words))
    source = f"{tiny.folder}/prose.jsonl"
    ours = command(tmp_path / "run" / "checkpoint-2", source, tmp_path / "out", "--no-random", "--max_examples", 3)
    whole = report_of(tmp_path / "run", source, max_examples=3)
    assert ours.task == "causal_lm" and ours.errors > 0
    assert values(ours.trained.errors) == values(whole.trained.errors), "the run ended with it"
    assert ours.random is None and "No random model was made" in " ".join(ours.sentences())


@pytest.mark.parametrize(
    ("score", "rule", "words"),
    [
        ("contrast", {"top": 2}, "the 2 with the largest scores"),
        ("raw", {"top": 1}, "the one with the largest score"),
        ("rms", {"threshold": 0.5}, "scores above mean + 0.5 std"),
        ("relative", {"cumulative": 0.7}, "the fewest whose scores sum to 70 % of all"),
        ("taylor", {"budget": 0.5}, "the largest scores that fit into 50 % of the parameters"),
    ],
)
def test_each_score_ranks_and_each_rule_chooses(classifier, score, rule, words):
    report = report_of(classifier.folder, classifier.data, score=score, **rule)
    scores, sizes = np.array(report.trained.values(score)), [group.parameters for group in report.groups]
    order = np.argsort(-scores)
    assert report.ranked_by == score and report.ranking == [report.names[place] for place in order]
    if "top" in rule:
        chosen = order[: rule["top"]]
    elif "threshold" in rule:
        chosen = np.flatnonzero(scores > scores.mean() + 0.5 * scores.std())
    elif "cumulative" in rule:
        chosen = order[: int(np.argmax(np.cumsum(scores[order]) / scores.sum() >= 0.7)) + 1]
    else:
        chosen, left = [], 0.5 * sum(sizes)
        for place in order:
            if sizes[place] <= left:
                left -= sizes[place]
                chosen.append(place)
    assert report.chosen == [report.names[place] for place in sorted(chosen)]
    assert report.rule == words and 0 < len(report.chosen) < len(report.names)
    assert f"({score} " in report.verdict()


def test_groups_of_ones_own_are_scored(classifier, tmp_path):
    patterns = ["--group", "queries=*.query.*", "--group", "norms=*LayerNorm*"]
    report = command(classifier.folder, classifier.data, tmp_path, "--split", "parts", *patterns)
    assert "queries" in (tmp_path / "report.md").read_text()
    assert {"queries", "norms", "block.0.attention", "block.1.mlp"} <= set(report.names)
    evaluated = load_evaluated(str(classifier.folder), "sequence_classification", "cpu", "float32")
    model = evaluated.model.double()
    wrong, _ = parted(TEXTS, classifier.labels, classifier.predictions)
    names = [[name for name, _ in model.named_parameters() if ".query." in name]]
    expected = by_hand(model, text_loss(model, evaluated.processor, *wrong), names)
    place = report.names.index("queries")
    assert values(report.trained.errors)["raw"][place] == pytest.approx(expected["raw"][0], rel=1e-5)
    assert len(report.random.contrast) == len(report.groups)


def test_what_is_right_can_come_from_elsewhere(classifier):
    """All of it is right, and of each class as much is taken as is wrong in the data."""
    other = classifier.folder / "right.jsonl"
    report = report_of(classifier.folder, classifier.data, against=str(other))
    case = found_of(classifier.folder, classifier.data, "sequence_classification", other)
    labels, there = classifier.labels, classifier.predictions
    wrong = [labels[index] for index in case.found.wrong.indices]
    good = [there[index] for index in case.found.good.indices]
    assert [good.count(one) for one in range(CLASSES)] == [
        min(wrong.count(one), there.count(one)) for one in range(CLASSES)
    ]
    evaluated = load_evaluated(str(classifier.folder), "sequence_classification", "cpu", "float32")
    texts = [TEXTS[index] for index in case.found.good.indices]
    expected = by_hand(evaluated.model.double(), text_loss(evaluated.model, evaluated.processor, texts, good))
    assert [one.value for one in report.trained.right.scores["raw"]] == pytest.approx(expected["raw"], rel=1e-5)


# ---- what is left behind ---------------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def state_of(model):
    """All that a diagnosis could change: tensors, gradients (the objects and their values), modes, flags, chance."""
    numbers = np.random.get_state()
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "chance": (torch.get_rng_state(), random.getstate(), (numbers[1].tolist(), *numbers[2:])),
    }


def same_state(one, other):
    assert one["tensors"].keys() == other["tensors"].keys()
    assert all(torch.equal(value, other["tensors"][name]) for name, value in one["tensors"].items())
    for (first, before), (second, after) in zip(one["gradients"], other["gradients"], strict=True):
        assert first == second and (before is None or torch.equal(before, after))
    assert one["modes"] == other["modes"] and one["flags"] == other["flags"]
    assert torch.equal(one["chance"][0], other["chance"][0]) and one["chance"][1:] == other["chance"][1:]


@pytest.mark.parametrize("kind", ["pictures", "classifier", "language"])
def test_the_model_is_left_exactly_as_it_was(kind, request):
    """In training mode, with BatchNorm or dropout, some weights frozen and some gradients there."""
    fixture = request.getfixturevalue(kind)
    task = {"pictures": "image_classification", "classifier": "sequence_classification"}.get(kind, "causal_lm")
    settings = Settings(str(fixture.folder), split_of(fixture.data, task), device="cpu")
    data, on_disk = Data.load(settings), files(fixture.folder)
    expected = attribute(data.evaluated, data, settings)
    model = data.evaluated.model.train()
    parameters = list(model.parameters())
    parameters[1].requires_grad_(False)
    parameters[2].grad = torch.randn_like(parameters[2])
    before = state_of(model)
    report, found = diagnosed(data, settings)
    assert found.compared == expected.compared, "in evaluation mode, whatever its mode was"
    assert found.compared is not None and report.random is not None
    same_state(before, state_of(model))
    assert on_disk == files(fixture.folder)


def test_the_model_is_left_as_it_was_if_a_pass_fails(classifier):
    settings = Settings(str(classifier.folder), split_of(classifier.data, "sequence_classification"), device="cpu")
    data = Data.load(settings)
    model = data.evaluated.model.train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = state_of(model)

    def fail(*_):
        raise MemoryError("inside")

    hook = model.bert.pooler.dense.register_full_backward_hook(fail)
    with pytest.raises(MemoryError, match="inside"):
        attribute(data.evaluated, data, settings)
    hook.remove()
    same_state(before, state_of(model))


# ---- the model of random weights -------------------------------------------------------------------------------------


def test_the_random_model_is_that_of_its_seed_and_takes_nothing_from_torchs_chance(classifier):
    evaluated = load_evaluated(str(classifier.folder), "sequence_classification", "cpu", "float32")
    before = torch.get_rng_state()
    one, again, other = (untrained(evaluated, "sequence_classification", seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    first = next(one.model.parameters())
    assert torch.equal(first, next(again.model.parameters()))
    assert not torch.equal(first, next(other.model.parameters()))
    assert not torch.equal(first, next(evaluated.model.parameters()))
    assert [group.name for group in layer_groups(one.model)] == [group.name for group in layer_groups(evaluated.model)]
    assert not one.model.training
    reports = [report_of(classifier.folder, classifier.data, seed=seed, no_random=False) for seed in (0, 0, 1)]
    assert reports[0].random == reports[1].random
    assert reports[0].random != reports[2].random
    # It sees the errors of the trained model, whatever it has wrong itself.
    assert reports[0].random.errors.predictions == reports[0].trained.errors.predictions
    wrong, _ = parted(TEXTS, classifier.labels, classifier.predictions)
    expected = by_hand(one.model.double(), text_loss(one.model, evaluated.processor, *wrong))
    assert values(reports[0].random.errors)["raw"] == pytest.approx(expected["raw"], rel=1e-5)


def test_a_diagnosis_can_be_repeated(language):
    one, again, other = (report_of(language.folder, language.data, seed=seed) for seed in (0, 0, 1))
    assert one.trained == again.trained
    assert one.trained != other.trained


# ---- what is unusual, and what is wrong ------------------------------------------------------------------------------


def rows_with(tmp_path, texts, labels):
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_a_model_without_errors_has_nothing_to_learn_from(classifier, tmp_path, capsys):
    report = command(classifier.folder, classifier.folder / "right.jsonl", tmp_path / "out")
    assert report.trained is None and report.errors == 0 and report.right == 32 and not report.chosen
    printed = capsys.readouterr().out
    assert "none of 32 examples" in printed and "nothing to learn from" in printed
    assert "nothing to learn from" in (tmp_path / "out" / "report.md").read_text()


def test_few_errors_are_a_warning_with_the_width_of_the_interval(classifier, tmp_path, capsys):
    labels = half_wrong(classifier.predictions, lambda number: number < 5)
    report = command(classifier.folder, rows_with(tmp_path, TEXTS, labels), tmp_path / "out", "--no-random")
    first = report.trained.contrast[report.names.index(report.ranking[0])]
    printed = capsys.readouterr().out
    (width,) = re.findall(r"Warning: 5 errors are few\. The interval of \S+ is (\S+) wide", printed)
    assert float(width) == pytest.approx(first.high - first.low, rel=0.01)


def test_one_error_has_scores(classifier, tmp_path):
    """A single unit: there is nothing to resample."""
    labels = half_wrong(classifier.predictions, lambda number: number == 0)
    report = command(classifier.folder, rows_with(tmp_path, TEXTS, labels), tmp_path / "out", "--no-random")
    assert report.errors == report.trained.errors.predictions == 1 and report.trained.errors.noise is None
    assert "Warning: 1 error" in " ".join(report.sentences())


def test_a_model_that_is_always_wrong_is_ranked_by_the_raw_score(classifier, tmp_path, capsys):
    labels = half_wrong(classifier.predictions, lambda number: True)
    report = command(classifier.folder, rows_with(tmp_path, TEXTS, labels), tmp_path / "out", "--no-random")
    assert report.right == 0 and report.trained.right is None and not report.trained.contrast
    found = dict(zip(report.names, values(report.trained.errors)["raw"], strict=True))
    assert report.ranked_by == "raw" and report.ranking == sorted(found, key=lambda name: -found[name])
    assert "No prediction is right, so there is no contrast" in capsys.readouterr().out


def test_a_language_model_without_a_right_token_has_no_contrast(language, tmp_path):
    """None of its own predictions is in the text; the model of random weights sees the same tokens."""
    evaluated = load_evaluated(str(language.folder), "causal_lm", "cpu", "float32")
    with torch.no_grad():
        evaluated.model.lm_head.weight[: len(byte_tokenizer(CONTEXT)) - 1].zero_()
        evaluated.model.lm_head.weight[-1].zero_()
        evaluated.model.lm_head.weight[200].normal_(std=9)  # either that token, or the first one
    saved(evaluated.model, byte_tokenizer(CONTEXT), tmp_path)
    report = report_of(tmp_path, language.data, no_random=False)
    assert report.right == 0 and report.errors == report.looked_at and not report.trained.contrast
    assert report.random is not None and report.random.right is None and report.ranked_by == "raw"


def test_one_class_only(classifier, tmp_path):
    report = report_of(classifier.folder, rows_with(tmp_path, TEXTS, [1] * len(TEXTS)))
    assert report.right == classifier.predictions.count(1) > 0
    assert report.errors == len(TEXTS) - report.right


def test_a_text_longer_than_the_context_is_cut(classifier, tmp_path):
    texts = [text + " and more of it" * 9 for text in TEXTS]
    cut = [text[:CONTEXT] for text in texts]
    labels = half_wrong(predicted(classifier.folder, texts))
    one = report_of(classifier.folder, rows_with(tmp_path, texts, labels))
    other = report_of(classifier.folder, rows_with(tmp_path, cut, labels))
    assert one.trained == other.trained and one.errors == other.errors == 21


def test_weights_in_half_precision_are_differentiated_in_float32(classifier, tmp_path):
    model = BertForSequenceClassification.from_pretrained(classifier.folder).to(torch.bfloat16)
    saved(model, byte_tokenizer(CONTEXT), tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    report = report_of(tmp_path / "half", classifier.data)
    evaluated = load_evaluated(str(tmp_path / "half"), "sequence_classification", "cpu", "float32")
    wrong, _ = parted(TEXTS, classifier.labels, predicted(tmp_path / "half", TEXTS))
    expected = by_hand(evaluated.model.double(), text_loss(evaluated.model, evaluated.processor, *wrong))
    assert values(report.trained.errors)["raw"] == pytest.approx(expected["raw"], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_weights_that_are_no_float32_are_refused_in_memory(classifier, dtype):
    settings = Settings(str(classifier.folder), split_of(classifier.data, "sequence_classification"), device="cpu")
    data = Data.load(settings)
    layer = data.evaluated.model.bert.pooler.dense
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    words = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"bert.pooler.dense.weight is of dtype {words}, and gradients are added up"):
        attribute(data.evaluated, data, settings)


def spoilt(classifier, folder, change):
    model = BertForSequenceClassification.from_pretrained(classifier.folder)
    with torch.no_grad():
        change(model)
    return saved(model, byte_tokenizer(CONTEXT), folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_one_line(classifier, tmp_path, capsys, value):
    folder = spoilt(classifier, tmp_path / "m", lambda model: model.bert.pooler.dense.weight.fill_(value))
    words = ["diagnose", "--model", str(folder), "--data", str(classifier.data), "--device", "cpu", "--no-random"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the score of embeddings is nan; a choice needs finite scores" in line
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_one_line(classifier, tmp_path, capsys):
    folder = spoilt(classifier, tmp_path / "m", lambda model: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    words = ["diagnose", "--model", str(folder), "--data", str(classifier.data), "--device", "cpu"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ") and "holds quantised weights, which have no gradients" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "M"], "the following arguments are required: --data"),
        (["--model", "no/such", "--data", "D"], "the task of model 'no/such' cannot be told"),
        (
            ["--model", "no/such", "--data", "D", "--task", "sequence_classification"],
            "model 'no/such' is neither a folder here nor reachable",
        ),
        (["--model", "M", "--data", "none.jsonl"], "dataset file none.jsonl does not exist"),
        (["--model", "M", "--data", "EMPTY"], "is empty"),
        (["--model", "M", "--data", "D", "--text_column", "body"], "has no column 'body'; it has text, label"),
        (["--model", "M", "--data", "D", "--against", "none.jsonl"], "dataset file none.jsonl does not exist"),
        (["--model", "M", "--data", "OUTSIDE"], "has class '3', which the model lacks"),
        (
            ["--model", "M", "--data", "D", "--group", "early=layer.0.*"],
            "group pattern early=layer.0.* matches no parameter. Names are like "
            "bert.embeddings.word_embeddings.weight; the groups are embeddings, block.0, block.1, pooler, head",
        ),
        (["--model", "M", "--data", "D", "--group", "early"], "group 'early' is not of the form NAME=PATTERN"),
        (["--model", "M", "--data", "D", "--group", "a=*.query.*", "--group", "a=*.key.*"], "group 'a' is given twice"),
        (
            ["--model", "M", "--data", "D", "--task", "sequence_clasification"],
            "task 'sequence_clasification' is not accepted (did you mean 'sequence_classification'",
        ),
        (["--model", "M", "--data", "D", "--task", "causal_lm"], "would be random"),
        (
            ["--model", "M", "--data", "D", "--score", "contrats"],
            "score 'contrats' is not accepted (did you mean 'contrast'",
        ),
        (["--model", "M", "--data", "D", "--split", "halves"], "argument --split: invalid choice: 'halves'"),
        (["--model", "M", "--data", "D", "--top", "2", "--budget", "0.1"], "exactly one of top, threshold, cumulative"),
        (["--model", "M", "--data", "D", "--top", "0"], "top must be a whole number of at least 1, got 0"),
        (
            ["--model", "M", "--data", "D", "--no-random", "--top", "99"],
            "top must be at most the number of groups, 5; got 99",
        ),
        (["--model", "M", "--data", "D", "--budget", "18"], "budget must be a share above 0 and up to 1, got 18"),
        (["--model", "M", "--data", "D", "--no-random", "--threshold", "9"], "threshold 9.0 chooses no group; below"),
        (["--model", "M", "--data", "D", "--threshold", "nan"], "threshold must be a finite number"),
        (["--model", "M", "--data", "D", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--model", "M", "--data", "D", "--max_examples", "0"], "max_examples must be at least 1, got 0"),
        (["--model", "M", "--data", "D", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["--model", "M", "--data", "D", "--device", "gpu7"], "device 'gpu7' cannot be used here"),
        (["--model", "M", "--data", "D", "--lora_weights", "delta"], "is for LoRA adapters, and the model has none"),
        (["--model", "M", "--data", "D", "--classes", "a,b"], "names 2 classes and the model has 3 outputs"),
    ],
)
def test_bad_input_is_one_line(words, message, classifier, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    write_rows(tmp_path / "outside.jsonl", [{"text": "a", "label": 3}])
    known = {
        "M": str(classifier.folder),
        "D": str(classifier.data),
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "OUTSIDE": str(tmp_path / "outside.jsonl"),
    }
    given = ["diagnose", *(known.get(word, word) for word in words), "--output_dir", str(tmp_path / "out")]
    assert main(given) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ") and message in printed
    assert not (tmp_path / "out").exists()


def test_settings_in_memory_are_checked_as_those_of_the_command_are(classifier):
    settings = Settings(str(classifier.folder), split_of(classifier.data), lora_weights="both")
    with pytest.raises(InputError, match="lora_weights 'both' is not accepted; base or delta"):
        check(settings)
    assert isinstance(load_evaluated(str(classifier.folder), "sequence_classification", "cpu"), Evaluated)
