"""Asking the Hub with patience, and saying in one line what it answered.

huggingface_hub repeats by itself what uploads an object or a file list (429 and 5xx, Retry-After, lost connections).
It does not repeat what makes a repository, asks about one, or commits; `patiently` does.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants, get_token

# HTTPError is that of httpx under huggingface_hub 1 and of httpx2 under 2: of an answer, or of none.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError

from hf_momentum.errors import InputError
from hf_momentum.training.disk import disk_is_full

TRIES = 6
_LONGEST = 60.0  # seconds between two tries that a server may ask for
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"

T = TypeVar("T")


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns; repeated after 429, a server's error or a lost connection, with growing waits.

    A wait is what the server asks for (Retry-After), up to a minute, or else 1, 2, 4, 8, 8 seconds.

    Example:
        >>> patiently(lambda: 3)
        3
    """
    for attempt in range(TRIES):
        try:
            return call()
        except HTTPError as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == TRIES - 1:
                raise
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _wait(error: HTTPError, attempt: int) -> float | None:
    """Seconds until the next try; None for what another try will not mend."""
    usual = float(min(2**attempt, 8))
    if not isinstance(error, HfHubHTTPError):
        return usual  # no answer at all
    status = error.response.status_code
    if status != 429 and status < 500:
        return None
    asked = error.response.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST) if asked.isdigit() else usual


def require_token() -> None:
    """Raise `InputError` offline, or where no token is found.

    Raises:
        InputError: the line says how to come by one.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it and say the command again")
    if get_token() is None:
        raise InputError(f"no token for {constants.ENDPOINT} was found; {_LOGIN}")


@contextmanager
def one_line(repo_id: str, kept: str) -> Iterator[None]:
    """Turn whatever a conversation with the Hub can raise into an `InputError`.

    Args:
        repo_id: what is being written to.
        kept: the end of the line: what is not lost, and what to do.

    Example:
        >>> with one_line("me/model", "say it again"):
        ...     raise ConnectionError("no route")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: me/model: the Hub cannot be reached (no route); say it again
    """
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{repo_id}: {reason(error)}; {kept}") from error


def reason(error: BaseException) -> str:
    """What went wrong, in words for the one who pushes.

    Example:
        >>> reason(OSError(28, "No space left on device", "model.safetensors"))
        "no space is left on the disk ([Errno 28] No space left on device: 'model.safetensors')"
    """
    # An upload in a thread wraps what happened to it.
    inner = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
    hint = " (a Hub without Xet storage needs HF_HUB_DISABLE_XET=1)" if "xet-" in str(inner) else ""
    return f"{_said(inner)}{hint}"


def _said(error: BaseException) -> str:
    if isinstance(error, HFValidationError):
        return f"that is no name of a repository; write OWNER/NAME ({_short(error)})"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        return _answered(error)
    if disk_is_full(error):
        return f"no space is left on the disk ({_short(error)})"
    if isinstance(error, HTTPError | ConnectionError):
        return f"the Hub cannot be reached ({_short(error)})"
    return _short(error)


def _answered(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = _short(error.server_message or "no reason given")
    if status == 401:
        return f"the Hub does not accept the token (401: {said}); {_LOGIN}"
    if status == 403:
        return f"the token may not write there (403: {said}); name a repository of your own, or use another token"
    if status == 404:
        return f"there is no such repository or revision, or the token may not see it (404: {said})"
    if status == 429:
        return f"too many requests, still after {TRIES} tries (429: {said}); wait some minutes"
    if status >= 500:
        return f"the Hub has trouble of its own, still after {TRIES} tries ({status}: {said})"
    return f"the Hub refused ({status}: {said})"


def _short(what: object) -> str:
    text = re.sub(r"\s+", " ", str(what)).strip().rstrip(".") or type(what).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
