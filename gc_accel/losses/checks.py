"""What losses ask of their inputs and options.

Shape letters: B samples of this rank, V views, H hard negatives, D dim.
"""

from typing import Any, get_args

import torch
from torch import Tensor


def check_pairs(
    image: Tensor, text: Tensor, labels: Tensor | None = None, negatives: Tensor | None = None
) -> None:
    """Raise ValueError unless image and text are `(B, D)`, and, if given, labels `(B,)`, negatives `(H, D)`."""
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"expected image and text of one shape (B, D), got {tuple(image.shape)} and {tuple(text.shape)}: "
            "row i of one belongs to row i of the other"
        )
    if labels is not None and labels.shape != image.shape[:1]:
        raise ValueError(f"expected a label per pair, shape ({len(image)},), got {tuple(labels.shape)}")
    if negatives is not None and (negatives.ndim != 2 or negatives.shape[1] != image.shape[1]):
        raise ValueError(f"expected negatives of shape (H, {image.shape[1]}), got {tuple(negatives.shape)}")


def check_views(
    views: Tensor, labels: Tensor | None = None, *, at_least: int = 1, at_most: int | None = None
) -> None:
    """Raise ValueError unless views are `(B, V, D)` with V in range, and labels, if given, `(B,)`."""
    if views.ndim != 3 or views.shape[1] < at_least:
        raise ValueError(
            f"expected views of shape (B, V, D) with V of at least {at_least}, got {tuple(views.shape)}: "
            "stack the views of a sample along dimension 1"
        )
    if at_most is not None and views.shape[1] > at_most:
        raise ValueError(
            f"expected {at_most} views of each sample, got {views.shape[1]} in {tuple(views.shape)}"
        )
    if labels is not None and labels.shape != views.shape[:1]:
        raise ValueError(f"expected a label per sample, shape ({len(views)},), got {tuple(labels.shape)}")


def check_option(name: str, value: str, allowed: Any) -> None:
    """Raise ValueError unless `value` is one of those that the `Literal` type allows."""
    if value not in get_args(allowed):
        raise ValueError(f"expected {name} to be one of {get_args(allowed)}, got {value!r}")


def check_above_zero(names: str, *values: float) -> None:
    """Raise ValueError, in which the values have these names, unless all of them are above 0."""
    if any(value <= 0 for value in values):
        raise ValueError(f"expected {names} above 0, got {' and '.join(map(str, values))}")


def full_precision(*tensors: Tensor | None) -> list:
    """Half precision to float32; float32, float64 and None stay."""
    half = (torch.float16, torch.bfloat16)
    return [x.float() if x is not None and x.dtype in half else x for x in tensors]
