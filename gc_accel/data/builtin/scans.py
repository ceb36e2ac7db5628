"""scikit-learn's 1,797 scans of handwritten digits, in the wheel: no download.

From Alpaydin and Kaynak 1998, 8 x 8 pixels, white on black.
"""

from typing import Literal

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Split = Literal["train", "test"]
SCAN = 8  # pixels per side


def check_split(split: str) -> None:
    """Check the name of a split.

    Raises:
        ValueError: it is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"expected split 'train' or 'test', got {split!r}")


def load_scans(split: Split, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Load the scans of a split and the digits they show: uint8 ``(N, 8, 8)`` and int64 ``(N,)``.

    Of every digit 80 % are for training and 20 % for testing; ``seed`` decides which.

    Raises:
        ValueError: ``split`` is neither "train" nor "test".
    """
    check_split(split)
    data = load_digits()
    rows = train_test_split(
        np.arange(len(data.target)), test_size=0.2, stratify=data.target, random_state=seed
    )
    chosen = rows[split == "test"]
    return np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8), data.target[chosen]
