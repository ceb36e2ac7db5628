"""What losses ask of their inputs: paired rows, full precision."""

import torch
from torch import Tensor


def check_pairs(image: Tensor, text: Tensor, labels: Tensor | None) -> None:
    """Raise ValueError unless image and text are `(B, D)` each, and labels, if given, `(B,)`."""
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"expected image and text of one shape (B, D), got {tuple(image.shape)} and {tuple(text.shape)}: "
            "row i of one belongs to row i of the other"
        )
    if labels is not None and labels.shape != image.shape[:1]:
        raise ValueError(f"expected a label per pair, shape ({len(image)},), got {tuple(labels.shape)}")


def full_precision(*tensors: Tensor | None) -> list:
    """Half precision to float32; float32 and float64 stay."""
    half = (torch.float16, torch.bfloat16)
    return [each.float() if each is not None and each.dtype in half else each for each in tensors]
