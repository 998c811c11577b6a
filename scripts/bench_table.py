"""Writes the tables of docs/performance.md from the JSON files that the benchmarks leave in docs/.

    python scripts/bench_table.py          rewrite the page
    python scripts/bench_table.py --check  only say whether it is up to date (exit status 1 if not)

What has not been measured yet stands in the table of steps as a prediction, with the bytes that it follows from.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_optimizers import BASELINES, COMBINE_TARGETS, TARGETS, column
from state_dtype_curves import table as curves_table
from support_table import replaced

DOCS = Path(__file__).parent.parent / "docs"
SOURCES = "docs/performance*.json"

# Bytes that must pass between memory and processor per parameter, in float32: four for each number read or written.
# AdamW reads w, g, m, v and writes w, m, v. SGD has no v. TAM reads m and g once more for their cosine; AdaTAMW too.
# VRAdam reads them for the norm of the new m. AHB-SGD reads g, the previous g and w's displacement for the curvature,
# keeps g, and then makes a step of SGD.
BYTES = {
    "adamw": 28,
    "sgd": 20,
    "tam": 28,
    "adatamw": 36,
    "vradam": 36,
    "ahb_sgd": 36,
    "critical_sgd": 20,
    "critical_adamw": 28,
}
# clip_grad_norm_ reads g for the norm, then reads and writes it.
CLIP_BYTES = 12
# Inside the step the norm costs one more read of g where no pass before the update reads it anyway.
NORM_BYTES = {"critical_sgd": 4, "critical_adamw": 4}

# A surgery reads b and e for its sums; it reads and writes both to project, and reads both and writes e to absorb.
SURGERY_BYTES = {"bloop combine": 24, "bloop surgery": 36}

# Heading, device, shape and table of the columns of the table of steps.
COLUMNS = (
    ("CPU, GPT-2 92M", "cpu", "gpt2", "step"),
    ("CPU, LoRA", "cpu", "lora", "step"),
    ("CPU, clip + step", "cpu", "gpt2", "clip"),
    ("GPU, Llama 1.2B", "cuda", "llama-1b", "step"),
    ("GPU, clip + step", "cuda", "llama-1b", "clip"),
)

# The same without clipping.
PLACES = (
    ("CPU, GPT-2 92M", "cpu", "gpt2"),
    ("CPU, LoRA", "cpu", "lora"),
    ("GPU, Llama 1.2B", "cuda", "llama-1b"),
    ("GPU, LoRA", "cuda", "lora"),
)

# Models of the table of diagnoses.
DIAGNOSED = {
    "tiny": "tiny encoder, {parameters:.1f}M",
    "minilm": "MiniLM, {parameters:.1f}M",
    "quickstart": "quickstart's Llama, {parameters:.1f}M",
}

INT8_BYTES = 1.1  # the aim, with whatever scales need

Results = Mapping[str, Mapping[str, Any]]


def load(docs: Path = DOCS) -> dict[str, dict[str, Any]]:
    """The results that are there, by name: `cpu`, `cuda`, `training_cpu`, `training_cuda`, `diagnosis` and `curves`."""
    files = {
        name: docs / f"performance_{name}.json"
        for name in ("cpu", "cuda", "training_cpu", "training_cuda", "diagnosis")
    }
    files["curves"] = docs / "state_dtype_curves.json"
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def rows_of(results: Results, device: str, shape: str, table: str) -> Mapping[str, Mapping[str, Any]]:
    """The rows of one measured table; none where it was not measured."""
    for found in results.get(device, {}).get("tables", []):
        if (found["shape"], found["table"]) == (shape, table):
            return found["rows"]
    return {}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first `words` columns are text and the others figures.

    Example:
        >>> print(markdown(["a", "b"], [["x", "1"]]))
        | a | b |
        |---|---:|
        | x | 1 |
    """
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * words + "---:|" * (len(header) - words), *lines[1:]])


