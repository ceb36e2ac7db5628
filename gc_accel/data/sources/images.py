"""One stored image, in whatever form a row has it, as a PIL image in RGB."""

from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image, ImageOps


def read_image(value: Any, root: Path) -> Image.Image:
    """Decode an image, turned upright, in RGB.

    Args:
        value: a PIL image, encoded bytes, a path or a URL, or ``{"bytes", "path"}``.
        root: the folder from which relative paths count.

    Raises:
        Exception: of almost any kind, even SyntaxError: PIL's decoders raise it on corrupt bytes.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and "://" in value:  # in an archive or on a server
        with fsspec.open(value) as file:
            value = file.read()
    if isinstance(value, Image.Image):
        return _to_rgb(value)
    with Image.open(BytesIO(value) if isinstance(value, bytes) else root / value) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def describe_image(value: Any) -> str:
    """Name a stored image in an error: its path, or how many bytes it has."""
    if isinstance(value, dict):
        value = value.get("path") or value.get("bytes")
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else repr(value)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; what is transparent becomes white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
