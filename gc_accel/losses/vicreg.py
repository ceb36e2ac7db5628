"""Variance-invariance-covariance regularisation (Bardes et al. 2022, arXiv 2105.04906, equation 6)."""

from torch import Tensor

from gc_accel.losses.base import BatchLoss, Group, open_views
from gc_accel.losses.moments import centred, squared_cross_moment


class VICRegLoss(BatchLoss):
    """Views that agree, in dimensions that vary and are uncorrelated, all over the global batch:

        L = λ mean (x - y)²  +  μ/2 sum_z mean_k relu(1 - √(Var_k(z) + ε))  +  ν/D sum_z sum_{k≠l} Cov_kl(z)²

    with the unbiased variance and covariance, and z either of the two views.

    Args:
        invariance: λ.
        variance: μ.
        covariance: ν.
        eps: ε.
        process_group: ranks whose batches make up the global batch; None is the default group.
    """

    def __init__(
        self,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        *,
        eps: float = 1e-4,
        process_group: Group = None,
    ) -> None:
        super().__init__(process_group=process_group)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.eps = eps

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, 2, D)`, of this rank: outputs of a projector as they are, *not* L2-normalised, for on
                the unit sphere no dimension reaches the standard deviation of 1 that is asked for.
            labels: not looked at, so that a labelled data set can be used as it is.

        Raises:
            ValueError: for another shape, and for a global batch of a single sample.
        """
        views, batch = open_views(self, views, at_most=2)
        total, dim = batch.total, views.shape[2]
        distance = batch.sum((views[:, 0] - views[:, 1]).square().sum()) / (total * dim)
        views = centred(views, batch)
        variance = batch.sum(views.square().sum(0)) / (total - 1)  # (2, D)
        hinge = (1 - (variance + self.eps).sqrt()).relu().mean()
        moments = sum(squared_cross_moment(view, view, batch) for view in views.unbind(1))
        off_diagonal = moments / (total - 1) ** 2 - variance.square().sum()
        return self.invariance * distance + self.variance * hinge + self.covariance * off_diagonal / dim
