"""Supervised contrastive learning (Khosla et al. 2020, arXiv 2004.11362): `MultiViewLoss` with labels."""

from typing import Literal

from torch import Tensor

from gc_accel.losses.base import Group
from gc_accel.losses.checks import check_option, check_views
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET
from gc_accel.losses.multiview import MultiViewLoss, Orphans, Variant

ContrastMode = Literal["all", "one"]


class SupConLoss(MultiViewLoss):
    """All rows of an anchor's class attract it; the formulas stand in `multiview.py`.

    Where implementations differ: "out" is the paper's equation 2, as in SupContrast; "in" is equation 3 as in
    solo-learn, without 1/|P(i)| inside the logarithm. SupContrast multiplies by T/0.07, whatever T: for its
    values give `base_temperature=0.07`. Orphans are zero but counted, as in SupContrast;
    pytorch-metric-learning excludes them, others return NaN or infinity.

    Args:
        temperature: T, above 0.
        base_temperature: T_base, above 0; None: T, so that nothing is rescaled.
        variant: positives outside of the logarithm, "out", or inside, "in".
        contrast_mode: anchors are "all" views, or "one", the first of each sample. All are candidates.
        orphans: what becomes of anchors without a positive: "zero" and counted in the mean, "exclude" from
            the mean (0 if nothing is left), or "error".
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        base_temperature: float | None = None,
        variant: Variant = "out",
        contrast_mode: ContrastMode = "all",
        orphans: Orphans = "zero",
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(
            temperature,
            base_temperature=base_temperature,
            variant=variant,
            orphans=orphans,
            process_group=process_group,
            tile_budget=tile_budget,
        )
        check_option("contrast_mode", contrast_mode, ContrastMode)
        self.contrast_mode = contrast_mode

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, V, D)`, L2-normalised, of this rank.
            labels: `(B,)` integers; None: only views of one sample are positives (NT-Xent).

        Raises:
            ValueError: for other shapes; for anchors without a positive if `orphans` is "error".
        """
        check_views(views, labels)
        return self.contrast(views, labels, anchored=views.shape[1] if self.contrast_mode == "all" else 1)
