"""Encoders: any published model behind one forward that the gradient cache can call stream by stream."""

from gc_accel.encoders.dual import DualEncoder
from gc_accel.encoders.full_batch_head import FullBatchHead
from gc_accel.encoders.retriever import Retriever
from gc_accel.encoders.vision import VisionEncoder

__all__ = ["DualEncoder", "FullBatchHead", "Retriever", "VisionEncoder"]
