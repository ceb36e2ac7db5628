"""Several ranks as one: what they exchange, how they keep in step, and what scales their gradients."""

from gc_accel.distributed.alignment import Piece, Turn, without_rows
from gc_accel.distributed.collectives import GlobalLoss, RankedBatch, world_size
from gc_accel.distributed.replicas import Replicas

__all__ = ["GlobalLoss", "Piece", "RankedBatch", "Replicas", "Turn", "without_rows", "world_size"]
