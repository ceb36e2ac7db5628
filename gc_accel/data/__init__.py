"""Data: the built-in data set, readers for one's own, and collators that make chunks of tensors."""

from gc_accel.data.collators import ImageTextCollator, OpenClipCollator, image_statistics
from gc_accel.data.loader import BatchPlan, ChunkedLoader
from gc_accel.data.numbers import (
    HandwrittenNumbers,
    all_captions,
    number_in_words,
    numbers_config,
    numbers_processor,
)
from gc_accel.data.readers import ImageTextDataset, load_image_text

__all__ = [
    "BatchPlan",
    "ChunkedLoader",
    "HandwrittenNumbers",
    "ImageTextCollator",
    "ImageTextDataset",
    "OpenClipCollator",
    "all_captions",
    "image_statistics",
    "load_image_text",
    "number_in_words",
    "numbers_config",
    "numbers_processor",
]
