"""Data: the built-in data set, readers for one's own, and collators that make chunks of tensors."""

from gc_accel.data.collators import ImageTextCollator, OpenClipCollator, image_statistics
from gc_accel.data.digits import HandwrittenDigits
from gc_accel.data.loader import BatchPlan, ChunkedLoader
from gc_accel.data.numbers import (
    HandwrittenNumbers,
    all_captions,
    number_in_words,
    numbers_config,
    numbers_processor,
)
from gc_accel.data.readers import ImageTextDataset, load_image_text
from gc_accel.data.transforms import multicrop_transform, simclr_transform, supcon_transform
from gc_accel.data.views import MultiViewDataset, ViewsCollator, fold_views

__all__ = [
    "BatchPlan",
    "ChunkedLoader",
    "HandwrittenDigits",
    "HandwrittenNumbers",
    "ImageTextCollator",
    "ImageTextDataset",
    "MultiViewDataset",
    "OpenClipCollator",
    "ViewsCollator",
    "all_captions",
    "fold_views",
    "image_statistics",
    "load_image_text",
    "multicrop_transform",
    "number_in_words",
    "numbers_config",
    "numbers_processor",
    "simclr_transform",
    "supcon_transform",
]
