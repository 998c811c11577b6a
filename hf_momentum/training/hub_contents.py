"""What of a run or checkpoint goes to the Hub: which file is what, what is left out, and what is changed on the way."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from hf_momentum.errors import InputError
from hf_momentum.training.card import checkpoint_card, on_hub
from hf_momentum.training.checkpoints import FORMAT, MANIFEST, PLAIN, WEIGHTS, Manifest, faults, kind_of, last_complete
from hf_momentum.training.export import export
from hf_momentum.training.scrubbing import places_out, secret_in, without_places

MODEL, TOKENIZER, ARGUMENTS, RECIPE = "model", "tokenizer", "training arguments", "recipe"
REPORT, PICTURES, CARD, STATE = "report", "pictures", "model card", "optimizer state"

# Patterns of the files of each kind, by their path inside the folder.
_KINDS = {
    MODEL: (
        *("config.json", "generation_config.json", "adapter_config.json", "model*.safetensors"),
        *("model.safetensors.index.json", "adapter_model.safetensors"),
    ),
    TOKENIZER: (
        *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model"),
        *("chat_template*", "additional_chat_templates/*", "preprocessor_config.json", "processor_config.json"),
        *("image_processor_config.json", "video_preprocessor_config.json"),
    ),
    ARGUMENTS: ("training_args.json",),
    RECIPE: ("recipe.yaml",),
    REPORT: ("report.json", "report.md", "report.html"),
    PICTURES: ("plots/*.png", "plots/*.svg"),
    CARD: ("README.md",),
    STATE: ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state*.pth", "scaler.pt"),
}
# Read by people or by configuration readers, so that paths of this machine may stand in them.
_TEXTS = {".json", ".yaml", ".md", ".html"}
_NOT_READ = {"tokenizer.json", "vocab.json", "added_tokens.json", "model.safetensors.index.json"}
_WHY = {
    "training_args.bin": "a pickle",
    MANIFEST: "written anew for what is pushed",
    "*.bin": "pickled weights",
    "checkpoint-*": "push one by its own name; --push_optimizer takes the last along",
}
LAST = "last-checkpoint"


@dataclass(frozen=True)
class Item:
    """One file to push: its kind, its path in the repository, and its content as a file or as bytes."""

    kind: str
    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Contents:
    """All that a push is made of.

    Attributes:
        items: the files.
        missing: kinds of which there is nothing, with the reason.
        left_out: names of files and folders that stay behind, with the reason where there is one.
        notes: what a reader of the pushed model has to know, a sentence each.
    """

    items: Sequence[Item]
    missing: Sequence[str]
    left_out: Sequence[str]
    notes: Sequence[str]

    def lines(self) -> list[str]:
        """One line for each kind, and one for what stays behind."""
        made = []
        for kind in _KINDS:
            found = [item for item in self.items if item.kind == kind]
            if found:
                names = [item.path for item in found]
                shown = ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
                made.append(f"  {kind}: {shown} ({_amount(sum(item.size for item in found))})")
        made += [f"  {line}" for line in self.missing]
        made += [f"  left out: {', '.join(self.left_out)}"] if self.left_out else []
        return [*made, *(f"  note: {note}" for note in self.notes)]


def gather(
    folder: Path, staging: Path, push_optimizer: bool = False, dtype: str | None = None, base: str | None = None
) -> Contents:
    """Find out what is pushed of a run or checkpoint; what a plain folder cannot hold is exported first.

    Args:
        folder: of a run, of a checkpoint under any launch, or any folder with a model.
        staging: a folder beside it that may be written to, and that the caller deletes.
        push_optimizer: also what is needed to continue training: of a checkpoint beside its weights, of a run its last
            complete checkpoint, under last-checkpoint/.
        dtype: of the weights, "float32", "bfloat16" or "float16"; None leaves them as saved.
        base: the Hub's name of the model that an adapter sits on.

    Raises:
        InputError: no folder, no weights, a torn checkpoint, no optimizer state where it is asked for, or a token in
            one of the files.

    Example:
        >>> gather(Path("no such folder"), Path("staging"))
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: no such folder is not a folder; name a run's output folder or a checkpoint
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name a run's output folder or a checkpoint")
    checkpoint = (folder / "trainer_state.json").is_file() or kind_of(folder) != WEIGHTS
    _check_whole(folder, checkpoint)
    resumable = push_optimizer and checkpoint
    source = folder
    if dtype is not None or not _plain(folder, resumable):
        source = export(folder, staging / "model", dtype, resumable)
    wanted = [MODEL, TOKENIZER, *([STATE] if resumable else [])]
    items = [item for item in _of(source) if item.kind in wanted]
    described = _of(folder)
    if checkpoint:
        # The report and the figures of the card above belong to the end of the run, not to this checkpoint.
        above = _of(folder.resolve().parent)
        items += [item for item in (*described, *above) if item.kind in (ARGUMENTS, RECIPE)]
        items.append(Item(CARD, "README.md", _card_of(folder, items).encode()))
    else:
        items += [item for item in described if item.kind in (ARGUMENTS, RECIPE, REPORT, PICTURES, CARD)]
        if not any(item.kind == CARD for item in items):
            items.append(Item(CARD, "README.md", _card_of(folder, items).encode()))
        if push_optimizer:
            items += _last_checkpoint(folder, staging)
    items = list({item.path: item for item in reversed(items)}.values())[::-1]  # the folder's own before those above
    items, notes = _with_base(items, base)
    known = _known_places(folder, items)
    items = [_clean(item, known) for item in items]
    if push_optimizer:
        items += _manifests(items)
    held = {item.path for item in items} | {item.content.name for item in items if isinstance(item.content, Path)}
    return Contents(items, _missing(items, folder, checkpoint, push_optimizer), _left_out(folder, held), notes)


