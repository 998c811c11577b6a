"""Metrics with intervals, and reports of what a run did to every split."""

from hf_momentum.evaluation.metrics import (
    Estimate,
    causal_lm_statistics,
    changes,
    classification_statistics,
    estimates,
    metrics_of,
)
from hf_momentum.evaluation.report import Report, SplitResult

__all__ = [
    "Estimate",
    "Report",
    "SplitResult",
    "causal_lm_statistics",
    "changes",
    "classification_statistics",
    "estimates",
    "metrics_of",
]
