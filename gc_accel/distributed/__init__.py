"""Several ranks as one: what they exchange, how they agree, what scales their gradients and reduces them."""

from gc_accel.distributed.agreement import Agreement
from gc_accel.distributed.collectives import GlobalLoss, RankedBatch, alone, world_size
from gc_accel.distributed.replicas import Replicas

__all__ = ["Agreement", "GlobalLoss", "RankedBatch", "Replicas", "alone", "world_size"]
