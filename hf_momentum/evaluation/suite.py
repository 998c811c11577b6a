"""A suite: named splits, what each stands for, and how a model is scored on it. Written as YAML, read strictly."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import yaml

from hf_momentum.errors import InputError, nearest
from hf_momentum.evaluation.corruptions import corruption_of
from hf_momentum.evaluation.results import ROLES, SHIFTS, Role, Shift
from hf_momentum.evaluation.scores import scorer

Task = Literal["causal_lm", "sequence_classification", "image_classification", "generation"]
TASKS: tuple[str, ...] = get_args(Task)
CLASSIFIERS = ("sequence_classification", "image_classification")

_ROLE_WORDS = {role.replace(" ", "_"): role for role in ROLES}
_SUITE_KEYS = ("description", "splits")


@dataclass(frozen=True)
class SuiteSplit:
    """One split of a suite. All but the name is a key of the YAML; those of `SHARED` may stand above the splits, too.

    Attributes:
        name: how reports call it; letters, digits, `_`, `-` and `.`.
        role: "in_distribution", "shifted", "must_not_forget" or "auxiliary" (with spaces once it is read).
        kind: of a shift: "domain", "corruption", "label" or "time"; None unless it is shifted.
        source: SOURCE@SPLIT as in a recipe: `stdlib:KIND`, a file, a folder or a Hub dataset.
        of: the split whose rows are corrupted; source, task, columns and limits are then that one's.
        corruption, severity: what is done to them, and how strongly, 1 to 5. `severities` makes a split for each.
        corruption_seed: written `seed` on such a split.
        lm_eval: a task of lm-evaluation-harness in place of a source; of its documents the first `max_examples`.
        task: "causal_lm", "sequence_classification", "image_classification" or "generation".
        metrics: the first is the main one; empty for all of the task.
        text_column, label_column, image_column: where text, class and picture stand.
        prompt_column, reference_column: for generation.
        group_column: a column whose values part the examples into groups, reported with the worst one; None for none.
        classes: names of the model's outputs in their order, where its configuration does not name them.
        block_size: tokens of context at most; None for as many as the model takes.
        max_examples: use only so many, drawn by `seed`; None for all.
        max_characters: use only so many of each text, from its beginning; None for all.
        seed: of the draw of examples.
        max_new_tokens: for generation.
        extract: for generation: a regular expression; its first group (or the whole match) is compared.
        lm_eval_folder: where the YAML of lm_eval tasks of your own lies.
    """

    name: str
    role: Role
    kind: Shift | None = None
    source: str = ""
    of: str | None = None
    corruption: str | None = None
    severity: int = 0
    corruption_seed: int = 0
    lm_eval: str | None = None
    task: Task = "causal_lm"
    metrics: tuple[str, ...] = ()
    text_column: str = "text"
    label_column: str = "label"
    image_column: str = "image"
    prompt_column: str = "prompt"
    reference_column: str = "reference"
    group_column: str | None = None
    classes: tuple[str, ...] = ()
    block_size: int | None = None
    max_examples: int | None = None
    max_characters: int | None = None
    seed: int = 0
    max_new_tokens: int = 32
    extract: str | None = None
    lm_eval_folder: str | None = None


# What may stand above the splits, with the type of its values.
SHARED: Mapping[str, type] = {
    "task": str,
    "metrics": list,
    "text_column": str,
    "label_column": str,
    "image_column": str,
    "prompt_column": str,
    "reference_column": str,
    "group_column": str,
    "classes": list,
    "block_size": int,
    "max_examples": int,
    "max_characters": int,
    "seed": int,
    "max_new_tokens": int,
    "extract": str,
    "lm_eval_folder": str,
}
_OWN: Mapping[str, type] = {"role": str, "kind": str, "source": str, "lm_eval": str}
# A corrupted split is another in all but these.
_CORRUPTED: Mapping[str, type] = {
    "role": str,
    "kind": str,
    "of": str,
    "corruption": str,
    "severity": int,
    "severities": list,
    "seed": int,
    "metrics": list,
}
_AT_LEAST_ONE = ("block_size", "max_examples", "max_characters", "max_new_tokens")


@dataclass(frozen=True)
class Suite:
    """Splits that were checked, in the order of the file.

    Attributes:
        name: the file's name without its ending.
        splits: at least one of them in distribution.
        description: one line for reports.
    """

    name: str
    splits: tuple[SuiteSplit, ...]
    description: str = ""

    @property
    def reference(self) -> SuiteSplit:
        """The split that shifted ones are compared with: the first in distribution."""
        return next(split for split in self.splits if split.role == "in distribution")

    def to_yaml(self) -> str:
        """The suite as YAML that `read_suite` reads to an equal one.

        Example:
            >>> suite = read_suite("splits: {code: {role: in_distribution, source: stdlib:code@test}}", "mine")
            >>> read_suite(suite.to_yaml(), "mine") == suite
            True
        """
        entries = {split.name: _entry(split) for split in self.splits}
        own = [entries[split.name] for split in self.splits if split.of is None]
        shared = {
            key: own[0][key] for key in SHARED if key in own[0] and all(one.get(key) == own[0][key] for one in own)
        }
        for one in own:
            for key in shared:
                del one[key]
        metrics = {split.name: split.metrics for split in self.splits}
        for split in self.splits:
            if split.of is not None and split.metrics == metrics[split.of]:
                entries[split.name].pop("metrics", None)
        description = {"description": self.description} if self.description else {}
        return yaml.safe_dump({**description, **shared, "splits": entries}, sort_keys=False, allow_unicode=True)

    def limited(self, most: int) -> "Suite":
        """The same with at most `most` examples of every split.

        Raises:
            InputError: most is below 1.

        Example:
            >>> suite = read_suite("splits: {code: {role: in_distribution, source: stdlib:code@test}}", "mine")
            >>> suite.limited(9).splits[0].max_examples
            9
        """
        if most < 1:
            raise InputError(f"max_examples must be at least 1, got {most}")
        return replace(
            self,
            splits=tuple(replace(split, max_examples=min(most, split.max_examples or most)) for split in self.splits),
        )


def read_suite(text: str, name: str, sources: Mapping[str, str] | None = None) -> Suite:
    """A suite from YAML.

    Args:
        text: the YAML.
        name: how reports call it, and errors the file.
        sources: by name of a split, what to read in place of its source; its columns are those of the whole suite.

    Raises:
        InputError: not YAML, an unknown or repeated key, a value that does not fit, or a split that makes no sense.

    Example:
        >>> suite = read_suite('''
        ... task: sequence_classification
        ... splits:
        ...   movies: {role: in_distribution, source: movies.jsonl}
        ...   typos:  {role: shifted, of: movies, corruption: typos, severities: [1, 5]}
        ... ''', "reviews")
        >>> [(split.name, split.kind, split.severity) for split in suite.splits]
        [('movies', None, 0), ('typos_1', 'corruption', 1), ('typos_5', 'corruption', 5)]
    """
    try:
        content = yaml.load(text, Loader=_Once)
    except yaml.YAMLError as error:
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} is not a suite: expected `splits:` with lines of `name: {{...}}` under it")
    shared = {key: value for key, value in content.items() if key not in _SUITE_KEYS}
    _check_types(name, shared, SHARED, (*SHARED, *_SUITE_KEYS))
    entries = content.get("splits")
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{name}: a suite needs `splits:` with at least one split under it")
    for given in sources or {}:
        if given not in entries:
            raise InputError(f"{name} has no split {given!r}{nearest(given, entries)}; it has {', '.join(entries)}")
    splits: dict[str, SuiteSplit] = {}
    for split_name, entry in entries.items():
        for split in _splits(name, split_name, entry, shared, splits, (sources or {}).get(split_name)):
            if split.name in splits:
                raise InputError(f"{name}: two splits are called {split.name!r}")
            splits[split.name] = split
    if not any(split.role == "in distribution" for split in splits.values()):
        raise InputError(
            f"{name} has no in-distribution split, so there is nothing that a shift could be compared with; give one "
            "of its splits `role: in_distribution`"
        )
    return Suite(name, tuple(splits.values()), str(content.get("description", "")))


def refuse_repeated_keys(node: yaml.MappingNode) -> None:
    """Raise for a key that stands twice in a mapping, of which YAML would keep the last without a word.

    Raises:
        yaml.constructor.ConstructorError: names the key and its line.

    Example:
        >>> refuse_repeated_keys(yaml.compose("a: 1\\nb: 2"))
    """
    seen = set()
    for key_node, _ in node.value:
        if key_node.value in seen:
            line = key_node.start_mark.line + 1
            raise yaml.constructor.ConstructorError(None, None, f"{key_node.value!r} is given twice (line {line})")
        seen.add(key_node.value)


class _Once(yaml.SafeLoader):
    """Refuses a key that is given twice, such as two splits of one name."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        refuse_repeated_keys(node)
        return super().construct_mapping(node, deep)


