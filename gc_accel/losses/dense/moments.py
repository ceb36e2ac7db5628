"""Twins of the losses over moments of the batch."""

import torch
from torch import Tensor


def barlow_twins_loss(views: Tensor, *, redundancy: float = 5e-3, eps: float = 1e-5) -> Tensor:
    """Twin of `BarlowTwinsLoss`."""
    variance, mean = torch.var_mean(views, 0, correction=0)
    first, second = ((views - mean) / (variance + eps).sqrt()).unbind(1)
    correlation = first.T @ second / len(views)
    target = torch.eye(len(correlation)).to(correlation)
    return ((correlation - target).square() * (target + redundancy * (1 - target))).sum()


def vicreg_loss(
    views: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """Twin of `VICRegLoss`."""
    loss = invariance * (views[:, 0] - views[:, 1]).square().mean()
    for view in views.unbind(1):
        matrix = view.T.cov()
        loss = loss + variance / 2 * (1 - (matrix.diagonal() + eps).sqrt()).relu().mean()
        loss = loss + covariance * (matrix - matrix.diagonal().diag()).square().sum() / len(matrix)
    return loss


def hsic_loss(first: Tensor, second: Tensor, *, gamma: float = 3.0) -> Tensor:
    """Twin of `HSICLoss`, over kernel matrices of `features` from two draws, `(B, V, F)` each."""
    samples, count, _ = first.shape
    rows = samples * count
    centre = torch.eye(rows).to(first) - 1 / rows
    kernel, other = (x.flatten(0, 1) @ x.flatten(0, 1).T for x in (first, second))
    which = torch.arange(samples).repeat_interleave(count)
    together = kernel[which[:, None] == which].sum() / (rows * (count - 1))
    spread = (kernel @ centre @ other @ centre).trace() / rows**2
    return gamma * spread.sqrt() - (together - kernel.mean())
