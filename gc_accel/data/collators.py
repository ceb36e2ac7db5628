"""From a list of samples to a chunk of tensors.

Images are resized and cropped on the host but stay uint8: a quarter of the bytes of float32 on their way to
the device, where the encoder rescales and normalises them with the statistics from `image_statistics`.

Shape letters: C chunk, H height, W width, L tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose, Normalize
from torchvision.transforms.functional import pil_to_tensor
from transformers import ProcessorMixin

Item = Mapping[str, Any]  # a sample, as a data set returns it
Tensors = dict[str, torch.Tensor]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

# Tokenizers without a limit of their own report one of about 1e30.
UNLIMITED = 10_000

PRECOMPUTED = ("image_embeds", "text_embeds")  # representations of a frozen tower, instead of images or texts
# A text that tells tokenizers apart: cases, digits, marks, accents, other scripts.
PROBE = "Pack my box with FIVE dozen liquor jugs; 1,234.56 naïve façades (東京, Москва) & co. \n #hashtag"


class OpenClipTokenizer(Protocol):
    """What `open_clip.get_tokenizer` returns: texts in, token ids ``(C, L)`` out."""

    def __call__(self, texts: list[str], /) -> torch.Tensor: ...


def image_statistics(processing_class: ProcessorMixin) -> Statistics:
    """Mean and std per channel ``(3,)`` such that ``(pixels / 255 - mean) / std`` is what the processor makes.

    The processor computes ``(pixels * factor - mean) / std``, each part only if it is switched on; both
    statistics are brought to the scale 0 .. 1 of ``pixels / 255``.
    """
    images = processing_class.image_processor
    scale = 255 * images.rescale_factor if images.do_rescale else 255.0
    mean, std = (images.image_mean, images.image_std) if images.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    r, g, b = (value / scale for value in mean)
    std_r, std_g, std_b = (value / scale for value in std)
    return (r, g, b), (std_r, std_g, std_b)


class PairCollator(ABC):
    """Collates samples of images and texts; how each becomes tensors is up to the model's own preprocessing."""

    def __call__(self, items: Sequence[Item | None]) -> Tensors | None:
        """Samples ``{"image": PIL or uint8 (3, H, W), "text", "label"?}`` to a chunk; None if all are None.

        Samples may have representations, ``"image_embeds"`` or ``"text_embeds"`` ``(D,)``, instead of an image or a
        text.

        Returns:
            ``pixel_values`` uint8 ``(C, 3, H, W)``, ``input_ids`` and, if the tokenizer makes one,
            ``attention_mask`` ``(C, L)``, ``labels`` int64 ``(C,)`` if the samples have one.

        Raises:
            ValueError: images are no uint8.
        """
        present = [item for item in items if item is not None]
        if not present:
            return None
        columns = {key: [item[key] for item in present] for key in present[0]}
        chunk = {"pixel_values": _exact_uint8(self._images(columns["image"]))} if "image" in columns else {}
        chunk |= self.tokenize(columns["text"]) if "text" in columns else {}
        chunk |= {key: torch.stack(columns[key]) for key in PRECOMPUTED if key in columns}
        if "label" in columns:
            chunk["labels"] = torch.tensor(columns["label"], dtype=torch.int64)
        return chunk

    @abstractmethod
    def _images(self, images: list[Image.Image | torch.Tensor]) -> torch.Tensor:
        """Resize and crop images to pixels 0 .. 255 ``(C, 3, H, W)`` of any type."""

    @abstractmethod
    def tokenize(self, texts: list[str]) -> Tensors:
        """Captions alone: ``input_ids`` and, if the tokenizer makes one, ``attention_mask`` ``(C, L)``."""

    @abstractmethod
    def token_lengths(self, texts: list[str]) -> list[int]:
        """How many tokens each caption takes in a chunk of which it is the longest."""

    @abstractmethod
    def settings(self, modality: str) -> str:
        """All that decides what becomes of an "image" or a "text", apart from that itself."""

    def _probe(self) -> str:
        return str(self.tokenize([PROBE])["input_ids"].tolist())


