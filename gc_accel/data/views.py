"""Several views of every sample: they are drawn, collated, and folded out of older layouts.

A batch of views has the sample as its first dimension, `(C, V, 3, H, W)`, so that it can be cut anywhere
without parting the views of a sample.

Shape letters: B batch, C chunk, V views, H height, W width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsIndex

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gc_accel.data.collators import Item
from gc_accel.data.epochs import EpochDataset


def fold_views(
    pixel_values: Tensor,
    views: int = 2,
    *,
    views_layout: Literal["view_major", "sample_major"] = "view_major",
) -> Tensor:
    """Fold views that lie in one long batch, `(V * B, 3, H, W)`, to `(B, V, 3, H, W)`.

    Call this on the whole batch, before it is cut into chunks: half of a chunk of `[view1; view2]` are not the
    second views of its first half.

    Args:
        pixel_values: `[view1; view2]`, as SimCLR's and SupCon's scripts concatenate whole views
            ("view_major"), or view 1 and 2 of the first sample, then those of the second ("sample_major").
        views: V.
        views_layout: which of the two layouts it is.

    Raises:
        ValueError: the length is no multiple of `views`, or the layout is another.

    Example:
        >>> batch = {"pixel_values": fold_views(torch.cat([view1, view2])), "labels": labels}
    """
    if views < 1 or len(pixel_values) % views:
        raise ValueError(
            f"expected a multiple of {views} images, as many as views, got {len(pixel_values)}: concatenate "
            "whole views, and fold the batch before it is cut"
        )
    if views_layout == "view_major":
        return pixel_values.unflatten(0, (views, -1)).transpose(0, 1)
    if views_layout == "sample_major":
        return pixel_values.unflatten(0, (-1, views))
    raise ValueError(f"expected views_layout 'view_major' or 'sample_major', got {views_layout!r}")


class MultiViewDataset(EpochDataset):
    """Views of the images of another data set, the same for the same seed, epoch and index.

    An item is ``{"views": ...}``, with "label" if the sample has one. A sample that the data set leaves out (None)
    is left out here.

    Args:
        dataset: has samples ``{"image", "label"?}``, map-style or over a stream.
        transform: from an image to its views, such as `simclr_transform(32)`. It must draw from torch's
            default generator, as torchvision's transforms do, and not from `random` or numpy.
        seed: random seed of the views.
    """

    def __init__(
        self, dataset: Dataset[Any], transform: Callable[[Any], Tensor | list[Tensor]], *, seed: int = 0
    ) -> None:
        super().__init__(seed)
        self.dataset: Any = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def stream(self) -> datasets.IterableDataset | None:
        """The rows of the data set, if they are a stream."""
        return getattr(self.dataset, "stream", None)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any] | None:
        sample = self.dataset[index]
        if sample is None:
            return None
        entropy = self._seed_of(index).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would reach for the generators of the accelerators too.
            torch.default_generator.manual_seed(int(entropy[0]))
            views = self.transform(sample["image"])
        return {"views": views} | {key: sample[key] for key in ("label",) if key in sample}

    @property
    def skipped(self) -> int:
        """How many times the data set left a sample out."""
        return getattr(self.dataset, "skipped", 0)


class ViewsCollator:
    """Collate samples of views to a chunk for `VisionEncoder` and its loss."""

    def __call__(self, items: Sequence[Item | None]) -> dict[str, Any] | None:
        """Samples ``{"views", "label"?}`` to a chunk; None if all are None.

        Returns:
            ``pixel_values`` ``(C, V, 3, H, W)``, or a list of V tensors ``(C, 3, H, W)`` if the samples have
            lists; ``labels`` int64 ``(C,)`` if the samples have one.

        Raises:
            ValueError: samples differ in the number or size of their views.
        """
        present = [item for item in items if item is not None]
        if not present:
            return None
        views = [item["views"] for item in present]
        shapes = {tuple(tuple(view.shape) for view in crops) for crops in views}
        if len(shapes) > 1:
            raise ValueError(f"expected the same views of every sample, got the shapes {sorted(shapes)}")
        if isinstance(views[0], Tensor):
            chunk: dict[str, Any] = {"pixel_values": torch.stack(views)}
        else:
            chunk = {"pixel_values": [torch.stack(view) for view in zip(*views, strict=True)]}
        if "label" in present[0]:
            chunk["labels"] = torch.tensor([item["label"] for item in present], dtype=torch.int64)
        return chunk
