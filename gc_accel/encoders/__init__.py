"""Encoders: any published model behind one forward that the gradient cache can call stream by stream."""

from gc_accel.encoders.dual import DualEncoder

__all__ = ["DualEncoder"]