def kind_of_file(path: str) -> str | None:
    """What a file of a run is, by its path inside the folder; None for what is not pushed.

    Example:
        >>> kind_of_file("model-00001-of-00002.safetensors"), kind_of_file("training_args.bin")
        ('model', None)
    """
    return next((kind for kind, patterns in _KINDS.items() if any(fnmatch(path, p) for p in patterns)), None)


def _of(folder: Path) -> list[Item]:
    """The files of a folder whose kind is known, of its own and of the folders that patterns name."""
    inside = [folder, *(folder / name for name in ("plots", "additional_chat_templates"))]
    paths = [path for place in inside if place.is_dir() for path in sorted(place.iterdir()) if path.is_file()]
    found = [(path.relative_to(folder).as_posix(), path) for path in paths]
    items = [Item(kind, name, path) for name, path in found if (kind := kind_of_file(name)) is not None]
    return items + _model_code(folder)


def _model_code(folder: Path) -> list[Item]:
    """Files of Python that the configuration names as the model's own code."""
    config = folder / "config.json"
    if not config.is_file():
        return []
    named = json.loads(config.read_text(encoding="utf-8")).get("auto_map", {})
    return [Item(MODEL, path.name, path) for path in sorted(folder.glob("*.py"))] if named else []


def _plain(folder: Path, resumable: bool) -> bool:
    """Whether the folder's own files are what `from_pretrained` reads, without anything put together first."""
    described = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    weights = list(folder.glob("model*.safetensors")) or list(folder.glob("adapter_model.safetensors"))
    return described and bool(weights) and (not resumable or kind_of(folder) == PLAIN)


def _check_whole(folder: Path, checkpoint: bool) -> None:
    found = [fault for fault in faults(folder, manifest_needed=False) if checkpoint or "trainer_state" not in fault]
    if found:
        raise InputError(f"{folder} is torn: {', '.join(found[:3])}. Push another checkpoint")
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if checkpoint or any(path.name != "training_args.bin" for path in weights):
        return
    last = last_complete(folder, speak=False)
    there = "" if last is None else f"; its last complete checkpoint is {last}, push that"
    raise InputError(f"{folder} holds no weights{there or '; name the folder that a run wrote to'}")


