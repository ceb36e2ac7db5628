"""How good a representation is: retrieval, zero-shot classification, nearest neighbours, linear probe.

Functions of tensors and labels; they know no model, no data set and no trainer.
"""

from gc_accel.evaluation.probes import ProbeAccuracy, knn_accuracy, linear_probe_accuracy
from gc_accel.evaluation.ranking import baseline_metrics, ranking_metrics
from gc_accel.evaluation.retrieval import retrieval_metrics
from gc_accel.evaluation.zero_shot import zero_shot_accuracy, zero_shot_classifier

__all__ = [
    "ProbeAccuracy",
    "baseline_metrics",
    "knn_accuracy",
    "linear_probe_accuracy",
    "ranking_metrics",
    "retrieval_metrics",
    "zero_shot_accuracy",
    "zero_shot_classifier",
]
