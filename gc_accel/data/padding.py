"""Whether captions may be padded to their chunk's own width."""

from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from gc_accel.state.modules import in_mode

TOLERANCE = 1e-4  # distance of unit vectors that rounding explains
LONG = 32  # words of a caption that stands for any long one, where the tokenizer has no limit


@torch.no_grad()
def padding_is_inert(encoder: nn.Module, collator: Any) -> bool:
    """Whether the embedding of a caption stays the same however far it is padded, on either side.

    It does not in a tower that pools its last position, as SigLIP's does, or where padding on the left moves the
    positions that a tower counts. There each chunk's own width would change the result, so that captions have to
    be padded to the maximum. (Rotary positions may move: a decoder's captions are padded to their chunk's width.)

    Args:
        encoder: has a "text" stream.
        collator: an `ImageTextCollator`.

    Raises:
        ValueError: it does not stay the same, and the collator knows no maximum length to pad to.
    """
    if collator.padding == "max_length":
        return True
    device = next(encoder.parameters()).device
    short, long = "a", "a " * (collator.max_length or LONG)
    with in_mode(encoder, training=False):
        alone = encoder(text=send_to_device(collator.tokenize([short]), device))["text"]
        padded = encoder(text=send_to_device(collator.tokenize([short, long]), device))["text"][:1]
    inert = bool((alone - padded).norm() < TOLERANCE)
    if not inert and collator.max_length is None:
        raise ValueError(
            "expected a maximum length, because the text tower sees how far captions are padded, got a tokenizer "
            "without: pass max_length to the collator"
        )
    return inert
