"""From uint8 images, a quarter of the bytes on their way to the device, to normalised ones there."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PixelNorm(nn.Module):
    """Rescale and normalise uint8 images; hand over all others, which are taken to be normalised already.

    Args:
        image_mean: per channel, in 0..1 (see `gc_accel.data.image_statistics`).
        image_std: per channel.

    Raises:
        ValueError: one of the two is missing; later, for uint8 images, if both are.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, image_mean: Sequence[float] | None, image_std: Sequence[float] | None) -> None:
        super().__init__()
        statistics = (image_mean, image_std)
        if (image_mean is None) != (image_std is None):
            raise ValueError(f"expected both image_mean and image_std or neither, got {statistics}")
        for name, values in zip(("mean", "std"), statistics, strict=True):
            buffer = None if values is None else torch.tensor(values).reshape(-1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images `(C, 3, H, W)`, normalised."""
        if pixels.dtype != torch.uint8:
            return pixels
        if self.mean is None or self.std is None:
            raise ValueError(
                "expected image_mean and image_std for uint8 images, got an encoder without: pass it "
                "both, or hand over images that are already normalised"
            )
        return (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