def _last_checkpoint(run: Path, staging: Path) -> list[Item]:
    last = last_complete(run, speak=False)
    if last is None or kind_of(last) == WEIGHTS:
        raise InputError(
            f"--push_optimizer: {run} holds no complete checkpoint with an optimizer's state. Train with "
            "--save_strategy steps and without --save_only_model, or leave --push_optimizer out"
        )
    source = last if _plain(last, resumable=True) else export(last, staging / LAST, resumable=True)
    return [
        Item(STATE, f"{LAST}/{item.path}", item.content)
        for item in _of(source)
        if item.kind in (MODEL, TOKENIZER, STATE)
    ]


def _card_of(folder: Path, items: Iterable[Item]) -> str:
    """The card of a checkpoint, or of a folder without one: what its files say, and no figures."""
    state = folder / "trainer_state.json"
    step = json.loads(state.read_text(encoding="utf-8"))["global_step"] if state.is_file() else None
    adapter = any(item.path == "adapter_config.json" for item in items)
    return checkpoint_card(step, _recipe_in(items), adapter)


def _recipe_in(items: Iterable[Item]) -> dict[str, Any]:
    """The entries of the recipe; none where there is none.

    Raises:
        InputError: it is no YAML, or no recipe.
    """
    recipe = next((item.content for item in items if item.kind == RECIPE), None)
    if recipe is None:
        return {}
    try:
        told = yaml.safe_load(_text(recipe)) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{recipe} is not YAML ({' '.join(str(error).split())}); mend it or delete it") from error
    if not isinstance(told, dict):
        raise InputError(f"{recipe} is not a recipe: expected lines of `key: value`; mend it or delete it")
    return told


def _text(content: Path | bytes) -> str:
    return content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")


def _known_places(folder: Path, items: Iterable[Item]) -> dict[str, str]:
    """Absolute paths that a recipe or a run is known to name; one may hold spaces, which no pattern finds."""
    places = {folder.resolve(), folder.absolute()}
    told = _recipe_in(items)
    words = [word for value in told.values() for word in (value if isinstance(value, list) else [value])]
    for word in words:
        place = str(word).partition("=")[2] or str(word)
        if os.path.isabs(place):
            places.add(Path(place.rpartition("@")[0] or place))
    return {str(place): place.name for place in places if len(place.parts) > 2}


def _clean(item: Item, known: dict[str, str]) -> Item:
    """The item without places of this machine; a token in it is refused."""
    name = Path(item.path).name
    if Path(name).suffix not in _TEXTS or name in _NOT_READ:
        return item
    text = _text(item.content)
    secret = secret_in(text)
    if secret is not None:
        where = item.content if isinstance(item.content, Path) else name
        raise InputError(f"{where} holds what looks like a token ({secret}); delete it there, and revoke the token")
    cleaned = _cleaned_json(text, known) if name.endswith(".json") else without_places(text, known)
    return item if cleaned == text else Item(item.kind, item.path, cleaned.encode())


def _cleaned_json(text: str, known: dict[str, str]) -> str:
    """By its values, since its text may write letters as escapes."""
    try:
        told = json.loads(text)
    except ValueError:
        return without_places(text, known)
    shortened = places_out(told, known)
    return text if shortened == told else json.dumps(shortened, indent=2, ensure_ascii=False) + "\n"


def _with_base(items: list[Item], base: str | None) -> tuple[list[Item], list[str]]:
    """Name the base model of adapters as others find it: on the Hub, or not at all."""
    changed: list[Item] = []
    notes: list[str] = []
    for item in items:
        content: Path | bytes = item.content
        if Path(item.path).name == "adapter_config.json":
            config: dict[str, Any] = json.loads(_text(item.content))
            named = config["base_model_name_or_path"] = base or on_hub(config.get("base_model_name_or_path"))
            content = (json.dumps(config, indent=2) + "\n").encode()
            if named is None and not notes:
                notes.append(
                    "the adapters sit on a model that lies only on this machine; push that too, and name it here with "
                    "--base OWNER/NAME, or others have to pass a base model of their own"
                )
        elif item.kind == CARD:
            content = _card_with_base(item.content, base)
        changed.append(Item(item.kind, item.path, content))
    if notes:  # who finds the repository has to know, too
        cards = {number: _text(item.content).rstrip() for number, item in enumerate(changed) if item.kind == CARD}
        for number, text in cards.items():
            changed[number] = Item(CARD, changed[number].path, f"{text}\n\n{_NO_BASE}".encode())
    return changed, notes


