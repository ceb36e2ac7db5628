"""Several ranks as one: what they exchange, how they keep in step, and what scales their gradients."""

from gc_accel.distributed.agreement import Agreement
from gc_accel.distributed.alignment import without_rows
from gc_accel.distributed.collectives import GlobalLoss, RankedBatch, world_size
from gc_accel.distributed.replicas import Replicas

__all__ = ["Agreement", "GlobalLoss", "RankedBatch", "Replicas", "without_rows", "world_size"]
