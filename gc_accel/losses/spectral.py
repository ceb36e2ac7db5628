"""The spectral contrastive loss (HaoChen et al. 2021, arXiv 2106.04156, equation 6)."""

import torch
from torch import Tensor

from gc_accel.losses.base import BatchLoss, Group, open_views
from gc_accel.losses.checks import check_above_zero
from gc_accel.losses.moments import squared_similarities


class SpectralLoss(BatchLoss):
    """Views x_i, y_i of a sample aligned, views of different samples orthogonal:

        L = 1/mu · [ -2 mean_i x_i.y_i  +  mean_{i≠j} (x_i.y_j)² ]

    as the authors' code has it: rows longer than √mu are cut to that length, the sum is divided by mu. The
    second sum is one over D x D moments or, where there are fewer rows than that pays for, over tiles.

    Args:
        mu: squared radius, above 0.
        process_group: ranks whose batches make up the global batch; None is the default group.
    """

    def __init__(self, mu: float = 1.0, *, process_group: Group = None) -> None:
        super().__init__(process_group=process_group)
        check_above_zero("mu", mu)
        self.mu = mu

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, 2, D)`, of this rank, of any length up to √mu.
            labels: not looked at, so that a labelled data set can be used as it is.

        Raises:
            ValueError: for another shape, and for a global batch of a single sample.
        """
        views, batch = open_views(self, views, at_most=2)
        total, radius = batch.total, self.mu**0.5
        views = views * (radius / torch.linalg.vector_norm(views, dim=2, keepdim=True).clamp(min=radius))
        first, second = views.unbind(1)
        matched = (first * second).sum(1)
        mismatched = squared_similarities(first, second, batch) - batch.sum(matched.square().sum())
        return (mismatched / (total * (total - 1)) - 2 * batch.sum(matched.sum()) / total) / self.mu
