"""Contrast among the views of all samples: what NT-Xent, SupCon and SelfCon have in common.

Of the rows z_i, V views of each of B samples, some are anchors, all are candidates. With the temperature T,
N(i) all rows but i, and P(i) those of them with the class of i (its own sample, where there are no labels),
the loss is T/T_base times the mean over anchors of

    out    LSE_{n in N(i)} z_i.z_n/T  -  1/|P(i)| sum_{p in P(i)} z_i.z_p/T
    in     LSE_{n in N(i)} z_i.z_n/T  -  LSE_{p in P(i)} z_i.z_p/T

(Khosla et al. 2020, arXiv 2004.11362, equations 2 and 3, as means instead of sums; the paper's L_in has
log |P(i)| on top, which has no gradient). Without a mask, the sum over P(i) is z_i.(S - z_i), where S is the
sum of all rows of the class.

So the loss is a sum over anchors whose weights are known beforehand, and its gradient is computed along with it.
All terms add theirs to one tensor: beside it and the views there is no other of B x D.

Shape letters: B samples of this rank, N samples of all ranks, V views, D dim.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gc_accel.losses import statistics
from gc_accel.losses.base import Group, TiledLoss, gather_labels, open_batch
from gc_accel.losses.checks import check_above_zero, check_option
from gc_accel.losses.kernel.classes import attraction, classes_of
from gc_accel.losses.kernel.eager import Gradient, with_gradients
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.losses.kernel.streaming import sum_of_logsumexps
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET, Logits, exact_sum

Variant = Literal["out", "in"]
Orphans = Literal["zero", "exclude", "error"]


class MultiViewLoss(TiledLoss):
    """The options of such a loss and its value, `contrast`; subclasses say which rows are anchors.

    On several ranks each takes its own anchors against the rows of all: one gather of the views, one
    reduce-scatter of their gradients. On a single one, anchors that are all rows need half of the products.

    Args:
        temperature, base_temperature, variant, orphans, process_group, tile_budget: as in `SupConLoss`.

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
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        base_temperature = temperature if base_temperature is None else base_temperature
        check_above_zero("temperatures", temperature, base_temperature)
        super().__init__(temperature, process_group=process_group, tile_budget=tile_budget)
        check_option("variant", variant, Variant)
        check_option("orphans", orphans, Orphans)
        self.base_temperature, self.variant, self.orphans = base_temperature, variant, orphans

    def contrast(self, views: Tensor, labels: Tensor | None, anchored: int) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, V, D)`, of this rank.
            labels: `(B,)` integers, or None: every sample is a class of its own.
            anchored: how many views of each sample, from the first, are anchors.

        Raises:
            ValueError: if there are orphans and they are an "error".
        """
        views, batch = open_batch(self, views)
        candidates = batch.gather(views).contiguous()
        classes = classes_of(gather_labels(labels, batch, views.device))
        self.statistics = statistics.of_views(candidates, classes)
        positives = classes.sizes[classes.which] * views.shape[1] - 1  # of each view of a sample, (N,)
        weights = views.new_zeros(candidates.shape[:2])  # of each row in the mean, (N, V)
        shares = (positives > 0).to(views) / self._count(positives, anchored)
        weights[batch.own, :anchored] = shares[batch.own, None]
        anchors: list[Any] = [
            batch.own
        ]  # all views at once, as they lie in memory, or one view after another
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
                row_classes = classes.which.repeat_interleave(views.shape[1]).view_as(weights)
                total += self._logsumexps(views, gradient, anchors, -weights, row_classes)
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
            views: `(N, V, D)`.
            gradient: `(N, V, D)`, is added to; None: not needed.
            anchors: where among `(N, V)` they are, one matrix of rows after the other.
            weights: `(N, V)`.
            classes: `(N, V)`, or None: all other rows.
        """
        total, scale = exact_sum(views.new_zeros(0)), views.new_full((1,), 1 / self.temperature)
        ids = torch.arange(weights.numel(), device=views.device).view_as(weights)
        by_view = (views, gradient, ids, classes)
        columns, column_grad, column_ids, column_classes = (_rows(x, ...) for x in by_view)
        for place in anchors:
            rows, row_grad, row_ids, row_classes = (_rows(x, place) for x in by_view)
            halved = len(rows) == len(columns)
            pairs = Pairs(row_ids, column_ids, row_classes, column_classes, above_diagonal=halved)
            logits, gradients = Logits(rows, columns, scale, pairs), (row_grad, column_grad)
            total += sum_of_logsumexps(logits, _rows(weights, place), gradients, self.tile_budget)
        return total

    def _count(self, positives: Tensor, anchored: int) -> Tensor | int:
        """The number of anchors in the mean, from the number of positives `(N,)` of each view of a sample."""
        if self.orphans == "exclude":
            return (positives > 0).sum().clamp(min=1) * anchored
        if self.orphans == "error" and (count := int((positives == 0).sum()) * anchored):
            raise ValueError(
                f"expected a positive for every anchor, got {count} of {len(positives) * anchored} without: "
                'give labels that occur twice or more views per sample, or set orphans to "zero" or "exclude"'
            )
        return len(positives) * anchored


def _rows(by_view: Tensor | None, place: Any) -> Any:
    """The rows `(n, ...)` at a place of `(N, V, ...)`, in the same memory; None stays None."""
    return None if by_view is None else by_view[place].view(-1, *by_view.shape[2:])
