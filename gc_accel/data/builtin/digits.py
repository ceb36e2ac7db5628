"""The built-in images with labels: handwritten digits, for single-encoder training."""

from typing import Any

import torch
from torchvision.transforms.v2.functional import resize

from gc_accel.data.builtin.scans import Split, load_scans


class HandwrittenDigits(torch.utils.data.Dataset[dict[str, Any]]):
    """Scans of single digits: 1,437 for training and 360 for testing, stratified by digit.

    An item is ``{"image": uint8 (3, S, S), "label": 0 .. 9}``.

    Args:
        split: "train" or "test".
        seed: decides which scans are for testing, for results over several splits.
        image_size: S; the 8 x 8 scans are enlarged to it, bilinearly.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, split: Split, *, seed: int = 0, image_size: int = 32) -> None:
        if image_size < 1:
            raise ValueError(f"expected image_size of at least 1 pixel, got {image_size}")
        scans, labels = load_scans(split, seed=seed)
        self.pixels = resize(torch.from_numpy(scans)[:, None], [image_size, image_size], antialias=True)
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.pixels[index].repeat(3, 1, 1), "label": int(self.labels[index])}
