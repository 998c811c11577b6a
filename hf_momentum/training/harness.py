"""Tasks of lm-evaluation-harness (extra `lm-eval`) as splits of a suite: a row for each document, as for any other."""

import contextlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from hf_momentum.errors import InputError, nearest
from hf_momentum.evaluation.measured import Measured
from hf_momentum.evaluation.scores import Metric, Scorer
from hf_momentum.evaluation.suite import SuiteSplit
from hf_momentum.training.evaluated import Evaluated

# What becomes of (log-likelihood, units) pairs of rolling tasks, as sums over documents.
_OF_PAIRS: Mapping[str, Any] = {
    "word_perplexity": lambda nats, units: np.exp(-nats / units),
    "byte_perplexity": lambda nats, units: np.exp(-nats / units),
    "bits_per_byte": lambda nats, units: -nats / units / math.log(2),
}


def harness() -> ModuleType:
    """The package `lm_eval`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(
            "a split with lm_eval needs lm-evaluation-harness: pip install 'hf-momentum[lm-eval]'"
        ) from error
    return lm_eval


def measure_task(evaluated: Evaluated, split: SuiteSplit, batch_size: int) -> Measured:
    """A model on one task of the harness.

    Only metrics that are a function of sums over documents are kept, since the others have no interval here: those that
    are means, and the perplexities of rolling tasks. Each is checked against the figure that the harness itself gives.

    Raises:
        InputError: lm_eval is not installed, knows no such task, or the task has no such metric.
    """
    lm_eval = harness()
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager_of(split)
    limit = {} if split.block_size is None else {"max_length": split.block_size}
    model = HFLM(pretrained=evaluated.model, tokenizer=evaluated.processor, batch_size=batch_size, **limit)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[split.lm_eval],
        limit=split.max_examples,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = found["samples"]
    if len(samples) != 1:
        raise InputError(f"split {split.name!r}: {split.lm_eval} is a group of tasks; name one of {', '.join(samples)}")
    (task,) = samples
    return measured(split, samples[task], found["results"][task])


def _manager_of(split: SuiteSplit) -> Any:
    """The harness's table of tasks, looking into the suite's own folder first: reading all of its own takes long."""
    from lm_eval.tasks import TaskManager

    with contextlib.redirect_stdout(io.StringIO()):
        if split.lm_eval_folder is not None:
            own = TaskManager(include_path=split.lm_eval_folder, include_defaults=False)
            if split.lm_eval in own.all_tasks:
                return own
        manager = TaskManager(include_path=split.lm_eval_folder)
    if split.lm_eval not in manager.all_tasks:
        hint = nearest(str(split.lm_eval), manager.all_tasks)
        raise InputError(f"split {split.name!r}: lm_eval knows no task {split.lm_eval!r}{hint}")
    return manager


def measured(split: SuiteSplit, samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Measured:
    """Rows and metrics from what the harness says of every document, `results` being what it says of the task.

    Example:
        >>> samples = [{"acc": 1.0, "metrics": ["acc"]}, {"acc": 0.0, "metrics": ["acc"]}]
        >>> one = measured(SuiteSplit("arc", "shifted", "domain", lm_eval="arc"), samples, {"acc,none": 0.5})
        >>> one.scorer.main, one.rows.tolist()
        ('acc', [[1.0, 1.0], [1.0, 0.0]])
    """
    totals = {key.partition(",")[0]: value for key, value in results.items() if isinstance(value, int | float)}
    columns: list[np.ndarray] = [np.ones(len(samples))]
    metrics: dict[str, Metric] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample["metrics"]):
        values = [sample.get(name) for sample in samples]
        first = len(columns)
        if all(isinstance(value, bool | int | float | np.number) for value in values):
            columns.append(np.array(values, dtype=np.float64))
            metrics[name] = lambda sums, place=first: sums[..., place] / sums[..., 0]
        elif name in _OF_PAIRS and all(isinstance(value, list | tuple) and len(value) == 2 for value in values):
            columns += list(np.array(values, dtype=np.float64).T)
            metrics[name] = lambda sums, place=first, form=_OF_PAIRS[name]: form(sums[..., place], sums[..., place + 1])
    rows = np.stack(columns, axis=1)
    agreeing = {
        name: metric
        for name, metric in metrics.items()
        if name in totals and math.isclose(float(metric(rows.sum(0))), totals[name], rel_tol=1e-6, abs_tol=1e-9)
    }
    names = split.metrics or tuple(agreeing)
    lacking = [name for name in names if name not in agreeing]
    if lacking or not names:
        which = f"metric {lacking[0]!r}" if lacking else "metric"
        raise InputError(
            f"split {split.name!r}: task {split.lm_eval} has no {which} that is a mean over documents; it has "
            f"{', '.join(agreeing) or 'none'}"
        )
    return Measured(split, rows, Scorer("lm_eval", lambda rows: rows, {name: agreeing[name] for name in names}))
