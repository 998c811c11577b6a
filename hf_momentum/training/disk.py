"""A disk that fills up while something is written: one line instead of a traceback, whichever library was writing."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_momentum.errors import TrainingStopped
from hf_momentum.training.checkpoints import last_complete

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What safetensors (in Rust) and torch (in C++) say, who do not raise OSError.
_SAYINGS = (
    *("No space left on device", "os error 28", "Disk quota exceeded", "os error 122", "File too large", "os error 27"),
    *("PytorchStreamWriter failed", "unexpected pos", "iostream error"),
)


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, says that a file could not be written for want of space.

    torch does not say why a write failed. It counts, since hardly anything but a full disk makes one fail midway.

    Example:
        >>> disk_is_full(OSError(errno.ENOSPC, "No space left on device")), disk_is_full(OSError(errno.ENOENT, "no"))
        (True, False)
    """
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in _FULL) or any(said in str(cause) for said in _SAYINGS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextlib.contextmanager
def full_disk_stops(folder: Path) -> Iterator[None]:
    """Turn a full disk into `TrainingStopped`, whose line says what is kept and how to go on.

    Example:
        >>> with full_disk_stops(Path("out")):
        ...     raise OSError(errno.ENOSPC, "No space left on device")
        Traceback (most recent call last):
        ...
        hf_momentum.errors.TrainingStopped: no space was left on the disk of out ... no complete checkpoint ...
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        place = next(above for above in (folder.absolute(), *folder.absolute().parents) if above.exists())
        free = f"{shutil.disk_usage(place).free / 2**20:.0f} MiB are free"
        kept = last_complete(folder, speak=False)
        then = (
            "no complete checkpoint was written yet"
            if kept is None
            else f"{kept} is complete: make room, and give the command again with --resume_from_checkpoint true"
        )
        raise TrainingStopped(
            f"no space was left on the disk of {folder} for what was saved ({free}); {then}"
        ) from error
