"""The commands: help that fits, examples that parse, slips in one line, answers for machines, completion, schema."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import transformers
import yaml

from hf_momentum import launch
from hf_momentum.cli import COMMANDS, console, main
from hf_momentum.commands.answers import answering
from hf_momentum.commands.completion import command_parsers, script
from hf_momentum.errors import InputError
from hf_momentum.training.recipe import find_recipe, shipped_folder
from hf_momentum.training.schema import recipe_schema
from hf_momentum.training.suite_rows import load_suite

PARSERS = command_parsers()
SCRIPT = cache(script)
FIELDS = cache(recipe_schema)


# ---- help -----------------------------------------------------------------------------------------------------------


def test_the_table_names_every_module():
    assert set(COMMANDS) == set(PARSERS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_fits_on_a_screen_and_has_an_example(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert any(line.startswith(f"  hf-momentum {name}") for line in lines)


def test_the_help_of_all_options_has_those_that_a_screen_leaves_out(capsys):
    texts = []
    for flag in ("--help", "--help-all"):
        with suppress(SystemExit):
            main(["repair", flag])
        texts.append(capsys.readouterr().out)
    assert "--text_column" not in texts[0] and "how the data are read" in texts[0]
    assert "--text_column" in texts[1] and "--threshold" in texts[1]


def examples() -> list[tuple[str, str]]:
    found = []
    for name, (_, parser) in PARSERS.items():
        text = (parser.description or "").replace("\\\n", " ")
        found += [(name, line.strip()) for line in text.splitlines() if line.startswith("  hf-momentum ")]
    return found


def test_every_command_has_an_example():
    assert {name for name, _ in examples()} == set(COMMANDS)


@pytest.mark.parametrize(("name", "line"), examples(), ids=[line[14:70] for _, line in examples()])
def test_every_example_parses_and_names_what_is_shipped(name, line):
    words = shlex.split(line.partition(" > ")[0])
    assert words[:2] == ["hf-momentum", name]
    known, overrides = PARSERS[name][1].parse_known_args(words[2:])
    given = vars(known)
    if given.get("config"):
        find_recipe(given["config"])
    if given.get("accelerate_config"):
        launch.find_accelerate_config(given["accelerate_config"])
    if str(given.get("suite") or "").isidentifier():
        load_suite(given["suite"], [entry for entry in given.get("source", []) if "=" in entry], None)
    fields = FIELDS()["properties"]
    for word in overrides:
        assert not word.startswith("--") or word[2:].partition("=")[0] in fields, word


# ---- slips ----------------------------------------------------------------------------------------------------------

SLIPS = [
    (["trian"], "did you mean 'train'"),
    ([], "hf-momentum --help"),
    (["train"], "train needs --config RECIPE"),
    (["train", "--config", "quikstart"], "did you mean 'quickstart'"),
    (["train", "--config", "quickstart", "--optim", "adatmw"], "did you mean 'adatamw'"),
    (["train", "--config", "quickstart", "--num_processes", "2"], "name one with --accelerate_config"),
    (["evaluate", "--model", "x"], "--suite; see hf-momentum evaluate --help"),
    (["evaluate", "--modle", "x", "--model", "x", "--suite", "stdlib"], "did you mean '--model'"),
    (["evaluate", "--model", "x", "--suite", "stdlb"], "did you mean 'stdlib'"),
    (["compare", "--config", "quickstart", "--output_dir", "x"], "--optim; see hf-momentum compare --help"),
    (
        ["compare", "--config", "quickstart", "--optim", "tam", "--trials", "x", "--output_dir", "x"],
        "invalid int value",
    ),
    (["pareto", "--config", "quickstart"], "--output_dir; see hf-momentum pareto --help"),
    (["stream", "--output_dir", "x"], "--config; see hf-momentum stream --help"),
    (["diagnose", "--model", "x"], "--data; see hf-momentum diagnose --help"),
    (["diagnose", "--model", "x", "--data", "y", "--split", "block"], "choose from"),
    (["repair", "--data", "y"], "--model; see hf-momentum repair --help"),
    (["run"], "SCRIPT_OR_MODULE"),
    (["run", "no_such_module"], "neither a file nor a module"),
    (["run", "./no_such.py"], "neither a file nor a module"),
    (["train", "--confg", "quickstart"], "did you mean 'config'"),
    (["schema", "--out", "/dev/null/x.json"], "name another place"),
    (["export", "x"], "OUT; see hf-momentum export --help"),
    (["export", "x", "y", "--dtype", "float8"], "float32"),
    (["optimizers", "--jsn"], "did you mean '--json'"),
    (["schema", "--output", "x"], "did you mean '--out'"),
    (["completion", "tcsh"], "bash"),
    (["doctor", "--recipe", "x"], "unknown argument '--recipe'"),
    (["init", "--model", "x"], "init needs --data"),
    (["init", "--data", "x.csv", "--out", "x.json"], "must end in .yaml"),
    (["init", "--data", "no_such.csv"], "no_such.csv does not exist"),
    (["init", "--data", "x.csv", "--optim", "adatmw"], "did you mean 'adatamw'"),
    (["init", "--data", "x.csv", "--lora", "--full"], "not allowed with"),
]


@pytest.mark.parametrize(("words", "step"), SLIPS, ids=[" ".join(words)[:60] for words, _ in SLIPS])
def test_a_slip_is_one_line_with_the_next_step(words, step, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.err.startswith("error: ") and step in shown.err
    assert not list(tmp_path.iterdir())


def test_a_launcher_file_that_is_no_yaml_is_one_line(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("a: [1, 2\nb: {")
    assert main(["train", "--config", "quickstart", "--accelerate_config", str(tmp_path / "mine.yaml")]) == 2
    assert "is not a file for accelerate launch" in capsys.readouterr().err


def _interrupted(words):
    raise KeyboardInterrupt


def test_an_interrupt_is_one_line_and_130(monkeypatch, capsys):
    monkeypatch.setattr("hf_momentum.commands.optimizers.main", _interrupted)
    assert main(["optimizers"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert main(["optimizers", "--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {"error": "interrupted", "exit": 130}


def test_a_reader_that_goes_away_is_no_traceback(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr("sys.argv", ["hf-momentum", "optimizers"])
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        with pytest.raises(SystemExit) as end:
            console()
    assert end.value.code == 141


def test_a_pipe_that_broke_elsewhere_is_not_hidden(monkeypatch):
    monkeypatch.setattr("sys.argv", ["hf-momentum", "optimizers"])
    monkeypatch.setattr("hf_momentum.commands.optimizers.main", lambda words: (_ for _ in ()).throw(BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        console()


def test_every_command_has_a_slip_in_the_list_above():
    assert {words[0] for words, _ in SLIPS if words} >= set(COMMANDS) - {"push"}


# ---- answers for machines -------------------------------------------------------------------------------------------


def test_every_command_with_a_result_speaks_json():
    silent = {"run", "schema", "completion"}  # another program's, and texts for other programs
    for name, (_, parser) in PARSERS.items():
        assert ("--json" in parser._option_string_actions) == (name not in silent), name


def test_an_error_under_json_is_one_object_on_standard_output(capsys):
    assert main(["train", "--config", "quikstart", "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["exit"] == 2
    assert "did you mean 'quickstart'" in json.loads(shown.out)["error"]
    assert shown.err == ""


def test_whatever_prints_meanwhile_goes_to_standard_error(capfd):
    with answering("export", True) as answer:
        print("from Python")
        os.write(1, b"from a library\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        assert answer.give(["", "  done"], 3, folder=Path("out").name, loss=float("inf")) == 3
    shown = capfd.readouterr()
    assert json.loads(shown.out) == {"command": "export", "exit": 3, "summary": ["done"], "folder": "out", "loss": None}
    for line in ("from Python", "from a library", "from a child"):
        assert line in shown.err


def test_an_error_leaves_standard_output_as_it_was(capfd):
    with pytest.raises(InputError), answering("export", True):
        raise InputError("no")
    print("afterwards")
    assert capfd.readouterr().out == "afterwards\n"


def test_optimizers_are_listed_for_machines_with_their_arguments(capsys):
    assert main(["optimizers", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    tam = next(entry for entry in answer["optimizers"] if entry["name"] == "tam")
    assert tam["arguments"]["gamma"] == "float = 0.9"


# ---- completion -----------------------------------------------------------------------------------------------------

_ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
function=$(complete -p hf-momentum | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function" hf-momentum "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "hf-momentum"
    path.write_text(SCRIPT("bash"))
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["tra"], ["train"]),
        (["train", "--config", "quickstart_f"], ["quickstart_full"]),
        (["train", "--optim", "adat"], ["adatam", "adatamw"]),
        (["train", "--learning_ra"], ["--learning_rate"]),
        (["train", "--accelerate_config", "zero3"], ["zero3", "zero3_offload"]),
        (["evaluate", "--suite", "stdl"], ["stdlib"]),
        (["init", "--optim", "vrm"], ["vrmomentum"]),
        (["repair", "--text_c"], ["--text_column"]),
    ],
)
def test_bash_completes(typed, offered, bash_script, tmp_path):
    words = ["bash", "-c", _ASK, "ask", str(bash_script), "hf-momentum", *typed]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.split() == offered, found.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_have_the_same_words(shell):
    text = script(shell)
    for word in ("vrmomentum", "learning_rate", "quickstart_full", "zero3_offload", "diagnose"):
        assert word in text


# ---- schema ---------------------------------------------------------------------------------------------------------

SCHEMA = Path(__file__).parent.parent / "recipes" / "recipe.schema.json"


class _AsEditorsRead(yaml.SafeLoader):
    """YAML 1.2: `no` is a word, and 5e-5 is a number."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


