"""Contrast among the views of all samples: what NT-Xent, SupCon and SelfCon have in common.

Of the rows z_i, V views of each of B samples, some are anchors, all are candidates. With the temperature T,
N(i) all rows but i, and P(i) those of them with the class of i (its own sample, where there are no labels),
the loss is T/T_base times the mean over anchors of

    out    LSE_{n in N(i)} z_i.z_n/T  -  1/|P(i)| sum_{p in P(i)} z_i.z_p/T
    in     LSE_{n in N(i)} z_i.z_n/T  -  LSE_{p in P(i)} z_i.z_p/T

(Khosla et al. 2020, arXiv 2004.11362, equations 2 and 3, as means instead of sums; the paper's L_in has
log |P(i)| on top, which has no gradient). Without a mask, the sum over P(i) is z_i.(S - z_i), where S is the
sum of all rows of the class.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gc_accel.distributed import GlobalLoss, RankedBatch
from gc_accel.losses import statistics
from gc_accel.losses.classes import class_sums
from gc_accel.losses.inputs import check_option, full_precision
from gc_accel.losses.pairs import Pairs
from gc_accel.losses.streaming import logsumexp_over_pairs
from gc_accel.losses.tiling import DEFAULT_TILE_BUDGET

Variant = Literal["out", "in"]
Orphans = Literal["zero", "exclude", "error"]


class MultiViewLoss(GlobalLoss):
    """The options of such a loss and its value, `contrast`; subclasses say which rows are anchors.

    On several ranks each takes its own anchors against the rows of all: one gather of the views, one
    reduce-scatter of their gradients. On a single one, anchors that are all rows need half of the products.

    Args:
        temperature: T, above 0.
        base_temperature: T_base, above 0; None: T, so that nothing is rescaled.
        variant: positives outside of the logarithm, "out", or inside, "in".
        orphans: what becomes of anchors without a positive: "zero" and counted in the mean, "exclude" from
            the mean (0 if nothing is left), or "error".
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.

    `statistics` has `positive_similarity` and `negative_similarity` of the latest call, 0-d: the means over
    all pairs of views of one class and of two.
    """

    def __init__(
        self,
        temperature: float,
        *,
        base_temperature: float | None = None,
        variant: Variant = "out",
        orphans: Orphans = "zero",
        process_group: dist.ProcessGroup | None = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__()
        base_temperature = temperature if base_temperature is None else base_temperature
        if temperature <= 0 or base_temperature <= 0:
            raise ValueError(f"expected temperatures above 0, got {temperature} and {base_temperature}")
        check_option("variant", variant, Variant)
        check_option("orphans", orphans, Orphans)
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.variant = variant
        self.orphans = orphans
        self.process_group = process_group
        self.tile_budget = tile_budget
        self.statistics: dict[str, Tensor] = {}

    def contrast(self, views: Tensor, labels: Tensor | None, anchored: int) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, V, D)`, of this rank.
            labels: `(B,)` integers, or None: every sample is a class of its own.
            anchored: how many views of each sample, from the first, are anchors.

        Raises:
            ValueError: if there are orphans and they are an "error".
        """
        (views,) = full_precision(views)
        batch = RankedBatch(len(views), views.device, self.process_group)
        candidates = batch.gather(views)
        samples, per_sample = candidates.shape[:2]
        classes = torch.arange(samples, device=views.device) if labels is None else batch.gather(labels)
        sums, sizes, classes = class_sums(candidates.sum(1), classes)
        positives = sizes[classes] * per_sample - 1  # of each view of a sample, (B,)
        counted = self._count(positives, anchored)
        self.statistics = statistics.of_views(candidates, sums, sizes * per_sample)

        anchors, own_classes, positives = views[:, :anchored], classes[batch.own], positives[batch.own, None]
        scale = views.new_full((1,), 1 / self.temperature)
        ids = torch.arange(samples * per_sample, device=views.device).view(samples, per_sample)
        own_ids, ids = ids[batch.own, :anchored].flatten(), ids.flatten()
        all_others = Pairs(own_ids, ids, above_diagonal=len(own_ids) == len(ids))

        def logsumexp(pairs: Pairs) -> Tensor:
            rows, columns = anchors.flatten(0, 1), candidates.flatten(0, 1)
            found = logsumexp_over_pairs(rows, columns, scale, pairs, tile_budget=self.tile_budget)
            return found.view(anchors.shape[:2])

        if self.variant == "out":
            siblings = sums.index_select(0, own_classes)[:, None] - anchors
            attraction = scale * (anchors * siblings).sum(2) / positives.clamp(min=1)
        else:
            row_classes, column_classes = classes[own_ids // per_sample], classes[ids // per_sample]
            attraction = logsumexp(
                all_others._replace(row_classes=row_classes, column_classes=column_classes)
            )
        terms = torch.where(positives > 0, logsumexp(all_others) - attraction, 0)
        return batch.sum(terms.sum() / counted) * (self.temperature / self.base_temperature)

    def _count(self, positives: Tensor, anchored: int) -> Tensor | int:
        """The number of anchors in the mean, from the number of positives `(B,)` in the global batch."""
        if self.orphans == "exclude":
            return (positives > 0).sum().clamp(min=1) * anchored
        if self.orphans == "error" and (count := int((positives == 0).sum()) * anchored):
            raise ValueError(
                f"expected a positive for every anchor, got {count} of {len(positives) * anchored} without: "
                'give labels that occur twice or more views per sample, or set orphans to "zero" or "exclude"'
            )
        return len(positives) * anchored