def _splits(
    suite: str,
    name: Any,
    entry: Any,
    shared: Mapping[str, Any],
    before: Mapping[str, SuiteSplit],
    source: str | None,
) -> list[SuiteSplit]:
    """What one entry stands for: a split, or one for each severity."""
    where = f"{suite}, split {name!r}"
    if not isinstance(name, str) or not name or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise InputError(
            f"{where}: a name is made of letters, digits, '_', '-' and '.'; put it in quotes if it is a number"
        )
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected keys such as role and source, got {type(entry).__name__}")
    if "of" in entry or "corruption" in entry:
        if source is not None:
            raise InputError(f"{where} takes its rows from {entry.get('of')!r}; give that one a source")
        return _corrupted(where, name, entry, before)
    if source is not None:
        # Columns that were named for the source of the file are not those of another one.
        kept = {key: value for key, value in entry.items() if key != "lm_eval" and not key.endswith("_column")}
        entry = {**kept, "source": source}
    _check_types(where, entry, {**_OWN, **SHARED}, (*_OWN, *SHARED, *_CORRUPTED))
    if "source" in entry and "lm_eval" in entry:
        raise InputError(f"{where} has both source and lm_eval; leave one out")
    if not entry.get("source") and not entry.get("lm_eval"):
        raise InputError(
            f"{where} has no source; write source: SOURCE@SPLIT, or of: with corruption:, or lm_eval: TASK"
        )
    values = {**shared, **entry}
    for key in ("metrics", "classes"):
        if key in values:
            values[key] = tuple(map(str, values[key]))
    role, kind = _role(where, entry)
    return [_checked(where, SuiteSplit(**{**values, "name": name, "role": role, "kind": kind}))]


