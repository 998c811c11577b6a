"""Our metrics as modules of Hugging Face `evaluate`, inside the package: nothing is fetched to use them.

Each file is one module, a small class that hands what was collected to `scores.py`. `load` gives an instance, and
`evaluate.load(path(name))` works too.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_momentum.errors import InputError, nearest

if TYPE_CHECKING:
    import evaluate

# Name of the file, and of the class in it.
MODULES = {
    "accuracy": "Accuracy",
    "f1": "F1",
    "calibration_error": "CalibrationError",
    "worst_group": "WorstGroup",
    "token_accuracy": "TokenAccuracy",
    "perplexity": "Perplexity",
    "exact_match": "ExactMatch",
}


def load(name: str, **options: Any) -> "evaluate.Metric":
    """An instance of one of `MODULES`.

    Args:
        name: of the metric.
        options: as for `evaluate.Metric`: `num_process`, `process_id` and `experiment_id` where several processes share
            one metric, `keep_in_memory`, `cache_dir`.

    Raises:
        InputError: there is no such metric.

    Example:
        >>> load("accuracy", keep_in_memory=True).compute(predictions=[0, 1], references=[0, 0])
        {'accuracy': 0.5}
    """
    _check(name)
    found: evaluate.Metric = getattr(import_module(f"{__name__}.{name}"), MODULES[name])(**options)
    return found


def path(name: str) -> str:
    """The module's file, for `evaluate.load`.

    Raises:
        InputError: there is no such metric.

    Example:
        >>> Path(path("f1")).name
        'f1.py'
    """
    _check(name)
    return str(Path(__file__).parent / f"{name}.py")


def _check(name: str) -> None:
    if name not in MODULES:
        raise InputError(f"unknown metric {name!r}{nearest(name, MODULES)}; accepted: {', '.join(MODULES)}")
