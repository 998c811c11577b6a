"""An optimizer of one's own is known wherever ours are: `--optim`, the command line, loops; and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from hf_momentum import InputError, OptimizerSpec, create_optimizer, register
from hf_momentum.evaluation import Report
from hf_momentum.integrations import OPTIMIZERS, registry, transformers_hook
from hf_momentum.training import job, load_recipe
from hf_momentum.training.card import model_card, papers

ROOT = Path(__file__).parent.parent
FILES = ROOT / "docs" / "files"


class Plain(torch.optim.SGD):
    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.5):
        super().__init__(params, lr, weight_decay=weight_decay, momentum=momentum)


class NoDecay(torch.optim.SGD):
    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr)


class NoDefault(torch.optim.SGD):
    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, lr, weight_decay=weight_decay)


class NoType(torch.optim.SGD):
    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0, momentum=0.5):
        super().__init__(params, lr, weight_decay=weight_decay, momentum=momentum)


def spec(name="plain", cls=Plain, adam_arguments=False):
    return OptimizerSpec(name, cls, "Plain SGD.", "nowhere", adam_arguments)


@pytest.fixture
def forgotten():
    """Whatever a test registers is gone after it."""
    names, handlers = list(OPTIMIZERS), trainer_optimizer._OPTIMIZER_HANDLERS
    yield
    for name in set(OPTIMIZERS) - set(names):
        del registry._TABLE[name]
        handlers.pop(name, None)
        member = OptimizerNames._value2member_map_.pop(name)
        OptimizerNames._member_map_.pop(member.name)
        OptimizerNames._member_names_.remove(member.name)


def test_a_registered_name_is_known_everywhere(forgotten, tmp_path, capsys):
    assert register(spec()) is OPTIMIZERS["plain"]
    assert type(create_optimizer("plain", torch.nn.Linear(2, 2), lr=0.1)) is Plain
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), optim="plain", optim_args="momentum=0.25", learning_rate=0.1, use_cpu=True
    )
    cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls is Plain and kwargs == {"lr": 0.1, "momentum": 0.25}
    with pytest.raises(InputError, match="no argument 'gamma'"):
        create_optimizer("plain", torch.nn.Linear(2, 2), lr=0.1, gamma=0.5)
    with pytest.raises(InputError, match=r"'plain' is there already \(tests.test_registration.Plain\)"):
        register(spec())


def test_a_recipe_trains_with_it_and_its_card_names_its_source_and_no_paper_of_ours(forgotten, tiny, tmp_path):
    register(spec())
    outcome = job.train(load_recipe(None, tiny.words(tmp_path, optim="plain", optim_args="momentum=0.25")))
    card = (tmp_path / "README.md").read_text()
    assert "Trained with **Plain** (nowhere) by hf-momentum. Plain SGD." in card
    assert "The method is that of" not in card and "bibtex" not in card
    assert outcome.report.facts["optimizer"].startswith("`plain`: ")


def test_the_card_gives_its_method_to_no_paper_that_only_came_besides(forgotten):
    register(spec())
    card = model_card(Report("a", "byte", [], [], {}, "aux_loss: l2", "c"), None, False, "plain", [])
    assert "Besides: [Careful with that Scalpel" in card and "The method is that of" not in card
    assert [paper.arxiv for paper in papers("tam", {})] == ["2412.18790"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (spec("tam"), r"'tam' is there already \(hf_momentum.optim.tam.TAM\); take another name"),
        (spec("adamw_torch"), "transformers has an optimizer 'adamw_torch' of its own; take another name"),
        (spec("My Optimizer"), "'My Optimizer': write small letters, digits and _, as in 'my_optimizer'"),
        (spec(cls=torch.nn.Linear), "cls must be a subclass of torch.optim.Optimizer, got .*Linear"),
        (spec(cls=NoDecay), "NoDecay has no argument 'weight_decay'; every Trainer sets it"),
        (spec(cls=NoDefault), "argument 'lr' of NoDefault needs a type and a default"),
        (spec(cls=NoType), "argument 'momentum' of NoType needs a type and a default"),
        (spec(adam_arguments=True), "adam_arguments is true, but Plain has neither betas nor beta2"),
    ],
)
def test_what_cannot_be_registered_is_refused_and_leaves_nothing(given, message):
    before = dict(OPTIMIZERS)
    with pytest.raises(InputError, match=message):
        register(given)
    assert dict(OPTIMIZERS) == before


def test_a_name_that_transformers_has_is_never_taken_from_it(forgotten):
    """As if transformers, loaded after the registration, had the name itself."""
    registry.add(spec("sgd"))
    theirs = trainer_optimizer._OPTIMIZER_HANDLERS["sgd"]
    with pytest.raises(transformers_hook.HookError, match="'sgd': it has one of its own"):
        transformers_hook.add_names(transformers.training_args)
    transformers_hook.add_handlers(trainer_optimizer)
    assert trainer_optimizer._OPTIMIZER_HANDLERS["sgd"] is theirs
    del registry._TABLE["sgd"]


def installed(folder: Path, entries: dict[str, str]) -> dict[str, str]:
    """The environment of a process for which a distribution with these entry points is installed in `folder`."""
    info = folder / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    lines = "".join(f"{name} = {module}\n" for name, module in entries.items())
    (info / "entry_points.txt").write_text(f"[hf_momentum.optimizers]\n{lines}")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, FILES, ROOT)))}


def test_the_command_line_finds_an_installed_optimizer_and_survives_a_broken_one(tmp_path):
    environment = installed(tmp_path, {"broken": "no_such_module", "signum": "my_optimizer"})
    command = [sys.executable, "-m", "hf_momentum", "optimizers"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "signum" in done.stdout and "SGD by the sign of the momentum." in done.stdout
    assert "the optimizers of 'no_such_module' (entry point 'broken') are missing" in done.stderr


FIRST = """
import sys, my_optimizer, hf_momentum
assert hf_momentum.OPTIMIZERS["signum"].cls is my_optimizer.Signum
assert "transformers" not in sys.modules
from transformers import TrainingArguments
print(TrainingArguments(output_dir="x", optim="signum", use_cpu=True).optim.value)
"""


def test_importing_the_optimizer_first_and_transformers_last_registers_it_too(tmp_path):
    environment = installed(tmp_path, {"signum": "my_optimizer"})
    done = subprocess.run([sys.executable, "-c", FIRST], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "signum" and "RuntimeWarning" not in done.stderr, done.stderr


def test_the_file_to_copy_passes_its_own_tests():
    """The optimizer of docs/adding_an_optimizer.md with its test, run as its reader would run them."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (FILES, ROOT)))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(FILES),
    ]
    command += ["--doctest-modules", str(FILES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=FILES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "10 passed" in done.stdout, done.stdout[-500:]