def _role(where: str, entry: Mapping[str, Any]) -> tuple[Any, Any]:
    role, kind = entry.get("role"), entry.get("kind")
    if role is None:
        raise InputError(f"{where} has no role; one of {', '.join(_ROLE_WORDS)}")
    if role not in _ROLE_WORDS:
        raise InputError(
            f"{where}: role {role!r} is not accepted{nearest(role, _ROLE_WORDS)}; one of {', '.join(_ROLE_WORDS)}"
        )
    if kind is not None and kind not in SHIFTS:
        raise InputError(f"{where}: kind {kind!r} is not accepted{nearest(kind, SHIFTS)}; one of {', '.join(SHIFTS)}")
    if role == "shifted" and kind is None and "corruption" not in entry:
        raise InputError(f"{where} is shifted and does not say how; add kind: with one of {', '.join(SHIFTS)}")
    if role != "shifted" and kind is not None:
        raise InputError(f"{where} has kind {kind!r}, which only shifted splits have; its role is {role}")
    return _ROLE_WORDS[role], kind


def _checked(where: str, split: SuiteSplit) -> SuiteSplit:
    if split.task not in TASKS:
        raise InputError(
            f"{where}: task {split.task!r} is not accepted{nearest(split.task, TASKS)}; one of {', '.join(TASKS)}"
        )
    for key in _AT_LEAST_ONE:
        value = getattr(split, key)
        if value is not None and value < 1:
            raise InputError(f"{where}: {key} must be at least 1, got {value}")
    if split.lm_eval is None:
        _check_metrics(where, split)
    return split


