"""Whether captions may be padded to their chunk's own width."""

from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

TOLERANCE = 1e-4  # distance of unit vectors that rounding explains


@torch.no_grad()
def padding_is_inert(encoder: nn.Module, collator: Any) -> bool:
    """Whether the embedding of a caption stays the same however far it is padded.

    Not so in a tower that pools its last position, as SigLIP's does. There each chunk's own width would
    change the result, so that captions have to be padded to the maximum.
    """
    if collator.padding == "max_length" or collator.max_length is None:
        return True
    device = next(encoder.parameters()).device
    short, long = "a", "a " * collator.max_length
    was_training = encoder.training
    encoder.eval()
    alone = encoder(text=send_to_device(collator.tokenize([short]), device))["text"]
    padded = encoder(text=send_to_device(collator.tokenize([short, long]), device))["text"][:1]
    encoder.train(was_training)
    return bool((alone - padded).norm() < TOLERANCE)
