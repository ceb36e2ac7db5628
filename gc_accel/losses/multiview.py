"""Contrast among the views of all samples: what NT-Xent, SupCon and SelfCon have in common.

Of the rows z_i, V views of each of B samples, some are anchors, all are candidates. With the temperature T,
N(i) all rows but i, and P(i) those of them with the class of i (its own sample, where there are no labels),
the loss is T/T_base times the mean over anchors of

    out    LSE_{n in N(i)} z_i.z_n/T  -  1/|P(i)| sum_{p in P(i)} z_i.z_p/T
    in     LSE_{n in N(i)} z_i.z_n/T  -  LSE_{p in P(i)} z_i.z_p/T

(Khosla et al. 2020, arXiv 2004.11362, equations 2 and 3, as means instead of sums; the paper's L_in has
log |P(i)| on top, which has no gradient). Without a mask, the sum over P(i) is z_i.(S - z_i), where S is the
sum of all rows of the class.

So the loss is a sum over anchors whose weights are known beforehand, and its gradient is had along with it. All
terms add theirs to one tensor: beside it and the views there is no other of B x D.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gc_accel.distributed import GlobalLoss, RankedBatch
from gc_accel.losses import statistics
from gc_accel.losses.inputs import check_option, full_precision
from gc_accel.losses.kernel.classes import attraction, classes_of
from gc_accel.losses.kernel.eager import Gradient, with_gradients
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.losses.kernel.streaming import sum_of_logsumexps
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET, Logits, exact_sum

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
        candidates = batch.gather(views).contiguous()
        labels = torch.arange(batch.total, device=views.device) if labels is None else batch.gather(labels)
        classes = classes_of(labels)
        self.statistics = statistics.of_views(candidates, classes)
        positives = classes.sizes[classes.which] * views.shape[1] - 1  # of each view of a sample, (B,)
        weights = views.new_zeros(candidates.shape[:2])  # of each row in the mean
        shares = (positives > 0).to(views) / self._count(positives, anchored)
        weights[batch.own, :anchored] = shares[batch.own, None]
        anchors: list[Any] = [
            batch.own
        ]  # one matrix of all views, as they lie in memory, or of one view each
        if anchored < views.shape[1]:
            anchors = [(batch.own, view) for view in range(anchored)]

        def compute(inputs: tuple[Any, ...], needed: tuple[bool, ...]) -> tuple[Tensor, tuple[Gradient]]:
            (views,) = inputs
            gradient = torch.zeros_like(views) if needed[0] else None
            total = self._logsumexps(views, gradient, anchors, weights)
            if self.variant == "out":
                per_pair = weights / positives.clamp(min=1)[:, None] * (-1 / self.temperature)
                total += attraction(views, classes, per_pair, gradient)
            else:
                of_rows = classes.which.repeat_interleave(views.shape[1]).view_as(weights)
                total += self._logsumexps(views, gradient, anchors, -weights, of_rows)
            return total.to(views), (gradient,)

        return batch.sum(with_gradients(compute, candidates)) * (self.temperature / self.base_temperature)

    def _logsumexps(
        self,
        views: Tensor,
        gradient: Gradient,
        anchors: Sequence[Any],
        weights: Tensor,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Weighted sum of the log-sum-exps of anchors, over all other rows or those of their class; 0-d.

        Args:
            views: `(B, V, D)`, of the global batch.
            gradient: `(B, V, D)`, is added to; None: is not wanted.
            anchors: where among `(B, V)` they are, one matrix of rows after the other.
            weights: `(B, V)`.
            classes: `(B, V)`, or None: all other rows.
        """
        total, scale = exact_sum(views.new_zeros(0)), views.new_full((1,), 1 / self.temperature)
        ids = torch.arange(weights.numel(), device=views.device).view_as(weights)
        of_all = (views, gradient, ids, classes)
        columns, to_columns, column_ids, column_classes = (_rows(each, ...) for each in of_all)
        for place in anchors:
            rows, to_rows, row_ids, row_classes = (_rows(each, place) for each in of_all)
            halved = len(rows) == len(columns)
            pairs = Pairs(row_ids, column_ids, row_classes, column_classes, above_diagonal=halved)
            logits, into = Logits(rows, columns, scale, pairs), (to_rows, to_columns)
            total += sum_of_logsumexps(logits, _rows(weights, place), into, tile_budget=self.tile_budget)
        return total

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


def _rows(each: Tensor | None, place: Any) -> Any:
    """What the rows at a place of `(B, V, ...)` have, in the same memory."""
    return None if each is None else each[place].view(-1, *each.shape[2:])
