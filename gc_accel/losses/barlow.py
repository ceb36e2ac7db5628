"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230, equation 1)."""

from torch import Tensor

from gc_accel.losses.base import BatchLoss, Group, open_views
from gc_accel.losses.moments import centred, gathered_sum, squared_cross_moment


class BarlowTwinsLoss(BatchLoss):
    """The cross-correlation of two views, over the global batch, close to the identity:

        L = sum_k (1 - C_kk)² + λ sum_{k≠l} C_kl²,   C = ÂᵀB̂/B

    where Â and B̂ have each dimension standardised as BatchNorm does (biased variance plus epsilon). Averaging
    the correlations of several ranks, as is common, is another loss: each rank has its own standardisation.

    Args:
        redundancy: λ.
        eps: added to the variance.
        process_group: ranks whose batches make up the global batch; None is the default group.
    """

    def __init__(self, redundancy: float = 5e-3, *, eps: float = 1e-5, process_group: Group = None) -> None:
        super().__init__(process_group=process_group)
        self.redundancy, self.eps = redundancy, eps

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, 2, D)`, of this rank: outputs of a projector as they are, *not* L2-normalised.
            labels: not looked at, so that a labelled data set can be used as it is.

        Raises:
            ValueError: for another shape, and for a global batch of a single sample.
        """
        views, batch = open_views(self, views, at_most=2)
        views = centred(views, batch)
        variance = gathered_sum(views.square().sum(0), batch) / batch.total
        first, second = (views / (variance + self.eps).sqrt()).unbind(1)
        diagonal = batch.sum((first * second).sum(0)) / batch.total
        off_diagonal = squared_cross_moment(first, second, batch) / batch.total**2 - diagonal.square().sum()
        return (1 - diagonal).square().sum() + self.redundancy * off_diagonal
