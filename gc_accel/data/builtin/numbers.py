"""The built-in data set: handwritten numbers with captions in English words.

An image shows a number of three or four digits, composed of scikit-learn's 1,797 scans of handwritten
digits (8 x 8 pixels, Alpaydin and Kaynak 1998, in the wheel: no download); the caption says it in words.
The scans are divided once and for all into 80 % for training and 20 % for testing, the same for every seed,
so a test image never shows a scan that was trained on. Test numbers are all distinct, so that retrieval has
one right answer; training numbers are drawn with replacement, so duplicates occur as they do in real data.

Shape letters: N images, S image size.
"""

from copy import copy
from hashlib import sha256
from math import log
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPConfig, CLIPImageProcessor, CLIPProcessor

from gc_accel.data.builtin.scans import SCAN, Split, check_split, load_scans
from gc_accel.data.builtin.words import WORDS, number_in_words, word_tokenizer

TEMPLATE = "a photo of the number {}"
# HF CLIP pools its text tower at the highest token id when eos_token_id is 2, so <end> must not be number 2.
SPECIAL = ("<pad>", "<start>", "<unk>", "<end>")
INITIAL_SCALE = 40.0
MAX_TOKENS = 16  # the longest caption of four digits has 15 tokens, <start> and <end> included


def all_captions(digits: int = 4) -> tuple[list[int], list[str]]:
    """All numbers of ``digits`` digits with their captions, which are the candidates of a zero-shot evaluation."""
    numbers = list(range(10 ** (digits - 1), 10**digits))
    return numbers, [TEMPLATE.format(number_in_words(n)) for n in numbers]


class HandwrittenNumbers(torch.utils.data.Dataset[dict[str, Any]]):
    """Images of handwritten numbers and their captions, composed at construction (one byte per pixel).

    An item is ``{"image": uint8 (3, S, S), "text": the caption, "label": the number}``.

    Args:
        split: decides which scans are used; "test" also makes all numbers distinct.
        size: how many images. In the train split, a smaller set is the beginning of a larger one.
        digits: 3 (100 to 999) or 4 (1000 to 9999).
        seed: draws the numbers, the scans and their positions. It does not move scans between the splits.
        image_size: S, at least 8 times ``digits``.

    Raises:
        ValueError: an argument is out of range, or ``size`` exceeds the distinct numbers of the test split.
    """

    def __init__(
        self, split: Split, *, size: int, digits: int = 4, seed: int = 0, image_size: int = 32
    ) -> None:
        check_split(split)
        if digits not in (3, 4):
            raise ValueError(f"expected digits to be 3 or 4, got {digits}")
        if image_size < SCAN * digits:
            raise ValueError(f"expected image_size of at least {SCAN * digits} pixels, got {image_size}")
        # One generator per quantity: each then yields the same beginning for every size.
        rngs = [np.random.default_rng((seed, split == "test", quantity)) for quantity in range(3)]
        self.numbers = _draw_numbers(split, size, digits, rngs[0])
        scans = _draw_scans(split, self.numbers, digits, rngs[1])
        self.pixels = _compose(scans, image_size, rngs[2])
        self.modalities = frozenset({"image", "text"})  # those that an item has

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.numbers[index])
        item: dict[str, Any] = {"label": number}
        if "image" in self.modalities:
            item["image"] = torch.from_numpy(self.pixels[index]).repeat(3, 1, 1)
        if "text" in self.modalities:
            item["text"] = TEMPLATE.format(number_in_words(number))
        return item

    def texts(self, indices: list[int]) -> list[str]:
        """The captions of some samples; no image is made."""
        return [TEMPLATE.format(number_in_words(int(number))) for number in self.numbers[indices]]

    def without(self, modality: str) -> "HandwrittenNumbers":
        """The same samples without their "image" or their "text"."""
        rest = copy(self)
        rest.modalities = self.modalities - {modality}
        return rest

    def fingerprint(self, modality: str) -> str:
        """A string that tells all images or all texts from others."""
        return sha256((self.pixels if modality == "image" else self.numbers).tobytes()).hexdigest()


def _draw_numbers(split: str, size: int, digits: int, rng: np.random.Generator) -> np.ndarray:
    low, high = 10 ** (digits - 1), 10**digits
    if split == "train":
        return rng.integers(low, high, size=size)
    if size > high - low:
        raise ValueError(
            f"expected size of at most {high - low}, the distinct numbers of {digits} digits, got {size}"
        )
    return rng.permutation(np.arange(low, high))[:size]


def _draw_scans(split: Split, numbers: np.ndarray, digits: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one scan of the split for every digit of every number: uint8 ``(N, digits, 8, 8)``."""
    scans, labels = load_scans(split)
    order = np.argsort(labels, kind="stable")
    count = np.bincount(labels, minlength=10)
    start = np.cumsum(count) - count

    values = numbers[:, None] // 10 ** np.arange(digits)[::-1] % 10
    picks = start[values] + (rng.random(values.shape) * count[values]).astype(int)
    return scans[order[picks]]


def _compose(scans: np.ndarray, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """Set scans ``(N, digits, 8, 8)`` side by side on black ``(N, S, S)``, each number on one of S / 8 lines."""
    n, digits = scans.shape[:2]
    rows = SCAN * rng.integers(0, image_size // SCAN, size=(n, 1)) + np.arange(SCAN)
    left = (image_size - SCAN * digits) // 2
    images = np.zeros((n, image_size, image_size), dtype=np.uint8)
    for place in range(digits):
        columns = slice(left + SCAN * place, left + SCAN * (place + 1))
        images[np.arange(n)[:, None], rows, columns] = scans[:, place]
    return images


def numbers_processor(*, image_size: int = 32) -> CLIPProcessor:
    """Build the processor of this data set: one token per word, images normalised to -1 .. 1."""
    words = [*SPECIAL, *TEMPLATE.format("").split(), *WORDS.split(), "and", "-"]
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor, word_tokenizer(words, Whitespace(), MAX_TOKENS))


def numbers_config(*, image_size: int = 32, width: int = 128, layers: int = 2, heads: int = 8) -> CLIPConfig:
    """Configure a small CLIP for this data set: two towers of one depth, 8 x 8 patches.

    The text tower has half the width of the image tower: words are the easier side. The logit scale begins at
    40 rather than CLIP's 14.3: in a few hundred steps it would not get there, and numbers that differ in one
    digit want a sharp softmax (docs/log.md).
    """
    tokenizer = numbers_processor().tokenizer

    def tower(width: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "hidden_act": "gelu",
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }

    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(
        vision_config=tower(width, heads) | {"image_size": image_size, "patch_size": SCAN},
        text_config=tower(width // 2, heads // 2) | text,
        projection_dim=width,
        logit_scale_init_value=log(INITIAL_SCALE),
    )