_AsEditorsRead.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false"), list("tf"))
_AsEditorsRead.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("null|~|$"), ["n", "~", ""])
_AsEditorsRead.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))
_AsEditorsRead.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(FIELDS())


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(FIELDS())


@pytest.mark.parametrize("path", sorted(shipped_folder("recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_fits_the_schema(path):
    validator().validate(yaml.load(path.read_text(), Loader=_AsEditorsRead))


@pytest.mark.parametrize(
    "mistake",
    [
        {"optim": "adatmw"},
        {"learning_rat": 0.1},
        {"lora_r": "eight"},
        {"lora_r": 8.5},
        {"lora": "maybe"},
        {"learning_rate": "fast"},
        {"learning_rate": None},
        {"task": "classification"},
        {"packing": True},
        {"task": "chat", "beta": 0.1},
        {"in_distribution": {"test": "x.csv"}},
    ],
    ids=str,
)
def test_a_mistake_does_not_fit_the_schema(mistake):
    recipe = yaml.load(find_recipe("quickstart").read_text(), Loader=_AsEditorsRead)
    validator().validate(recipe)
    with pytest.raises(jsonschema.ValidationError):
        validator().validate({**recipe, **mistake})


def test_fields_of_trl_fit_where_trl_trains():
    validator().validate({"task": "chat", "packing": True, "max_length": 512})
    validator().validate({"task": "preference", "beta": 0.1, "optim": "tam"})


def test_the_shipped_schema_is_what_the_command_writes(capsys):
    shipped = json.loads(SCHEMA.read_text(encoding="utf-8"))
    if not shipped["$comment"].endswith(f" {transformers.__version__}"):
        pytest.skip("the shipped schema was written with another transformers, whose fields differ")
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == shipped, "run: hf-momentum schema --out recipes/recipe.schema.json"
