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


def nt_xent_loss(views: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Twin of `NTXentLoss`."""
    return supcon_loss(views, temperature=temperature)


def supcon_loss(
    views: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    variant: str = "out",
    contrast_mode: str = "all",
    orphans: str = "zero",
) -> Tensor:
    """Twin of `SupConLoss`."""
    is_anchor = torch.zeros(views.shape[:2], dtype=torch.bool)
    is_anchor[:, : views.shape[1] if contrast_mode == "all" else 1] = True
    labels = torch.arange(len(views)) if labels is None else labels
    loss = _contrast(views, labels, is_anchor, temperature, variant=variant, orphans=orphans)
    return loss * temperature / (base_temperature or temperature)


def selfcon_loss(
    views: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    supcon_s: bool = False,
    selfcon_s_FG: bool = False,
    selfcon_m_FG: bool = False,
) -> Tensor:
    """Twin of `SelfConLoss`."""
    images = len(views) // 2 if selfcon_m_FG else len(views)
    labels = torch.arange(images) if labels is None else labels
    is_anchor = torch.ones(views.shape[:2], dtype=torch.bool)
    if selfcon_s_FG or selfcon_m_FG:
        is_anchor[:, -1] = False
    labels = labels.repeat(len(views) // images)
    loss = _contrast(views, labels, is_anchor, temperature, orphans="exclude" if supcon_s else "zero")
    return loss * temperature / (base_temperature or temperature)


def _contrast(
    views: Tensor,
    labels: Tensor,
    is_anchor: Tensor,
    temperature: float,
    *,
    variant: str = "out",
    orphans: str = "zero",
) -> Tensor:
    rows, labels = views.flatten(0, 1), labels.repeat_interleave(views.shape[1])
    others = ~torch.eye(len(rows), dtype=torch.bool)
    positives = others & _matches(len(rows), labels)
    chosen = is_anchor.flatten() & positives.any(1)
    others, positives = others[chosen], positives[chosen]
    logits = rows[chosen] @ rows.T / temperature
    if variant == "out":
        attraction = (logits * positives).sum(1) / positives.sum(1)
    else:
        attraction = logits.masked_fill(~positives, -torch.inf).logsumexp(1)
    terms = logits.masked_fill(~others, -torch.inf).logsumexp(1) - attraction
    return terms.sum() / (is_anchor if orphans == "zero" else chosen).sum().clamp(min=1)


def _logits(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    logits = logit_scale * image @ text.T
    return logits if logit_bias is None else logits + logit_bias


def _matches(size: int, labels: Tensor | None) -> Tensor:
    labels = torch.arange(size) if labels is None else labels
    return labels[:, None] == labels