def ratio_text(line: Mapping[str, Any]) -> str:
    """Median and quartiles, and the aim, met or missed.

    Example:
        >>> ratio_text({"ratio": [1.01, 1.02, 1.04], "target": 1.05, "at_least": False})
        '**1.02** (1.01-1.04), aim 1.05: met'
    """
    low, median, high = line["ratio"]
    text = f"**{median:.2f}** ({low:.2f}-{high:.2f})"
    if "target" in line:
        met = median >= line["target"] if line["at_least"] else round(median, 2) <= line["target"]
        text += f", aim {'at least ' * line['at_least']}{line['target']:.2f}: {'met' if met else 'missed'}"
    return text


def predicted(name: str, table: str) -> str:
    """The ratio of the bytes that must be moved, in words.

    Example:
        >>> predicted("tam", "step"), predicted("ahb_sgd", "clip")
        ('predicted 1.00 (28 of 28 bytes)', 'predicted 0.90 (36 of 40 bytes)')
    """
    ours, theirs = BYTES[name], BYTES[BASELINES.get(name, "adamw")]
    if table == "clip":
        ours, theirs = ours + NORM_BYTES.get(name, 0), BYTES["adamw"] + CLIP_BYTES
    return f"predicted {ours / theirs:.2f} ({ours} of {theirs} bytes)"


def steps(results: Results) -> str:
    """Rule by column: the measured ratio to the baseline, or what the bytes predict."""
    rows = []
    for name in TARGETS:
        cells = [f"`{name}`"]
        for _, device, shape, table in COLUMNS:
            line = rows_of(results, device, shape, table).get(name)
            if line is not None and "ratio" in line:
                cells.append(ratio_text(line))
                continue
            aim = TARGETS[name].get(column(table, device, shape))
            # Adapters fit into the caches, so that bytes of memory say nothing about them.
            text = "not measured" if shape == "lora" else predicted(name, table)
            cells.append(text + (f", aim {aim:.2f}" if aim is not None else ""))
        rows.append(cells)
    return markdown(["rule", *(heading for heading, *_ in COLUMNS)], rows)


def surgery(results: Results) -> str:
    """The passes of a surgery over a step of AdamW, or what the bytes predict."""
    rows = []
    for name, size in SURGERY_BYTES.items():
        cells = [f"`{name}`"]
        for _, device, shape in PLACES:
            line = rows_of(results, device, shape, "surgery").get(name)
            if line is not None and "ratio" in line:
                cells.append(ratio_text(line))
                continue
            aim = COMBINE_TARGETS.get(column("surgery", device, shape)) if name == "bloop combine" else None
            bytes_say = f"predicted {size / BYTES['adamw']:.2f} ({size} of {BYTES['adamw']} bytes)"
            text = "not measured" if shape == "lora" else bytes_say
            cells.append(text + (f", aim {aim:.2f}" if aim is not None else ""))
        rows.append(cells)
    return markdown(["over `adamw`", *(heading for heading, *_ in PLACES)], rows)


def baselines(results: Results) -> str:
    """The rate at which the baselines' bytes pass, and on a GPU, whose name says what it is, their milliseconds."""
    rows = []
    for heading, device, shape, table in COLUMNS:
        found = rows_of(results, device, shape, table)
        for name in ("adamw", "sgd") if table == "step" else ("clip+adamw", "clip"):
            if name in found:
                count = next(t["parameters"] for t in results[device]["tables"] if t["shape"] == shape)
                total = {**BYTES, "clip": CLIP_BYTES, "clip+adamw": BYTES["adamw"] + CLIP_BYTES}[name] * count
                ms = found[name].get("event_ms", found[name]["ms"])
                shown = "" if device == "cpu" else f"{ms[1]:.2f} ({ms[0]:.2f}-{ms[2]:.2f})"
                rows.append([heading, f"`{name}`", f"{total / 1e6 / ms[1]:.0f} GB/s", shown])
    return markdown(["", "baseline", "rate of its bytes", "ms"], rows, 2) if rows else "Not measured yet."


