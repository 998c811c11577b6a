"""What of one machine and its user has no place in a file that others read: absolute paths and tokens."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers import TrainingArguments

# An absolute path in text: not part of a word, an address or a relative path, up to what ends a word.
_ABSOLUTE = re.compile(r"(?<![\w/.~\\-])/(?:[\w.+@%-]+/)*[\w.+%-]+/?")
_SECRET = ("hub_token", "push_to_hub_token")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b|(?<=hub_token[:=])\w{8,}|(?<=hub_token[:=] )\w{8,}")


def without_places(text: str, known: Mapping[str, str] | None = None) -> str:
    """The text with every absolute path of this machine shortened to its last part.

    A path counts as one of this machine if its first folder exists here.

    Args:
        text: of any file.
        known: what to put in the place of paths that are known, such as one with spaces.

    Example:
        >>> without_places("data: /usr/share/mine/a.jsonl@train, from https://a.b/usr/share and and/or /nowhere/x")
        'data: a.jsonl@train, from https://a.b/usr/share and and/or /nowhere/x'
    """
    for place, name in sorted((known or {}).items(), key=lambda pair: -len(pair[0])):
        text = text.replace(place, name)
    return _ABSOLUTE.sub(_last_part, text)


def places_out(told: Any, known: Mapping[str, str] | None = None) -> Any:
    """What `without_places` does to text, for all that JSON holds; an absolute path may have spaces there.

    Example:
        >>> places_out({"folder": "/usr/my own/run", "steps": 3, "texts": ["a: /usr/b"]})
        {'folder': 'run', 'steps': 3, 'texts': ['a: b']}
    """
    if isinstance(told, dict):
        return {key: places_out(value, known) for key, value in told.items()}
    if isinstance(told, list):
        return [places_out(value, known) for value in told]
    if not isinstance(told, str):
        return told
    parts = Path(told).parts
    if "\n" not in told and len(parts) > 2 and parts[0] == "/" and Path("/", parts[1]).is_dir():
        return parts[-1]
    return without_places(told, known)


def _last_part(found: re.Match[str]) -> str:
    parts = found[0].strip("/").split("/")
    here = len(parts) > 1 and Path(f"/{parts[0]}").is_dir()
    return parts[-1] if here else found[0]


def secret_in(text: str) -> str | None:
    """What in a text is a token: this process's own, or what looks like one of the Hub's; shortened, to be named.

    Example:
        >>> secret_in("hf_abcdefghijklmnopqrstuvwxyz"), secret_in("hub_token: mysecret"), secret_in("hf_momentum")
        ('hf_ab...', 'mysec...', None)
    """
    own = [get_token() or "", *(os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))]
    found = next((token for token in own if len(token) >= 8 and token in text), None)
    if found is None:
        match = _TOKEN.search(text)
        found = match[0] if match else None
    return None if found is None else f"{found[:5]}..."


def remember_token(training: TrainingArguments) -> None:
    """Move `hub_token` from the arguments, which are pickled and logged, into the environment of this process.

    huggingface_hub looks for HF_TOKEN at every request, so that all that asks the Hub from here on finds it.

    Example:
        >>> training = TrainingArguments(output_dir="out", use_cpu=True)
        >>> remember_token(training)
        >>> training.hub_token is None
        True
    """
    if training.hub_token is not None:
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None


def arguments_json(training: TrainingArguments) -> str:
    """The Trainer's arguments as JSON, without tokens and without this machine's folders.

    Example:
        >>> arguments = TrainingArguments(output_dir="/usr/share/mine/run", hub_token="hf_secret", use_cpu=True)
        >>> told = json.loads(arguments_json(arguments))
        >>> told["output_dir"], "hub_token" in told
        ('run', False)
    """
    told: dict[str, Any] = {
        # to_dict has a placeholder for everything called a token, such as the eos_token of TRL.
        name: getattr(training, name) if name.endswith("_token") else value
        for name, value in training.to_dict().items()
        if name not in _SECRET and name[:1] != "_"
    }
    plain = json.loads(json.dumps(told, default=str))
    return json.dumps(places_out(plain), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
