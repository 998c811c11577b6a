"""Shared by the programs of this folder: data, models, the training loop, tuning, and records of what was run.

A run is wholly described by a `Setting`. Its result is kept in a file of JSON lines under a digest of the setting, so a
program that was stopped repeats only the runs that had not finished. Seeds of the tuning are not seeds of the figures.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_momentum import InputError, MomentumSchedule
from hf_momentum.evaluation.tuning import at_the_edge, best, proposals
from hf_momentum.optim import AHBSGD, TAM, AdaTAMW, MomentumOptimizer, VRAdam

ROOT = Path(__file__).parent.parent.parent
TUNING_SEED = 1000  # the first seed of the tuning; those of the figures begin at 0
RATIO = 2.0  # between neighbours of a learning-rate grid
WARM_UP = 0.05  # of all steps
VERSION = 1  # of what a setting means; another one makes every record stale

METHODS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "tam": TAM,
    "ahb": AHBSGD,
    "adamw": torch.optim.AdamW,
    "adatamw": AdaTAMW,
    "vradam": VRAdam,
}


# ---- what is run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """All that a run depends on.

    Attributes:
        task: `digits` or `cifar10`.
        model: `cnn`, `mlp`, `resnet` or `resnet18`.
        method: a key of METHODS.
        options: keyword arguments of the optimizer beside lr.
        lr: the peak of the schedule: linear over the first WARM_UP of the steps, then a cosine to 0.
        root: None, or c for the rate c sqrt(lr(t)) in the place of lr(t).
        law: None, or the law of a MomentumSchedule.
        clip: None, or the largest norm of the gradient.
        every: None, or after how many steps accuracy is measured on the way.
    """

    task: str
    model: str
    method: str
    lr: float
    steps: int
    batch: int
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    root: float | None = None
    law: str | None = None
    clip: float | None = None
    every: int | None = None


@dataclass(frozen=True)
class Size:
    """How large a program is run: what is trained, and with how many seeds and learning rates."""

    name: str
    task: str
    model: str
    steps: int
    batch: int
    large_batch: int
    large_steps: int
    tuning_seeds: int
    seeds: int
    trials: int
    most: int
    every: int

    @property
    def words(self) -> str:
        """What is trained, for how long."""
        return f"{self.task}, {self.model}, {self.steps} steps of {self.batch}"

    def setting(self, method: str, lr: float, **others: Any) -> Setting:
        """A setting of this size; `others` are further fields, or options of the optimizer."""
        fields = Setting.__dataclass_fields__
        options = {name: value for name, value in others.items() if name not in fields}
        given = {name: value for name, value in others.items() if name in fields}
        common = {"task": self.task, "model": self.model, "steps": self.steps, "batch": self.batch}
        return Setting(**(common | {"method": method, "lr": lr, "options": options} | given))


SIZES = {
    "small": Size("small", "digits", "cnn", 400, 32, 600, 400, 4, 20, 7, 14, 8),
    "gpu": Size("gpu", "cifar10", "resnet18", 6_000, 128, 4096, 1_500, 2, 5, 7, 14, 100),
}


# ---- data -----------------------------------------------------------------------------------------------------------

Examples = tuple[Tensor, Tensor]
"""Images `[n, channels, height, width]` with values in [0, 1], and their labels `[n]`."""


@dataclass(frozen=True)
class Data:
    """Three parts of one distribution, and shifted sets by name."""

    train: Examples
    validation: Examples
    test: Examples
    shifted: Mapping[str, Examples]


SHIFTS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": lambda x, g: (x + 0.25 * torch.randn(x.shape, generator=g)).clamp(0, 1),
    "blur": lambda x, g: functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1),
    "rotation": lambda x, g: rotated(x, 20.0),
    "contrast": lambda x, g: 0.4 * x + 0.6 * x.mean((1, 2, 3), keepdim=True),
}
"""Corruptions of the test images. Strengths were fixed before any run."""


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images turned about their middle; what comes in from outside is 0.

    Example:
        >>> corner = torch.zeros(1, 1, 2, 2)
        >>> corner[0, 0, 0, 0] = 1
        >>> rotated(corner, 90.0).round().flatten().tolist()
        [0.0, 0.0, 1.0, 0.0]
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], dtype=images.dtype).expand(len(images), 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def parts(known: Examples, sizes: Sequence[int], generator: torch.Generator) -> list[Examples]:
    """Disjoint parts of so many examples, drawn at random."""
    order = torch.randperm(len(known[1]), generator=generator)[: sum(sizes)]
    return [(known[0][part], known[1][part]) for part in order.split(list(sizes))]


def corrupted(test: Examples, generator: torch.Generator) -> dict[str, Examples]:
    """The test images under each of SHIFTS."""
    return {name: (shift(test[0], generator), test[1]) for name, shift in SHIFTS.items()}


def digits(seed: int) -> Data:
    """scikit-learn's 1797 digits of 8 x 8 pixels. They lie writer by writer: the last 600 are shifted, `writers`."""
    images, labels = digit_images()
    generator = torch.Generator().manual_seed(seed)
    train, validation, test = parts((images[:1197], labels[:1197]), (600, 250, 347), generator)
    writers = {"writers": (images[1197:], labels[1197:])}
    return Data(train, validation, test, writers | corrupted(test, generator))


