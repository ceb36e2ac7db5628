"""Self-contrastive learning (Bae et al. 2021, arXiv 2106.15499, section 3): exits of a network as views."""

import torch
from torch import Tensor

from gc_accel.losses.base import Group
from gc_accel.losses.checks import check_views
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET
from gc_accel.losses.multiview import MultiViewLoss


class SelfConLoss(MultiViewLoss):
    """SupCon over V features of one image, those of the sub-networks G first and of the backbone F last.

    The flags are those of the authors' ConLoss, which has `base_temperature=0.07`. It is NaN for an anchor
    without a positive, unless `supcon_s` leaves it out; here such an anchor is zero but counted.

    Args:
        temperature: T, above 0.
        base_temperature: T_base, above 0; None: T, so that nothing is rescaled.
        supcon_s: leave anchors without a positive out of the mean, as a batch of single views wants.
        selfcon_s_FG: anchors are the features of G only, all but the last.
        selfcon_m_FG: likewise for two crops of B images, `(2B, V, D)`, first crops before second ones.
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        base_temperature: float | None = None,
        supcon_s: bool = False,
        selfcon_s_FG: bool = False,
        selfcon_m_FG: bool = False,
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(
            temperature,
            base_temperature=base_temperature,
            orphans="exclude" if supcon_s else "zero",
            process_group=process_group,
            tile_budget=tile_budget,
        )
        if selfcon_s_FG and selfcon_m_FG:
            raise ValueError("expected selfcon_s_FG (single crops) or selfcon_m_FG (two crops), got both")
        self.selfcon_s_FG, self.selfcon_m_FG = selfcon_s_FG, selfcon_m_FG

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, V, D)`, L2-normalised, of this rank; `(2B, V, D)` with `selfcon_m_FG`. V is at least 2
                with either of the FG flags.
            labels: `(B,)` integers; None: only features of one image are positives.

        Raises:
            ValueError: for other shapes.
        """
        backbones = 2 if self.selfcon_m_FG else 1 if self.selfcon_s_FG else 0  # views that are no anchors
        check_views(views, at_least=2 if backbones else 1)
        if self.selfcon_m_FG:
            views = _crops_as_features(views)
        check_views(views, labels)
        return self.contrast(views, labels, anchored=views.shape[1] - backbones)


def _crops_as_features(views: Tensor) -> Tensor:
    """`(2B, V, D)` to `(B, 2V, D)`: the first exit of both crops, the second of both, ..., both backbones."""
    if len(views) % 2:
        raise ValueError(
            f"expected two crops of every image, got {len(views)} rows: all first crops, then all second ones"
        )
    first, second = views.chunk(2)
    return torch.stack((first, second), 2).flatten(1, 2)
