"""Twins of the losses over pairs of an image and a text."""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    labels: Tensor | None = None,
    negatives: Tensor | None = None,
    *,
    duplicates: str = "attract",
) -> Tensor:
    """Twin of `CLIPLoss`."""
    candidates = text if negatives is None else torch.cat((text, negatives))
    logits = _logits(image, candidates, logit_scale, logit_bias)
    positives = matches(len(image), labels)
    if duplicates == "mask":
        same_class, positives = positives, matches(len(image), None)
        masked = F.pad(same_class & ~positives, (0, len(candidates) - len(text)))
        logits = logits.masked_fill(masked, -torch.inf)
    targets = positives / positives.sum(1, keepdim=True).to(logits)
    square = logits[:, : len(text)]
    attraction = (targets * square.masked_fill(~positives, 0)).sum(1)
    return (logits.logsumexp(1) + square.logsumexp(0) - 2 * attraction).mean() / 2


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Twin of `SigLIPLoss`."""
    logits = _logits(image, text, logit_scale, logit_bias)
    sign = 2 * matches(len(image), labels).to(logits) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def distillation_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: float = 100.0,
) -> Tensor:
    """Twin of `DistillationLoss`."""
    student = _logits(image, text, logit_scale, logit_bias)
    teacher = teacher_scale * teacher_image @ teacher_text.T
    by_row, by_column = (
        F.kl_div(student.log_softmax(dim), teacher.log_softmax(dim), log_target=True, reduction="sum")
        for dim in (1, 0)
    )
    return (by_row + by_column) / (2 * len(image))


def matches(size: int, labels: Tensor | None) -> Tensor:
    """Which samples belong together, `(size, size)`: those of one label, or each with itself alone."""
    labels = torch.arange(size) if labels is None else labels
    return labels[:, None] == labels


def _logits(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    logits = logit_scale * image @ text.T
    return logits if logit_bias is None else logits + logit_bias