def state(results: Results) -> str:
    """Step time with small state over that with float32 state, and the bytes of a state element."""
    rows = []
    for heading, device, shape in PLACES:
        for name, line in rows_of(results, device, shape, "state").items():
            if "ratio" not in line:
                continue
            size = line["bytes_per_state_element"]
            text = f"{size:.2f}"
            if name.endswith("int8"):
                text += f", aim {INT8_BYTES:.2f}: {'met' if size <= INT8_BYTES else 'missed'}"
            rows.append([heading, f"`{name}`", ratio_text(line), text])
    if not rows:
        return "Not measured yet."
    return markdown(["", "rule and state", "step over float32 state's", "bytes per state element"], rows, 2)


def peers(results: Results) -> str:
    """Other packages' steps over ours or over AdamW's."""
    rows = []
    for device, found in results.items():
        if device not in ("cpu", "cuda"):
            continue
        for table in found["tables"]:
            if table["table"] == "peers":
                shown = {name: line for name, line in table["rows"].items() if " " in name and "ratio" in line}
                for name, line in shown.items():
                    cells = [f"{device.upper()}, {table['shape']}", name, f"`{line['against']}`", ratio_text(line)]
                    rows.append([*cells, f"{line['state_bytes_per_parameter']:.1f}"])
    if not rows:
        return "Not measured yet."
    return markdown(["", "peer", "over", "step time", "state bytes per parameter"], rows, 3)


def memory(results: Results) -> str:
    """Bytes per parameter that each rule keeps, and what a step takes beside them on a GPU."""
    rows = []
    for heading, device, shape in PLACES:
        for kind in ("step", "state"):
            for name, line in rows_of(results, device, shape, kind).items():
                if kind == "state" and "ratio" not in line:
                    continue  # float32 state stands in the table of steps
                extra = line.get("temporary_bytes_per_parameter")
                cells = [heading, f"`{name}`", f"{line['state_bytes_per_parameter']:.2f}"]
                rows.append([*cells, "" if extra is None else f"{extra:.2f}"])
    if not rows:
        return "Not measured yet."
    return markdown(["", "rule", "state bytes per parameter", "temporary bytes per parameter"], rows, 2)


def scaling(results: Results) -> str:
    """Cost per parameter over sizes and per tensor over counts, for each device; relative on a CPU."""
    parts = []
    words = {"parameters": ("ns_per_parameter", "ns per parameter"), "tensors": ("us_per_tensor", "us per tensor")}
    relative = {"parameters": "per parameter, over the smallest's", "tensors": "host time per tensor, over `adamw`'s"}
    for device, found in results.items():
        for axis, points in found.get("scaling", {}).items():
            if not points:
                continue
            key, unit = words[axis]
            names = list(dict.fromkeys(name for point in points for name in point["rows"]))
            rows = []
            for name in names:
                values = [point["rows"][name][key][1] if name in point["rows"] else None for point in points]
                if device == "cpu":
                    whole = [values[0] if axis == "parameters" else point["rows"]["adamw"][key][1] for point in points]
                    values = [x and x / base for x, base in zip(values, whole, strict=True)]
                cells = [f"`{name}`", *("" if x is None else f"{x:.3g}" for x in values)]
                if axis == "tensors":
                    cells.append(_marginal(points, name))
                rows.append(cells)
            header = [
                f"{device.upper()}, {relative[axis] if device == 'cpu' else unit}",
                *(f"{point[axis]:,} {axis}" for point in points),
            ]
            parts.append(markdown([*header, *["each further tensor, us"] * (axis == "tensors")], rows))
    return "\n\n".join(parts) or "Not measured yet."


def _marginal(points: Sequence[Mapping[str, Any]], name: str) -> str:
    """Microseconds of each further tensor between the least and the largest count, without what a step costs anyway."""
    known = [(p["tensors"], p["rows"][name]["us_per_tensor"][1] * p["tensors"]) for p in points if name in p["rows"]]
    if len(known) < 2:
        return ""
    (few, short), (many, long) = known[0], known[-1]
    return f"{(long - short) / (many - few):.3g}"


