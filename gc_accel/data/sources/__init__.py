"""Sources of data of one's own: folders, tables, shards, the hub."""

from gc_accel.data.sources.image_text import load_image_text

__all__ = ["load_image_text"]
