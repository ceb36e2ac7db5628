"""Exactness that users can check on their own model, with one call."""

from gc_accel.equivalence.check import check_equivalence, check_equivalence_chunks
from gc_accel.equivalence.drift import representation_drift
from gc_accel.equivalence.report import EquivalenceReport
from gc_accel.equivalence.suspects import Suspect

__all__ = [
    "EquivalenceReport",
    "Suspect",
    "check_equivalence",
    "check_equivalence_chunks",
    "representation_drift",
]
