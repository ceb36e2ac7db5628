"""Random views of one image, for contrastive learning without captions.

The recipes of SimCLR (arXiv 2002.05709, appendix A), SupCon (arXiv 2004.11362, the authors' code) and
multi-crop (SwAV, arXiv 2006.09882, with the crop scales of DINO, arXiv 2104.14294). They suit photographs.
What colour jitter, flips and small crops take from small grey scans is what tells them apart;
`handwriting_transform` bends these instead, as another hand would have.

Views stay uint8 on the host; the encoder normalises them on the device. All draws come from torch's default
generator.

Shape letters: V views, H height, W width.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

View = Callable[[Tensor], Tensor]
Range = tuple[float, float]


class MultiView:
    """Maps an image to one view of each transform."""

    def __init__(self, transforms: Sequence[View]) -> None:
        self.transforms = list(transforms)
        self.to_rgb = v2.Compose([v2.ToImage(), v2.RGB(), v2.ToPureTensor()])

    def __call__(self, image: Image.Image | Tensor) -> Tensor | list[Tensor]:
        """Draw the views of a PIL image or a uint8 tensor ``(3, H, W)`` or ``(1, H, W)``.

        Returns:
            uint8 ``(V, 3, H, W)`` if all views have one resolution, else a list of V tensors ``(3, H, W)``.

        Raises:
            ValueError: the image is a tensor of another type.
        """
        pixels = self.to_rgb(image)
        if pixels.dtype != torch.uint8:
            raise ValueError(f"expected a PIL image or a uint8 tensor, got {pixels.dtype}: do not rescale it")
        views = [transform(pixels) for transform in self.transforms]
        return torch.stack(views) if len({view.shape for view in views}) == 1 else views


def simclr_transform(
    size: int,
    *,
    views: int = 2,
    crop_scale: Range = (0.08, 1.0),
    jitter: float = 1.0,
    flip: float = 0.5,
    grayscale: float = 0.2,
    blur: float = 0.5,
) -> MultiView:
    """Views of SimCLR: random crop, flip, strong colour jitter, greyscale, blur.

    Args:
        size: pixels per side of a view.
        views: V.
        crop_scale: smallest and largest part of the image's area in a view.
        jitter: strength of the colour jitter, which falls on 80 % of the views; 0 leaves colours alone.
        flip: probability of a horizontal flip.
        grayscale: probability of losing the colours.
        blur: probability of a Gaussian blur.

    Raises:
        ValueError: there is no view or no pixel, or a parameter is out of range.
    """
    view = _view(size, crop_scale, jitter=jitter, flip=flip, grayscale=grayscale, blur=blur)
    return _repeated([view], [views])


def supcon_transform(
    size: int,
    *,
    views: int = 2,
    crop_scale: Range = (0.2, 1.0),
    jitter: float = 0.5,
    flip: float = 0.5,
    grayscale: float = 0.2,
    blur: float = 0.0,
) -> MultiView:
    """Views of SupCon: as `simclr_transform`, with larger crops, half the jitter and no blur.

    Raises:
        ValueError: there is no view or no pixel, or a parameter is out of range.
    """
    options = {"jitter": jitter, "flip": flip, "grayscale": grayscale, "blur": blur}
    return simclr_transform(size, views=views, crop_scale=crop_scale, **options)


def multicrop_transform(
    sizes: Sequence[int] = (224, 96),
    counts: Sequence[int] = (2, 6),
    *,
    crop_scales: Sequence[Range] = ((0.4, 1.0), (0.05, 0.4)),
    jitter: float = 1.0,
    flip: float = 0.5,
    grayscale: float = 0.2,
    blur: float = 0.5,
) -> MultiView:
    """Views of several resolutions: a few of much of the image, then many small ones of little of it.

    Args:
        sizes: pixels per side, by resolution.
        counts: number of views, by resolution.
        crop_scales: `crop_scale` of `simclr_transform`, by resolution.
        jitter, flip, grayscale, blur: as in `simclr_transform`, for all views.

    Raises:
        ValueError: the three differ in length, or a parameter is out of range.
    """
    if not len(sizes) == len(counts) == len(crop_scales):
        raise ValueError(
            "expected as many sizes as counts and crop_scales, got "
            f"{len(sizes)}, {len(counts)} and {len(crop_scales)}: give one of each per resolution"
        )
    views = [
        _view(size, scale, jitter=jitter, flip=flip, grayscale=grayscale, blur=blur)
        for size, scale in zip(sizes, crop_scales, strict=True)
    ]
    return _repeated(views, counts)


def handwriting_transform(size: int, *, views: int = 2, strength: float = 1.0) -> MultiView:
    """Views of scans of handwriting: rotated, moved, scaled, sheared and warped.

    The elastic distortions are those of Simard et al. 2003 (Best practices for convolutional neural networks
    applied to visual document analysis).

    Args:
        size: pixels per side of a view.
        views: V.
        strength: 1 turns by 15 degrees, moves by a tenth of a side and scales by a fifth at most, and warps
            by about a fiftieth of a side; all grow in proportion. 0 leaves the scan as it is.

    Raises:
        ValueError: there is no view or no pixel, or the strength is out of range.
    """
    if size < 1 or not 0 <= strength <= 4:
        raise ValueError(
            f"expected a size of at least 1 and a strength from 0 to 4, got {size} and {strength}"
        )
    bent = v2.RandomAffine(
        15 * strength,
        translate=(0.1 * strength, 0.1 * strength),
        scale=(1 - 0.2 * strength, 1 + 0.2 * strength),
        shear=15 * strength,
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    warped = v2.ElasticTransform(0.02 * size**2 * strength, sigma=size / 8)
    return _repeated([v2.Compose([v2.Resize((size, size), antialias=True), bent, warped])], [views])


def _view(
    size: int, crop_scale: Range, *, jitter: float, flip: float, grayscale: float, blur: float
) -> v2.Compose:
    if size < 1:
        raise ValueError(f"expected a size of at least 1 pixel, got {size}")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"expected 0 < low <= high <= 1 for crop_scale, got {crop_scale}")
    if not 0 <= jitter <= 2.5:
        raise ValueError(f"expected jitter from 0 to 2.5, at which hues are random, got {jitter}")
    probabilities = {"flip": flip, "grayscale": grayscale, "blur": blur}
    if wrong := {name: value for name, value in probabilities.items() if not 0 <= value <= 1}:
        raise ValueError(f"expected probabilities from 0 to 1, got {wrong}")
    colours = v2.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter)
    kernel = size // 10 // 2 * 2 + 1  # a tenth of the view, made odd
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, crop_scale, antialias=True),
            v2.RandomHorizontalFlip(flip),
            v2.RandomApply([colours], 0.8),
            v2.RandomGrayscale(grayscale),
            v2.RandomApply([v2.GaussianBlur(max(kernel, 3), (0.1, 2.0))], blur),
        ]
    )


def _repeated(views: Sequence[View], counts: Sequence[int]) -> MultiView:
    if min(counts) < 1:
        raise ValueError(f"expected at least one view of every kind, got {list(counts)}")
    return MultiView([view for view, count in zip(views, counts, strict=True) for _ in range(count)])