def _check_metrics(where: str, split: SuiteSplit) -> None:
    if len(set(split.metrics)) < len(split.metrics):
        raise InputError(f"{where}: a metric is given twice: {', '.join(split.metrics)}")
    try:
        scorer(split.task, classes=max(len(split.classes), 2), metrics=split.metrics or None)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _corrupted(where: str, name: str, entry: Mapping[str, Any], before: Mapping[str, SuiteSplit]) -> list[SuiteSplit]:
    _check_types(where, entry, _CORRUPTED, _CORRUPTED)
    for key in ("of", "corruption"):
        if key not in entry:
            raise InputError(f"{where} needs both of: (the split to corrupt) and corruption:; {key} is missing")
    if entry["of"] not in before:
        raise InputError(
            f"{where}: there is no split {entry['of']!r} above it{nearest(entry['of'], before)}; "
            f"there is {', '.join(before) or 'none'}"
        )
    clean = before[entry["of"]]
    if clean.corruption is not None or clean.lm_eval is not None or clean.task == "generation":
        raise InputError(
            f"{where}: the rows of {clean.name!r} cannot be corrupted; name a split with a source of its own"
        )
    role, kind = _role(where, entry)
    if role != "shifted" or kind not in (None, "corruption"):
        raise InputError(f"{where} is corrupted, so its role is shifted and its kind corruption")
    if ("severity" in entry) == ("severities" in entry):
        raise InputError(f"{where}: give either severity: 1 to 5, or severities: with a list of those")
    several = "severities" in entry
    severities = entry["severities"] if several else [entry["severity"]]
    if not severities or len(set(severities)) < len(severities):
        raise InputError(f"{where}: severities must be a list of different numbers from 1 to 5, got {severities}")
    made = []
    for severity in severities:
        _check_corruption(where, entry["corruption"], severity, clean)
        made.append(
            replace(
                clean,
                name=f"{name}_{severity}" if several else name,
                role=role,
                kind="corruption",
                of=clean.name,
                corruption=entry["corruption"],
                severity=severity,
                corruption_seed=entry.get("seed", 0),
                metrics=tuple(map(str, entry.get("metrics", clean.metrics))),
            )
        )
        _check_metrics(where, made[-1])
    return made


def _check_corruption(where: str, name: str, severity: Any, clean: SuiteSplit) -> None:
    try:
        kind = corruption_of(name, severity).kind
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    rows = "image" if clean.task == "image_classification" else "text"
    if kind != rows:
        raise InputError(f"{where}: corruption {name} is for {kind}s, and the rows of {clean.name!r} are {rows}s")


def _check_types(where: str, entry: Mapping[str, Any], types: Mapping[str, type], known: Iterable[str]) -> None:
    for key, value in entry.items():
        if key not in types:
            raise InputError(f"{where}: unknown key {key!r}{nearest(str(key), known)}; accepted: {', '.join(types)}")
        wanted = types[key]
        # In Python True is an int.
        if not isinstance(value, wanted) or isinstance(value, bool):
            words = {str: "text", int: "a whole number", list: "a list"}[wanted]
            raise InputError(f"{where}: {key} must be {words}, got {value!r}")


def _entry(split: SuiteSplit) -> dict[str, Any]:
    """What of a split has to be written: all that is not its default."""
    written: dict[str, Any] = {"role": split.role.replace(" ", "_")}
    if split.of is not None:
        written |= {"of": split.of, "corruption": split.corruption, "severity": split.severity}
        written |= {"seed": split.corruption_seed} if split.corruption_seed else {}
        return written | ({"metrics": list(split.metrics)} if split.metrics else {})
    for field in fields(SuiteSplit):
        value = getattr(split, field.name)
        if field.name not in ("name", "role") and value != field.default:
            written[field.name] = list(value) if isinstance(value, tuple) else value
    return written


def overridden_sources(entries: Sequence[str]) -> dict[str, str]:
    """NAME and SOURCE@SPLIT of each `--source NAME=SOURCE@SPLIT`.

    Raises:
        InputError: one has no such form, or a name is given twice.

    Example:
        >>> overridden_sources(["movies=movies_test.jsonl"])
        {'movies': 'movies_test.jsonl'}
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, separator, source = entry.partition("=")
        if not separator or not name or not source:
            raise InputError(f"source {entry!r} does not name a split; write --source NAME=SOURCE@SPLIT")
        if name in found:
            raise InputError(f"--source names split {name!r} twice")
        found[name] = source
    return found
