"""CLIP models of random weights, and batches for them with captions of a realistic length.

Caption lengths are drawn from a lognormal distribution of given mean and sigma, rounded and cut off so that a
caption has at most 77 tokens with its start and its end. Sigma is 0.5 unless said otherwise: with a mean of 12 the
median is 10.6, the middle half lies between 8 and 15, and the longest of a thousand has about 50.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from gc_accel import DualEncoder

Batch = dict[str, Tensor]
START, END, PAD, WORDS = 1, 999, 0, 1000
CONTEXT = 77  # tokens, start and end included
PATCH, DIM = 16, 128


@dataclass(frozen=True)
class Clip:
    """A CLIP: width and layers of each tower, the side of an image in pixels."""

    image: tuple[int, int] = (256, 4)
    text: tuple[int, int] = (128, 2)
    side: int = 64

    def encoder(self, dropout: float = 0.0, freeze: Sequence = ()) -> DualEncoder:
        """A fresh one in training mode, the same for the same torch seed; dropout is that of attention."""
        config = CLIPConfig(
            vision_config=_tower(*self.image, dropout) | {"image_size": self.side, "patch_size": PATCH},
            text_config=_tower(*self.text, dropout)
            | {"vocab_size": WORDS, "max_position_embeddings": CONTEXT}
            | {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD},
            projection_dim=DIM,
        )
        return DualEncoder(CLIPModel(config).train(), freeze=freeze)

    def batch(self, lengths: Sequence[int]) -> Batch:
        """Random images and captions of these lengths, padded to the longest."""
        return {"pixel_values": torch.randn(len(lengths), 3, self.side, self.side)} | captions(lengths)


TINY = Clip(image=(64, 1), text=(64, 1), side=32)


def captions(lengths: Sequence[int]) -> Batch:
    """`input_ids` and `attention_mask` `(B, L)` of random words between a start and an end."""
    ends = torch.tensor(lengths)[:, None] - 1
    columns = torch.arange(max(lengths))
    ids = torch.randint(START + 1, END, (len(lengths), max(lengths)))
    ids[:, 0] = START
    ids = ids.masked_fill(columns == ends, END).masked_fill(columns > ends, PAD)
    return {"input_ids": ids, "attention_mask": (columns <= ends).long()}


def caption_lengths(size: int, *, mean: float = 12.0, sigma: float = 0.5) -> list[int]:
    """Tokens of each of `size` captions, start and end included, from torch's generator."""
    drawn = torch.empty(size).log_normal_(log(mean) - sigma**2 / 2, sigma)
    return (drawn.round().clamp(1, CONTEXT - 2).long() + 2).tolist()


def _tower(width: int, layers: int, dropout: float) -> dict:
    heads = max(1, width // 64)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads, "attention_dropout": dropout}
