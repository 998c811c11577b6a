"""A recipe file and a command line mean the same, and whatever is wrong with either is one clear line."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_momentum import InputError
from hf_momentum.cli import main
from hf_momentum.training import load_recipe
from hf_momentum.training.recipe import find_recipe, shipped_folder

RECIPES = sorted(shipped_folder("recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_what_it_is(path):
    recipe = load_recipe(str(path), ["--use_cpu", "--bf16", "false"])
    assert recipe.data.in_distribution, "a recipe measures something"
    assert path.read_text().startswith("#"), "a recipe opens with what it is for"


def write(tmp_path, text) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_words_mean_in_a_file_what_they_mean_on_the_command_line(tmp_path):
    text = """
        learning_rate: 5e-5        # plain YAML reads a string here
        eval_strategy: no          # and False here
        lora: yes
        lora_target_modules: [q_proj, v_proj]
        lr_scheduler_kwargs: {min_lr_rate: 0.1}
        lr_scheduler_type: cosine_with_min_lr
        use_cpu: true
        output_dir: out
    """
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.training.learning_rate == 5e-5
    assert recipe.training.eval_strategy == "no"
    assert recipe.peft.lora is True
    assert recipe.peft.lora_target_modules == ["q_proj", "v_proj"]
    assert recipe.training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_the_command_line_wins_and_the_record_repeats_the_run(tmp_path):
    path = write(tmp_path, "optim: tam\nlearning_rate: 0.5\nmax_steps: 7\nuse_cpu: true\noutput_dir: out\n")
    words = ["--learning_rate", "0.25", "--lora_target_modules", "q_proj", "v_proj", "--bf16=false", "--lora"]
    recipe = load_recipe(path, words)
    assert (recipe.training.learning_rate, recipe.training.max_steps) == (0.25, 7)
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again.training.to_dict() == recipe.training.to_dict()
    assert (again.model, again.data, again.peft) == (recipe.model, recipe.data, recipe.peft)
    assert "learning_rate: 0.25" in recipe.to_yaml(), "numbers are written as numbers"


def test_resuming_is_not_part_of_the_record(tmp_path):
    recipe = load_recipe(None, ["--output_dir", "out", "--use_cpu", "--resume_from_checkpoint", "true"])
    assert "resume" not in recipe.to_yaml()


def test_recipes_are_found_by_name():
    assert find_recipe("quickstart") == find_recipe("recipes/quickstart.yaml").resolve() or Path("recipes").is_dir()
    with pytest.raises(InputError, match=r"no recipe 'quickstrat' \(did you mean 'quickstart'"):
        find_recipe("quickstrat")


BAD_RECIPES = [
    ("{", r"is not YAML: .* line 1"),
    ("- a\n- b\n", r"is not a recipe: expected lines of `key: value`, got list"),
    ("just words", "is not a recipe"),
    ("", "is not a recipe"),
    ("learning_rat: 0.1", r"unknown key 'learning_rat' \(did you mean 'learning_rate'"),
    ("lr: 0.1", r"unknown key 'lr' \(did you mean 'learning_rate'\?\)"),
    ("lora_rank: 4", r"unknown key 'lora_rank' \(did you mean"),
    ("optim: tamm", r"'tamm' is not accepted \(did you mean 'tam'.*our own: tam, adatam, adatamw"),
    ("optim: tam\noptim: adatam", "'optim' is given twice"),
    ("optim: tam\noptim_args: gamma=1.0", r"gamma must be a number in \[0, 1\), got 1.0"),
    ("optim: tam\noptim_args: gama=0.9", r"no argument 'gama' \(did you mean 'gamma'"),
    ("optim: tam\nlearning_rate: -0.1", r"lr must be a number in \[0, inf\), got -0.1"),
    ("optim: adamw_torch\nlearning_rate: -0.1", "learning_rate must be at least 0, got -0.1"),
    ("optim: adatamw\nweight_decay: -1", r"weight_decay must be a number in \[0, inf\)"),
    ("optim: adatamw\nadam_beta1: 1.5", r"betas\[0\] must be a number in \[0, 1\), got 1.5"),
    ("learning_rate: fast", "argument --learning_rate.*invalid float value: 'fast'"),
    ("max_steps: 2.5", "invalid int value: '2.5'"),
    ("task: poetry", r"'poetry' is not accepted.*causal_lm, chat, preference, sequence_classification"),
    ("lora_r: 0", "lora_r must be at least 1, got 0"),
    ("block_size: 0", "block_size must be at least 1, got 0"),
    ("scratch_hidden_size: 100", "scratch_hidden_size must be a multiple of 32, got 100"),
    ("output_dir: ~\nlearning_rate: ~", "learning_rate may not be empty"),
]


@pytest.mark.parametrize(("text", "message"), BAD_RECIPES)
def test_a_bad_recipe_is_one_line(text, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        load_recipe(write(tmp_path, text), ["--use_cpu"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "train needs --config"),
        (["train", "--config", "no/such.yaml"], "no recipe 'no/such.yaml'"),
        (["train", "--config", "quickstart", "--learnin_rate", "1"], "did you mean 'learning_rate'"),
        (["train", "--config", "quickstart", "--lr", "1"], "did you mean 'learning_rate'?"),
        (["train", "--config", "quickstart", "--optim", "adatmw"], "did you mean 'adatamw'"),
        (["train", "--config", "quickstart", "--optim_args", "gamma=2"], "gamma must be a number in [0, 1)"),
        (["run", "no_such_script.py"], "neither a file nor a module"),
    ],
)
def test_the_command_prints_one_line_and_exits_with_two(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_help_fits_a_screen_and_has_an_example(capsys):
    for words in (["--help"], ["train", "--help"], ["run", "--help"], ["optimizers", "--help"]):
        try:
            main(words)
        except SystemExit as end:
            assert end.code == 0
        text = capsys.readouterr().out
        assert 3 < len(text.splitlines()) <= 40
        assert "hf-momentum" in text
    assert main(["trian"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unknown command 'trian' (did you mean 'train'")


def test_installed_command_runs():
    command = Path(sys.executable).with_name("hf-momentum")
    result = subprocess.run([command, "optimizers"], capture_output=True, text=True, check=True)
    assert "adatamw" in result.stdout and "gamma: float = 0.9" in result.stdout


def test_the_record_is_plain_yaml():
    recipe = load_recipe("quickstart", ["--use_cpu"])
    assert yaml.safe_load(recipe.to_yaml())["max_steps"] == recipe.training.max_steps
