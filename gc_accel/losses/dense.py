"""The readable twins: each loss in a few lines over the whole matrix, in one process.

They have the signatures of the streaming losses and serve as the oracles of their tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Twin of `CLIPLoss`."""
    logits = _logits(image, text, logit_scale, logit_bias)
    matches = _matches(len(image), labels).to(logits)
    targets = matches / matches.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Twin of `SigLIPLoss`."""
    logits = _logits(image, text, logit_scale, logit_bias)
    sign = 2 * _matches(len(image), labels).to(logits) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def _logits(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    logits = logit_scale * image @ text.T
    return logits if logit_bias is None else logits + logit_bias


def _matches(size: int, labels: Tensor | None) -> Tensor:
    labels = torch.arange(size) if labels is None else labels
    return labels[:, None] == labels
