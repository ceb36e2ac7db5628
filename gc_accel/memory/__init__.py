"""Memory: how much is taken, how much is free, what fits, and what to do when it has run out."""

from gc_accel.memory.meters import LiveBytes, SavedBytes, peak_memory_mib

__all__ = ["LiveBytes", "SavedBytes", "peak_memory_mib"]
