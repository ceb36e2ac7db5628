"""SimCLR's normalised temperature-scaled cross-entropy (Chen et al. 2020, arXiv 2002.05709, equation 1)."""

from torch import Tensor

from gc_accel.losses.base import Group
from gc_accel.losses.checks import check_views
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET
from gc_accel.losses.multiview import MultiViewLoss


class NTXentLoss(MultiViewLoss):
    """Every view is an anchor, the other views of its sample are its positives, all other rows candidates:

        L = 1/2B sum_i [ LSE_{n != i} z_i.z_n/T - z_i.z_p(i)/T ],  p(i) the other view of the sample of i

    With more than two views the second term is the mean over the others of the sample, which all stay in the
    denominator: `SupConLoss` without labels. The default temperature is lightly's, SupContrast has 0.07.

    Args:
        temperature: T, above 0.
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.
    """

    def __init__(
        self, temperature: float = 0.5, *, process_group: Group = None, tile_budget: int = DEFAULT_TILE_BUDGET
    ) -> None:
        super().__init__(temperature, process_group=process_group, tile_budget=tile_budget)

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, V, D)`, L2-normalised, V at least 2, of this rank.
            labels: not looked at, so that a labelled data set can be used as it is.

        Raises:
            ValueError: for another shape.
        """
        check_views(views, at_least=2)
        return self.contrast(views, None, anchored=views.shape[1])
