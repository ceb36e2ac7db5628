"""Twins of the losses over the views of a sample that contrast them with those of others."""

import torch
from torch import Tensor

from gc_accel.losses.dense.pairs import matches


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
    positives = others & matches(len(rows), labels)
    chosen = is_anchor.flatten() & positives.any(1)
    others, positives = others[chosen], positives[chosen]
    logits = rows[chosen] @ rows.T / temperature
    if variant == "out":
        attraction = (logits * positives).sum(1) / positives.sum(1)
    else:
        attraction = logits.masked_fill(~positives, -torch.inf).logsumexp(1)
    terms = logits.masked_fill(~others, -torch.inf).logsumexp(1) - attraction
    return terms.sum() / (is_anchor if orphans == "zero" else chosen).sum().clamp(min=1)


def dcl_loss(views: Tensor, *, temperature: float = 0.1, weights: Tensor | float = 1.0) -> Tensor:
    """Twin of `DCLLoss`; `weights` of the positives of each sample, `(B, 1)`."""
    rows, samples = views.flatten(0, 1), torch.arange(len(views)).repeat_interleave(views.shape[1])
    logits, same_sample = rows @ rows.T / temperature, samples[:, None] == samples
    siblings = same_sample & ~torch.eye(len(rows), dtype=torch.bool)
    attraction = (logits * siblings).sum(1) / siblings.sum(1)
    repulsion = logits.masked_fill(same_sample, -torch.inf).logsumexp(1)
    return (repulsion.view(views.shape[:2]) - weights * attraction.view(views.shape[:2])).mean()


def dclw_loss(
    views: Tensor, *, temperature: float = 0.1, sigma: float = 0.5, detach_weight: bool = False
) -> Tensor:
    """Twin of `DCLWLoss`."""
    similarity = (views[:, 0] * views[:, 1]).sum(1, keepdim=True)
    weights = 2 - len(views) * (similarity / sigma).softmax(0)
    return dcl_loss(views, temperature=temperature, weights=weights.detach() if detach_weight else weights)


def align_uniform_loss(
    views: Tensor, *, alpha: float = 2.0, t: float = 2.0, uniformity: float = 1.0
) -> Tensor:
    """Twin of `AlignUniformLoss`."""
    first, second = views.unbind(1)
    alignment = (first - second).norm(dim=1).pow(alpha).mean()
    distances = [(z[:, None] - z).square().sum(2) for z in (first, second)]
    above = torch.ones(len(views), len(views), dtype=torch.bool).triu(1)
    return alignment + uniformity / 2 * sum((-t * x[above]).exp().mean().log() for x in distances)


def spectral_loss(views: Tensor, *, mu: float = 1.0) -> Tensor:
    """Twin of `SpectralLoss`."""
    length = views.norm(dim=2, keepdim=True)
    first, second = torch.where(length > mu**0.5, views / length * mu**0.5, views).unbind(1)
    similarity, others = first @ second.T, ~torch.eye(len(views), dtype=torch.bool)
    return (similarity[others].square().mean() - 2 * similarity.diagonal().mean()) / mu
