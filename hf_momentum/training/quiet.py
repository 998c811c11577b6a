"""Many runs in a row without many times the same lines."""

import contextlib
import logging
from collections.abc import Iterator

import datasets
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without a progress bar for every file and split of every run, and without the same notes again; warnings stay."""
    logger = logging.getLogger("hf_momentum")
    level, data, weights = logger.level, datasets.are_progress_bars_disabled(), is_progress_bar_enabled()
    logger.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not data:
            datasets.enable_progress_bars()
        if weights:
            enable_progress_bar()
