"""What a trainer is built of where less was given: a collator, an encoder, a loss.

All of them raise ValueError for what they cannot make anything of.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from gc_accel.data import ImageTextCollator
from gc_accel.data.padding import padding_is_inert
from gc_accel.encoders import DualEncoder
from gc_accel.losses import LOSSES


def collator_of(processor: ProcessorMixin | None) -> ImageTextCollator:
    """One for images and texts."""
    if processor is None:
        raise ValueError("expected a processing_class or a data_collator, got neither: pass one")
    return ImageTextCollator(processor)


def encoder_of(model: Any, collator: Any) -> Any:
    """An encoder with streams; of a model as published, one that normalises images as its processor would."""
    if hasattr(model, "streams"):
        return model
    mean, std = getattr(collator, "statistics", (None, None))
    return DualEncoder(model, image_mean=mean, image_std=std)


def pad_as_needed(encoder: Any, collator: Any) -> None:
    """Have captions padded to the maximum, if their chunk's own width would change what the encoder makes of them."""
    tokenizes = "text" in encoder.streams and isinstance(collator, ImageTextCollator)
    if tokenizes and not padding_is_inert(encoder, collator):
        collator.padding = "max_length"


def named_loss(loss: str | Callable[..., Tensor] | None, encoder: Any) -> Callable[..., Tensor]:
    """The loss by its name, or by what the encoder is made for."""
    if loss is None and set(encoder.streams) != {"image", "text"}:
        raise ValueError(f"expected a loss for an encoder of {list(encoder.streams)}, got None: pass one")
    if loss is None:
        loss = "siglip" if "logit_bias" in getattr(encoder, "global_names", ()) else "clip"
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"expected a loss among {sorted(LOSSES)} or a callable, got {loss!r}")
    return LOSSES[loss]() if isinstance(loss, str) else loss