@cache
def digit_images() -> Examples:
    """All of scikit-learn's digits, in their order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("task digits needs scikit-learn, which is not installed: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def cifar10(seed: int) -> Data:
    """CIFAR-10 from the Hub: 45000 for training and 5000 for validation, by seed; its own 10000 for the test."""
    train, test = hub_images("uoft-cs/cifar10", "train"), hub_images("uoft-cs/cifar10", "test")
    tenth = len(train[1]) // 10
    generator = torch.Generator().manual_seed(seed)
    kept, validation = parts(train, (9 * tenth, tenth), generator)
    return Data(kept, validation, test, corrupted(test, generator))


@cache
def hub_images(name: str, part: str) -> Examples:
    """A dataset of the Hub with columns `img` and `label`."""
    import numpy
    from datasets import load_dataset

    rows = load_dataset(name, split=part)
    images = numpy.stack([numpy.asarray(image.convert("RGB")) for image in rows["img"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.tensor(rows["label"])


TASKS: Mapping[str, Callable[[int], Data]] = {"digits": digits, "cifar10": cifar10}


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of natural images, each mirrored with probability 1/2, all moved by the same few pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
    down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    padded = functional.pad(torch.where(mirrored, images.flip(3), images), (4, 4, 4, 4))
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]


# ---- models ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions with batch normalisation and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.way = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        around = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.around = nn.Identity() if same else nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        """Their sum."""
        return functional.relu(self.way(x) + self.around(x))


def resnet18(channels: int = 3, classes: int = 10, width: int = 64) -> nn.Module:
    """ResNet-18 for images of 32 x 32 pixels: no pooling at the start."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def cnn() -> nn.Module:
    """Two convolutions and two linear layers for digits: 18 thousand weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 10)),
    )


def mlp() -> nn.Module:
    """Two hidden layers for digits: 9 thousand weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Enlarged(nn.Module):
    """A classifier of transformers for small images, which it sees as `enlarged` makes them; gives logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Its logits."""
        logits: Tensor = self.model(pixel_values=enlarged(x)).logits
        return logits


def enlarged(images: Tensor) -> Tensor:
    """Images as 32 x 32 pixels, bilinear.

    Example:
        >>> enlarged(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 32, 32])
    """
    return functional.interpolate(images, (32, 32), mode="bilinear", align_corners=False)


def resnet() -> nn.Module:
    """The ResNet of transformers for digits, four stages of two basic layers: 144 thousand weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=10,
    )
    return Enlarged(ResNetForImageClassification(config))


MODELS: Mapping[str, Callable[[], nn.Module]] = {"cnn": cnn, "mlp": mlp, "resnet": resnet, "resnet18": resnet18}


# ---- a run ----------------------------------------------------------------------------------------------------------


def shape(step: int, steps: int) -> float:
    """The schedule before step `step` from 0, as a share of its peak: linear warm-up, then a cosine to 0.

    Example:
        >>> [round(shape(step, 100), 3) for step in (0, 4, 5, 52, 99)]
        [0.2, 1.0, 1.0, 0.508, 0.0]
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def rate(setting: Setting, step: int) -> float:
    """The learning rate of a step."""
    lr = setting.lr * shape(step, setting.steps)
    return lr if setting.root is None else setting.root * math.sqrt(lr)


def train(setting: Setting, device: str = "cpu") -> dict[str, Any]:
    """One run from scratch: scores at the end of it, the optimizer's inner quantities, accuracy on the way."""
    return fitted(setting, device)[1]


