"""In place of `grad_cache_con_learning.losses`: SupCon and SelfCon with a mask, over the batch of one process.

The formulas, and the streaming without a mask matrix, are those of `gc_accel/losses/multiview.py`. A given `mask`
takes the place of the classes and needs the memory of all pairs. On several ranks these losses stay with the
batch of their rank, as the originals do; the losses of the same names in `gc_accel.losses` reach over all ranks.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gc_accel.losses.checks import check_option, full_precision
from gc_accel.losses.multiview import MultiViewLoss, Orphans

ContrastMode = Literal["all", "one"]

# No process group at all, rather than None, which stands for all ranks.
ALONE: Any = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None


class SupConLoss(nn.Module):
    """Supervised contrastive learning (Khosla et al. 2020, arXiv 2004.11362, equation 2), SimCLR without labels.

    An anchor without a positive is zero but counted.

    Args:
        temperature: T, above 0.
        contrast_mode: anchors are "all" views, or "one", the first of each sample.
        base_temperature: T_base; the loss is multiplied by T/T_base.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: ContrastMode = "all",
        base_temperature: float = 0.07,
    ) -> None:
        super().__init__()
        check_option("contrast_mode", contrast_mode, ContrastMode)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The loss, 0-d.

        Args:
            features: `(B, V, ...)`, L2-normalised; what follows the views is flattened.
            labels: `(B,)`; samples of one label are positives of one another.
            mask: `(B, B)`, in place of labels: the weight of sample j as a positive of sample i.

        Raises:
            ValueError: for other shapes, or labels and a mask.
        """
        features = _flat(features)
        anchored = features.shape[1] if self.contrast_mode == "all" else 1
        return self._contrast(features, labels, mask, anchored, "zero")

    def _contrast(
        self, views: Tensor, labels: Tensor | None, mask: Tensor | None, anchored: int, orphans: Orphans
    ) -> Tensor:
        if labels is not None and mask is not None:
            raise ValueError("expected labels or a mask, got both")
        if labels is not None and labels.numel() != len(views):
            raise ValueError(f"expected a label per sample, {len(views)}, got {labels.numel()}")
        loss = MultiViewLoss(
            self.temperature, base_temperature=self.base_temperature, orphans=orphans, process_group=ALONE
        )
        if mask is None:
            return loss.contrast(views, None if labels is None else labels.flatten(), anchored)
        rescaled = self.temperature / self.base_temperature
        return rescaled * _masked(views, mask, anchored, self.temperature, orphans)


class ConLoss(SupConLoss):
    """Self-contrastive learning (Bae et al. 2021, arXiv 2106.15499): exits of a network as views, backbone last.

    An anchor without a positive is zero but counted; the original returns NaN.
    """

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        supcon_s: bool = False,
        selfcon_s_FG: bool = False,
        selfcon_m_FG: bool = False,
    ) -> Tensor:
        """The loss, 0-d.

        Args:
            features: `(B, V, ...)`, or `(2B, V, ...)` with `selfcon_m_FG`, first crops before second ones.
            labels: `(B,)`, or None.
            mask: `(B, B)`, in place of labels.
            supcon_s: leave anchors without a positive out of the mean.
            selfcon_s_FG: anchors are the exits only.
            selfcon_m_FG: likewise, for two crops of B images.

        Raises:
            ValueError: for other shapes, labels and a mask, or both of the FG flags.
        """
        if selfcon_s_FG and selfcon_m_FG:
            raise ValueError("expected selfcon_s_FG (single crops) or selfcon_m_FG (two crops), got both")
        features = _flat(features)
        anchored = features.shape[1] if self.contrast_mode == "all" else 1
        if selfcon_s_FG or selfcon_m_FG:
            anchored = features.shape[1] - 1
        if selfcon_m_FG:
            features, anchored = _both_crops(features), 2 * anchored
        return self._contrast(features, labels, mask, anchored, "exclude" if supcon_s else "zero")


def _flat(features: Tensor) -> Tensor:
    if features.ndim < 3:
        raise ValueError(
            f"expected features of shape (B, V, ...), got {tuple(features.shape)}: stack the views"
        )
    return features.flatten(2)


def _both_crops(features: Tensor) -> Tensor:
    """`(2B, V, D)` to `(B, 2V, D)`, both crops of an exit side by side, so that the backbones come last."""
    if len(features) % 2:
        raise ValueError(f"expected two crops of every image, got {len(features)} rows")
    return torch.stack(features.chunk(2), dim=2).flatten(1, 2)


def _masked(views: Tensor, mask: Tensor, anchored: int, temperature: float, orphans: Orphans) -> Tensor:
    """Mean over anchors of LSE_{n != i} s_in - sum_p w_ip s_ip / sum_p w_ip, over the full matrix of s."""
    if mask.shape != (len(views), len(views)):
        raise ValueError(f"expected a mask of shape ({len(views)}, {len(views)}), got {tuple(mask.shape)}")
    (views,) = full_precision(views)
    rows = views.transpose(0, 1).flatten(0, 1)  # by view, so that the mask repeats as it is
    anchors = rows[: anchored * len(views)]
    logits = anchors @ rows.T / temperature
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)[: len(anchors)]
    weights = mask.to(logits).repeat(anchored, views.shape[1]).masked_fill(itself, 0)
    total = weights.sum(1)
    attraction = (logits * weights).sum(1) / total.where(total > 0, 1)
    terms = (logits.masked_fill(itself, -torch.inf).logsumexp(1) - attraction).where(total > 0, 0)
    return terms.sum() / ((total > 0).sum().clamp(min=1) if orphans == "exclude" else len(terms))