def training(results: Results) -> str:
    """Whole Trainer steps: ratios of tokens per second, and on a GPU the rate itself."""
    rows = []
    for device in ("cpu", "cuda"):
        found = results.get(f"training_{device}")
        if found is None:
            continue
        for name, line in found["rows"].items():
            cells = [f"{device.upper()}, {found['facts']['parameters'] / 1e6:.0f}M", f"`{name}`"]
            cells.append("" if device == "cpu" else f"{line['tokens_per_second'][1]:,.0f}")
            cells.append(ratio_text(line) if "ratio" in line else "")
            peak = line.get("peak_bytes")
            rows.append([*cells, "" if peak is None else f"{peak / 2**30:.2f} GiB"])
    if not rows:
        return "Not measured yet."
    return markdown(["", "`--optim`", "tokens/s", "over `adamw_torch_fused`", "peak memory"], rows, 2)


def machines(results: Results) -> str:
    """One line for each file of figures: the machine, the versions and how often was measured."""
    lines = []
    for name, found in results.items():
        facts = found.get("facts")
        if facts is None:
            continue
        skipped = ("device", "processor", "foreach", "cpu_kernels")
        rest = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if key not in skipped)
        lines.append(f"- {name.replace('_', ', ')}: {facts['processor']}; {rest}")
    return "\n".join(lines) or "Nothing is measured yet."


def curves(results: Results) -> str:
    """Final losses with small state, and their differences from float32 state's."""
    return curves_table(results["curves"]) if "curves" in results else "Not measured yet."


def diagnosis(results: Results) -> str:
    """What the attribution costs over plain passes, and its peak of memory."""
    found = results.get("diagnosis", {})
    lines = []
    for name, words in DIAGNOSED.items():
        for timed in found.get(name, {}).get("times", []):
            (middle, low, high), whole = timed["attribution over plain passes"], timed["whole diagnosis"][0]
            verdict = "met" if middle <= found["target"] else "missed"
            tokens = timed["micro-batch"] * found[name]["length"]
            lines.append(
                [
                    words.format(parameters=found[name]["parameters"] / 1e6),
                    f"{timed['examples']}",
                    f"{tokens}",
                    f"**{middle:.2f}** ({low:.2f}-{high:.2f}), aim {found['target']:.2f}: {verdict}",
                    f"{whole:.2f}",
                ]
            )
    header = ["model", "examples", "tokens in a micro-batch", "over plain passes", "whole diagnosis, passes"]
    text = [markdown(header, lines, words=1)]
    heavy = [(words, found[name]["memory"]) for name, words in DIAGNOSED.items() if "memory" in found.get(name, {})]
    if heavy:
        counts = [int(count) for count in heavy[0][1]["peak bytes"]]
        header = ["model", "one gradient, MB", *(f"peak, {count} examples, MB" for count in counts)]
        lines = [
            [
                words.partition(",")[0],
                f"{memory['gradient bytes'] / 1e6:.2f}",
                *(f"{peak / 1e6:.3f}" for peak in memory["peak bytes"].values()),
            ]
            for words, memory in heavy
        ]
        text.append(markdown(header, lines, words=1))
    return "\n\n".join(text)


TABLES = {
    "machines": machines,
    "steps": steps,
    "baselines": baselines,
    "surgery": surgery,
    "state": state,
    "peers": peers,
    "memory": memory,
    "scaling": scaling,
    "training": training,
    "curves": curves,
    "diagnosis": diagnosis,
}


def written(text: str, results: Results) -> str:
    """The page with all tables up to date."""
    for name, table in TABLES.items():
        text = replaced(text, name, table(results), source(name))
    return text


def source(name: str) -> str:
    """Where a table comes from, as its marker says.

    Example:
        >>> source("steps"), source("curves")
        ('docs/performance*.json', 'docs/state_dtype_curves.json')
    """
    return "docs/state_dtype_curves.json" if name == "curves" else SOURCES


def rewrite(page: Path, name: str, table: str) -> None:
    """Put one table between its markers in a page."""
    page.write_text(replaced(page.read_text(), name, table, source(name)))


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the page, or check it."""
    arguments = sys.argv[1:] if argv is None else argv
    page = DOCS / "performance.md"
    text = page.read_text()
    new = written(text, load())
    if new == text:
        return 0
    if "--check" in arguments:
        print("out of date: docs/performance.md")
        return 1
    page.write_text(new)
    print("rewritten: docs/performance.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
