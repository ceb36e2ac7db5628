"""From a list of samples to a chunk of tensors.

Images are resized and cropped on the host but stay uint8: a quarter of the bytes of float32 on their way to
the device, where the encoder rescales and normalises them with the statistics from `image_statistics`.

Shape letters: C chunk, H height, W width, L tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose, Normalize
from torchvision.transforms.functional import pil_to_tensor
from transformers import ProcessorMixin

Item = Mapping[str, Any]
Chunk = dict[str, torch.Tensor]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

# Tokenizers without a limit of their own report one of about 1e30.
UNLIMITED = 10_000


class OpenClipTokenizer(Protocol):
    """What `open_clip.get_tokenizer` returns: texts in, token ids ``(C, L)`` out."""

    def __call__(self, texts: list[str], /) -> torch.Tensor: ...


def image_statistics(processing_class: ProcessorMixin) -> Statistics:
    """Mean and std per channel such that ``(pixels / 255 - mean) / std`` is what the processor makes.

    The processor computes ``(pixels * factor - mean) / std``, each part only if it is switched on; both
    statistics are brought to the scale 0 .. 1 of ``pixels / 255``.
    """
    images = processing_class.image_processor
    scale = 255 * images.rescale_factor if images.do_rescale else 255.0
    mean, std = (images.image_mean, images.image_std) if images.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    r, g, b = (value / scale for value in mean)
    std_r, std_g, std_b = (value / scale for value in std)
    return (r, g, b), (std_r, std_g, std_b)


class ImageTextCollator:
    """Collate samples with a processor of transformers (CLIP, SigLIP, VisionTextDualEncoder, ...).

    Captions are padded to the longest of the chunk if the tokenizer makes an attention mask, else to the
    maximum length: a model without a mask, such as SigLIP, sees the padding, and was trained on full padding.
    (What decides is ``tokenizer.model_input_names``, which a checkpoint brings along.)

    Args:
        processing_class: with an ``image_processor`` and a ``tokenizer``.
        max_length: in tokens; the tokenizer's own by default. Longer captions are cut.

    Raises:
        ValueError: captions are to be padded to a maximum length and there is none; images are no uint8.
    """

    def __init__(self, processing_class: ProcessorMixin, *, max_length: int | None = None) -> None:
        self.image_processor = processing_class.image_processor
        self.tokenizer = processing_class.tokenizer
        self.statistics = image_statistics(processing_class)
        if max_length is None and self.tokenizer.model_max_length < UNLIMITED:
            max_length = self.tokenizer.model_max_length
        self.max_length = max_length
        self.padding = "longest" if "attention_mask" in self.tokenizer.model_input_names else "max_length"
        if self.padding == "max_length" and max_length is None:
            raise ValueError(
                "expected a maximum length, because captions without an attention mask are padded to it, "
                f"got a tokenizer with model_max_length {self.tokenizer.model_max_length}: pass max_length"
            )

    def __call__(self, items: Sequence[Item | None]) -> Chunk | None:
        """Samples ``{"image": PIL or uint8 (3, H, W), "text", "label"?}`` to a chunk; None if all are None.

        Returns:
            ``pixel_values`` uint8 ``(C, 3, H, W)``, ``input_ids`` and, if the tokenizer makes one,
            ``attention_mask`` ``(C, L)``, ``labels`` int64 ``(C,)`` if the samples have one.
        """
        present = [item for item in items if item is not None]
        if not present:
            return None
        return {
            "pixel_values": self._images([item["image"] for item in present]),
            **self.tokenize([item["text"] for item in present]),
            **_labels(present),
        }

    def _images(self, images: list[Image.Image | torch.Tensor]) -> torch.Tensor:
        raw = self.image_processor(
            images, do_rescale=False, do_normalize=False, do_convert_rgb=True, return_tensors="pt"
        )
        return _exact_uint8(raw["pixel_values"])

    def tokenize(self, texts: list[str]) -> Chunk:
        """Captions alone: ``input_ids`` and, if the tokenizer makes one, ``attention_mask`` ``(C, L)``."""
        tokens = self.tokenizer(
            texts,
            padding=self.padding,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_tensors="pt",
        )
        # token_type_ids of one segment are all zero, which is the models' default.
        return {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}

    def token_lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each caption, as many as its chunk is padded to if it is the longest."""
        if self.padding == "max_length":
            return [self.tokenize([""])["input_ids"].shape[1]] * len(texts)
        tokens = self.tokenizer(texts, truncation=self.max_length is not None, max_length=self.max_length)
        return [len(ids) for ids in tokens["input_ids"]]


class OpenClipCollator:
    """Collate samples for a model of open_clip: its own resizing and cropping, and its own tokenizer.

    Args:
        preprocess_cfg: ``model.visual.preprocess_cfg``. The encoder normalises with its mean and std.
        tokenizer: ``open_clip.get_tokenizer(name)``.

    Example:
        >>> model = open_clip.create_model("ViT-B-32")
        >>> collator = OpenClipCollator(model.visual.preprocess_cfg, open_clip.get_tokenizer("ViT-B-32"))
    """

    def __init__(self, preprocess_cfg: Mapping[str, Any], tokenizer: OpenClipTokenizer) -> None:
        *resize_and_crop, to_tensor, normalize = image_transform_v2(
            PreprocessCfg(**preprocess_cfg), is_train=False
        ).transforms
        assert isinstance(to_tensor, MaybeToTensor)
        assert isinstance(normalize, Normalize)
        self.transform = Compose(resize_and_crop)
        self.statistics = (normalize.mean, normalize.std)
        self.tokenizer = tokenizer

    def __call__(self, items: Sequence[Item | None]) -> Chunk | None:
        """Samples ``{"image": PIL or uint8 (3, H, W), "text", "label"?}`` to a chunk; None if all are None.

        Returns:
            ``pixel_values`` uint8 ``(C, 3, H, W)``, ``input_ids`` ``(C, L)``, and ``labels`` int64 ``(C,)``
            if the samples have one.
        """
        present = [item for item in items if item is not None]
        if not present:
            return None
        return {
            "pixel_values": _exact_uint8(torch.stack([self._image(item["image"]) for item in present])),
            **self.tokenize([item["text"] for item in present]),
            **_labels(present),
        }

    def tokenize(self, texts: list[str]) -> Chunk:
        """Captions alone: ``input_ids`` ``(C, L)``."""
        return {"input_ids": self.tokenizer(texts)}

    def token_lengths(self, texts: list[str]) -> list[int]:
        """The context length for each caption: models of open_clip take no shorter ones."""
        return [self.tokenizer([""]).shape[1]] * len(texts)

    def _image(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        image = self.transform(image)
        return image if isinstance(image, torch.Tensor) else pil_to_tensor(image)


def _labels(items: Sequence[Item]) -> Chunk:
    if "label" not in items[0]:
        return {}
    return {"labels": torch.tensor([item["label"] for item in items], dtype=torch.int64)}


def _exact_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels 0 .. 255 of any type as uint8; refuses what that would change, and images scaled to 0 .. 1."""
    if pixels.dtype == torch.uint8:
        return pixels
    exact = pixels.to(torch.uint8)
    if not torch.equal(exact.to(pixels.dtype), pixels) or pixels.max() == 1:
        raise ValueError(
            f"expected images with whole values from 0 to 255, got {pixels.dtype} from {pixels.min():.4g} to "
            f"{pixels.max():.4g}: give PIL images or uint8 tensors"
        )
    return exact
