"""Data: the built-in data set, readers for one's own, and collators that make chunks of tensors."""

from gc_accel.data.builtin.digits import HandwrittenDigits
from gc_accel.data.builtin.numbers import (
    HandwrittenNumbers,
    all_captions,
    numbers_config,
    numbers_processor,
)
from gc_accel.data.builtin.passages import NumberPassages, passages_config, passages_tokenizer
from gc_accel.data.builtin.words import number_in_words
from gc_accel.data.collators import ImageTextCollator, OpenClipCollator, image_statistics
from gc_accel.data.loading.loader import ChunkedLoader
from gc_accel.data.loading.plan import BatchPlan
from gc_accel.data.loading.streaming import StreamLoader, StreamPlan
from gc_accel.data.sources.image_text import load_image_text
from gc_accel.data.sources.readers import ImageTextDataset
from gc_accel.data.sources.rows import StreamedRow
from gc_accel.data.sources.triplets import Corpus, TripletCollator, TripletDataset, load_triplets
from gc_accel.data.transforms import (
    handwriting_transform,
    multicrop_transform,
    simclr_transform,
    supcon_transform,
)
from gc_accel.data.views import MultiViewDataset, ViewsCollator, fold_views

__all__ = [
    "BatchPlan",
    "ChunkedLoader",
    "Corpus",
    "HandwrittenDigits",
    "HandwrittenNumbers",
    "ImageTextCollator",
    "ImageTextDataset",
    "MultiViewDataset",
    "NumberPassages",
    "OpenClipCollator",
    "StreamLoader",
    "StreamPlan",
    "StreamedRow",
    "TripletCollator",
    "TripletDataset",
    "ViewsCollator",
    "all_captions",
    "fold_views",
    "handwriting_transform",
    "image_statistics",
    "load_image_text",
    "load_triplets",
    "multicrop_transform",
    "number_in_words",
    "numbers_config",
    "numbers_processor",
    "passages_config",
    "passages_tokenizer",
    "simclr_transform",
    "supcon_transform",
]