def fitted(setting: Setting, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The same, with the trained network. Runs of one seed have the same first weights and the same batches.

    A run whose loss is no longer finite counts as a model that guesses: accuracy 1 / classes, loss log(classes).
    """
    data = _data(setting.task, setting.seed)
    torch.manual_seed(setting.seed)
    net = MODELS[setting.model]().to(device)
    generator = torch.Generator().manual_seed(setting.seed + 1)
    optimizer = METHODS[setting.method](net.parameters(), lr=setting.lr, **setting.options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(setting, step) / setting.lr)
    if setting.law is not None:
        MomentumSchedule(optimizer, setting.law, total_steps=setting.steps)
    images, labels = (part.to(device) for part in data.train)
    seen: dict[str, list[float]] = {}
    curve, order = [], torch.empty(0, dtype=torch.long)
    diverged = False
    for step in range(setting.steps):
        if len(order) < min(setting.batch, len(labels)):
            order = torch.randperm(len(labels), generator=generator)
        batch, order = order[: setting.batch].to(device), order[setting.batch :]
        inputs = images[batch] if setting.task == "digits" else augmented(images[batch], generator)
        loss = functional.cross_entropy(net(inputs), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        if setting.clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), setting.clip)
        optimizer.step()
        if not math.isfinite(loss.item()):
            diverged = True
            break
        if isinstance(optimizer, MomentumOptimizer):
            inner = {name: value.item() for name, value in optimizer.dynamics().items()}
            for name, value in {**inner, "lr": rate(setting, step)}.items():
                seen.setdefault(name, []).append(value)
        scheduler.step()
        if setting.every is not None and (step + 1) % setting.every == 0:
            found = [scores(net, examples, device)["accuracy"] for examples in (data.validation, data.test)]
            curve.append([step + 1, *found])
    final = {name: scores(net, part, device) for name, part in _parts(data).items()}
    if diverged or not all(math.isfinite(found["loss"]) for found in final.values()):
        classes = int(data.train[1].max()) + 1
        final = {name: {"loss": math.log(classes), "accuracy": 1 / classes} for name in final}
        diverged = True
    # Averages over the steps, where there is a value; that of the gain is weighted with lr, so that a matched run walks
    # as far. AHB's beta can be 0.999 for one step, which is no gain of 1000: there the average of beta gives the gain.
    inner = {name: _mean(values) for name, values in seen.items() if name != "lr"}
    gain = None
    if "beta" in seen:
        gain = 1 / (1 - inner["beta"])
    elif "effective_lr" in seen:
        gain = sum(seen["effective_lr"]) / sum(seen["lr"])
    return net, {"diverged": diverged, "scores": final, "dynamics": inner, "gain": gain, "curve": curve}


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


@cache
def _data(task: str, seed: int) -> Data:
    return TASKS[task](seed)


def _parts(data: Data) -> dict[str, Examples]:
    return {"validation": data.validation, "test": data.test, **data.shifted}


@torch.no_grad()
def scores(net: nn.Module, examples: Examples, device: str = "cpu") -> dict[str, float]:
    """Mean loss in nats and accuracy."""
    net.eval()
    loss, right = 0.0, 0
    for images, labels in zip(examples[0].split(1024), examples[1].split(1024), strict=True):
        logits, labels = net(images.to(device)), labels.to(device)
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
    net.train()
    return {"loss": loss / len(examples[1]), "accuracy": right / len(examples[1])}


# ---- figures of a run -----------------------------------------------------------------------------------------------


def validation_loss(result: Mapping[str, Any]) -> float:
    """What learning rates are selected by, unless a program says otherwise."""
    return result["scores"]["validation"]["loss"]


def in_distribution(result: Mapping[str, Any], metric: str) -> float:
    """The test set's loss in nats, or its accuracy in percent."""
    return result["scores"]["test"][metric] * (100 if metric == "accuracy" else 1)


def under_shift(result: Mapping[str, Any], metric: str) -> float:
    """The mean over all shifted sets."""
    found = [value[metric] for name, value in result["scores"].items() if name not in ("validation", "test")]
    return statistics.fmean(found) * (100 if metric == "accuracy" else 1)


# ---- records --------------------------------------------------------------------------------------------------------


class Records:
    """Results by a digest of what they are of, in a file of JSON lines that is read at the start and appended to.

    A last line that a killed program left torn is passed over. Two programs must not write one file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs.jsonl"
        >>> Records(path).kept({"lr": 0.1}, lambda: {"loss": 1.0}), Records(path).kept({"lr": 0.1}, lambda: {})
        ({'loss': 1.0}, {'loss': 1.0})
    """

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.found[entry["key"]] = entry["result"]

    def kept(self, what: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `what`, computed unless it is there."""
        text = json.dumps({"version": VERSION, **what}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self.found:
            result = compute()
            line = json.dumps({"key": key, "what": what, "result": result})
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    torn = file.read(1) != b"\n"
                    file.write(b"\n" if torn else b"")
                file.write(line.encode() + b"\n")
            self.found[key] = result
        return self.found[key]


# ---- what a program works in ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """A learning rate selected on validation data, and the score of every one that was tried."""

    lr: float
    grid: Mapping[float, float]
    interior: bool


class Lab:
    """A size, the records, and the two things programs do: run a setting for all seeds, and tune several equally."""

    def __init__(self, size: Size, records: Records, device: str = "cpu", say: Callable[[str], None] = print) -> None:
        self.size, self.records, self.device, self.say = size, records, device, say

    def fewer(self, seeds: int) -> "Lab":
        """The same with at most so many seeds of the figures, for programs with many settings or long runs."""
        size = replace(self.size, seeds=min(seeds, self.size.seeds))
        return Lab(size, self.records, self.device, self.say)

    def result(self, setting: Setting) -> dict[str, Any]:
        """One run, or what an earlier one left."""
        return self.records.kept(asdict(setting), lambda: train(setting, self.device))

    def results(self, setting: Setting) -> list[dict[str, Any]]:
        """The runs of all seeds of the figures, in the order of the seeds."""
        return [self.result(replace(setting, seed=seed)) for seed in range(self.size.seeds)]

    def tuning_results(self, setting: Setting) -> list[dict[str, Any]]:
        """The runs of all seeds of the tuning."""
        seeds = range(TUNING_SEED, TUNING_SEED + self.size.tuning_seeds)
        return [self.result(replace(setting, seed=seed)) for seed in seeds]

    def tuned(
        self,
        candidates: Mapping[str, Setting],
        score: Callable[[Mapping[str, Any]], float] = validation_loss,
    ) -> dict[str, Tuned]:
        """The best learning rate of each candidate by the mean score over the tuning seeds, with equal budgets.

        A candidate's own `lr` is the middle of its first grid.
        """
        starts = {name: setting.lr for name, setting in candidates.items()}
        grids: dict[str, dict[float, float]] = {name: {} for name in candidates}
        while any(wanted := proposals(grids, starts, RATIO, self.size.trials, self.size.most).values()):
            for name, lrs in zip(candidates, wanted, strict=True):
                for lr in lrs:
                    found = self.tuning_results(replace(candidates[name], lr=lr))
                    grids[name][lr] = statistics.fmean(map(score, found))
                    self.say(f"tuning {name}: lr {lr:g}, {grids[name][lr]:.4f}")
        edge = at_the_edge(grids)
        return {name: Tuned(best(grid) or starts[name], grid, name not in edge) for name, grid in grids.items()}

    def mean_gain(self, setting: Setting) -> float:
        """Effective over nominal learning rate, averaged over the runs of the tuning seeds."""
        return statistics.fmean(result["gain"] for result in self.tuning_results(setting))


def tuning_facts(tuned: Mapping[str, Tuned]) -> list[str]:
    """One line per candidate: what was selected from what.

    Example:
        >>> tuning_facts({"SGD": Tuned(0.2, {0.1: 2.0, 0.2: 1.0, 0.4: 3.0}, True)})
        ['SGD: learning rate 0.2 of 3 tried between 0.1 and 0.4, the best interior']
    """
    return [
        f"{name}: learning rate {one.lr:g} of {len(one.grid)} tried between {min(one.grid):g} and {max(one.grid):g}, "
        f"the best {'interior' if one.interior else 'AT AN END'}"
        for name, one in tuned.items()
    ]


def arguments(name: str, given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, which is the same for all programs."""
    return parser(name).parse_args(given)


def parser(name: str) -> argparse.ArgumentParser:
    """The same for a program that adds words of its own."""
    found = argparse.ArgumentParser(prog=f"scripts/claims/{name}.py")
    found.add_argument("--size", choices=tuple(SIZES), default="small", help="gpu: CIFAR-10 with ResNet-18")
    found.add_argument("--device", default=None, help="default: cuda where it is, for --size gpu; else cpu")
    found.add_argument("--records", type=Path, default=ROOT / "outputs" / "claims", help="folder of finished runs")
    found.add_argument("--json", type=Path, default=ROOT / "docs" / "claims.json", help="where the rows go")
    return found


def laboratory(name: str, args: argparse.Namespace) -> Lab:
    """The lab of a program's command line; one thread on a CPU, so that figures do not depend on its cores."""
    on_gpu = args.size == "gpu" and torch.cuda.is_available()
    device = args.device or ("cuda" if on_gpu else "cpu")
    if device == "cpu":
        torch.set_num_threads(1)
    records = Records(args.records / f"{name}-{args.size}.jsonl")
    return Lab(SIZES[args.size], records, device, lambda line: print(f"{name}: {line}", flush=True))