_NO_BASE = """## Base model

The adapters sit on a model that was not pushed with them. Who loads them has to have it, and pass it as base model.
"""


def _card_with_base(content: Path | bytes, base: str | None) -> Path | bytes:
    """The card with the base model as others find it; cards of PEFT name a folder, in the tags too."""
    text = _text(content)
    if base is None and not text.startswith("---"):
        return content  # without metadata
    try:
        data = (card := ModelCard(text)).data
    except (yaml.YAMLError, ValueError) as error:
        where = f"{content}: " if isinstance(content, Path) else ""
        raise InputError(
            f"{where}the card's metadata cannot be read ({' '.join(str(error).split())}); mend it"
        ) from error
    named = data.get("base_model")
    known = base or (named if not isinstance(named, str) else on_hub(named))
    tags = data.get("tags") or []
    kept = [tag for tag in tags if not str(tag).startswith("base_model:") or on_hub(str(tag).rpartition(":")[2])]
    if known == named and kept == tags:
        return content
    if known is None:
        data.pop("base_model")
    else:
        data["base_model"] = known
    if kept != tags:
        data["tags"] = kept
    return str(card).encode()


def _manifests(items: Iterable[Item]) -> list[Item]:
    """`complete.json` for the pushed checkpoint, so that a download that was cut short is noticed."""
    made = []
    for prefix in ("", f"{LAST}/"):
        inside = [item for item in items if item.kind in (MODEL, STATE) and item.path.startswith(prefix)]
        inside = [item for item in inside if prefix or "/" not in item.path]
        state = next((item for item in inside if item.path == f"{prefix}trainer_state.json"), None)
        if state is not None:
            step = json.loads(_text(state.content))["global_step"]
            sizes = {item.path.removeprefix(prefix): item.size for item in inside}
            text = json.dumps(asdict(Manifest(FORMAT, step, 1, PLAIN, sizes)), indent=1)
            made.append(Item(STATE, f"{prefix}{MANIFEST}", text.encode()))
    return made


def _missing(items: Sequence[Item], folder: Path, checkpoint: bool, push_optimizer: bool) -> list[str]:
    """A line for each kind of which there is nothing."""
    kinds = {item.kind for item in items}
    why = {
        TOKENIZER: f"{folder} has none",
        ARGUMENTS: "no training_args.json there (`hf-momentum train` writes one when a run ends)",
        RECIPE: "no recipe.yaml there (`hf-momentum train` writes one when a run ends)",
        REPORT: "that of the run is about its end, not about this checkpoint" if checkpoint else "no report.json there",
        PICTURES: "those of the run are about its end" if checkpoint else "no plots/ there",
        STATE: "not asked for; --push_optimizer pushes what others need to continue training",
    }
    return [f"{kind}: none ({reason})" for kind, reason in why.items() if kind not in kinds]


def _left_out(folder: Path, held: set[str]) -> list[str]:
    """Names of what lies in the folder and is not pushed."""
    by_reason: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        whole = path.is_dir() and path.name in ("plots", "additional_chat_templates")
        if path.name in held or whole or kind_of_file(path.name) is not None:
            continue
        reason = next((why for pattern, why in _WHY.items() if fnmatch(path.name, pattern)), "")
        by_reason.setdefault(reason, []).append(f"{path.name}{'/' if path.is_dir() else ''}")
    return [f"{', '.join(names)}{f' ({reason})' if reason else ''}" for reason, names in by_reason.items()]


def _amount(size: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000  # type: ignore[assignment]
    return f"{size} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
