"""Views of several resolutions: those of one resolution are encoded together.

Shape letters: C chunk, V views, H, W height and width.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def encode_views(encode: Callable[[Tensor], Tensor], pixel_values: Any) -> Tensor:
    """Encode the views of some samples.

    Args:
        encode: from images `(N, 3, H, W)` to representations `(N, ...)`.
        pixel_values: `(C, V, 3, H, W)`, a list of V tensors `(C, 3, H, W)` of any resolutions, or
            `(C, 3, H, W)`, one view.

    Returns:
        Representations `(C, V, ...)`, views in the order in which they came.

    Raises:
        ValueError: for any other shapes, and views of different numbers of samples.
    """
    views = _as_list(pixel_values)
    places = defaultdict[torch.Size, list[int]](list)
    for place, view in enumerate(views):
        places[view.shape].append(place)
    encoded: dict[int, Tensor] = {}
    for group in places.values():
        together = encode(torch.cat([views[place] for place in group]))
        encoded |= zip(group, together.chunk(len(group)), strict=True)
    return torch.stack([encoded[place] for place in range(len(views))], dim=1)


def _as_list(pixel_values: Any) -> list[Tensor]:
    """One tensor `(C, 3, H, W)` per view."""
    if isinstance(pixel_values, Tensor):
        views = list(pixel_values.unbind(1)) if pixel_values.ndim == 5 else [pixel_values]
    else:
        views = list(pixel_values)
    shapes = [tuple(view.shape) for view in views]
    if not views or {(len(shape), shape[0]) for shape in shapes} != {(4, len(views[0]))}:
        raise ValueError(
            "expected pixel_values (C, V, 3, H, W), a list of V tensors (C, 3, H, W) or one (C, 3, H, W), "
            f"got {shapes}: see gc_accel.data.views.ViewsCollator and fold_views"
        )
    return views