class ImageTextCollator(PairCollator):
    """Collate samples with a processor of transformers (CLIP, SigLIP, VisionTextDualEncoder, ...).

    Captions are padded to the longest of the chunk if the tokenizer makes an attention mask, else to the
    maximum length: a model without a mask, such as SigLIP, sees the padding, and was trained on full padding.
    (What decides is ``tokenizer.model_input_names``, which a checkpoint brings along.)

    Args:
        processing_class: with an ``image_processor`` and a ``tokenizer``.
        max_length: in tokens; the tokenizer's own by default. Longer captions are cut.

    Raises:
        ValueError: captions are to be padded to a maximum length and there is none.
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

    def _images(self, images: list[Image.Image | torch.Tensor]) -> torch.Tensor:
        return self.image_processor(
            images, do_rescale=False, do_normalize=False, do_convert_rgb=True, return_tensors="pt"
        )["pixel_values"]

    def tokenize(self, texts: list[str]) -> Tensors:
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
        if self.padding == "max_length":
            return [self.tokenize([""])["input_ids"].shape[1]] * len(texts)
        tokens = self.tokenizer(texts, truncation=self.max_length is not None, max_length=self.max_length)
        return [len(ids) for ids in tokens["input_ids"]]

    def settings(self, modality: str) -> str:
        if modality == "image":
            return self.image_processor.to_json_string()
        return f"{self.padding} {self.tokenizer.padding_side} {self.max_length} {self._probe()}"


class OpenClipCollator(PairCollator):
    """Collate samples for a model of open_clip: its own resizing and cropping, and its own tokenizer.

    Args:
        preprocess_cfg: ``model.visual.preprocess_cfg``. The encoder normalises with its mean and std.
        tokenizer: ``open_clip.get_tokenizer(name)``, which pads every caption to the context length.

    Example:
        >>> model = open_clip.create_model("ViT-B-32")
        >>> collator = OpenClipCollator(model.visual.preprocess_cfg, open_clip.get_tokenizer("ViT-B-32"))
    """

    def __init__(self, preprocess_cfg: Mapping[str, Any], tokenizer: OpenClipTokenizer) -> None:
        self.preprocess_cfg = PreprocessCfg(**preprocess_cfg)
        *resize_and_crop, to_tensor, normalize = image_transform_v2(
            self.preprocess_cfg, is_train=False
        ).transforms
        assert isinstance(to_tensor, MaybeToTensor)
        assert isinstance(normalize, Normalize)
        self.transform = Compose(resize_and_crop)
        self.statistics = (normalize.mean, normalize.std)
        self.tokenizer = tokenizer

    def tokenize(self, texts: list[str]) -> Tensors:
        return {"input_ids": self.tokenizer(texts)}

    def token_lengths(self, texts: list[str]) -> list[int]:
        return [self.tokenizer([""]).shape[1]] * len(texts)

    def settings(self, modality: str) -> str:
        return repr(self.preprocess_cfg) if modality == "image" else self._probe()

    def _images(self, images: list[Image.Image | torch.Tensor]) -> torch.Tensor:
        crops = [self.transform(image) for image in images]
        return torch.stack(
            [crop if isinstance(crop, torch.Tensor) else pil_to_tensor(crop) for crop in crops]
        )


def _exact_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels 0 .. 255 of any type as uint8, of the same shape.

    Raises:
        ValueError: that would change them, or they are scaled to 0 .. 1.
    """
    if pixels.dtype == torch.uint8:
        return pixels
    exact = pixels.to(torch.uint8)
    if not torch.equal(exact.to(pixels.dtype), pixels) or pixels.max() == 1:
        raise ValueError(
            f"expected images with whole values from 0 to 255, got {pixels.dtype} from {pixels.min():.4g} to "
            f"{pixels.max():.4g}: give PIL images or uint8 tensors"
        )
    return exact
