"""What a batch looks like to a loss, for the logs: numbers that its tiles and sums yield at no extra product.

No statistic takes part in the gradient or depends on the number of ranks. Similarities are those of the
representations, without the logit scale; a mean over no pair at all is NaN.

Shape letters: B samples of this rank, N samples of all ranks, V views, D dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gc_accel.distributed import RankedBatch
from gc_accel.losses.kernel.classes import Classes, attraction, class_sums, classes_of
from gc_accel.losses.kernel.tiling import exact_sum


class Similarities(NamedTuple):
    """For each image, the sum of its similarities to some texts, `(B,)`, and the number of those texts, `(B,)`."""

    sums: Tensor
    counts: Tensor


def similarities_within(image: Tensor, texts: Tensor, classes: Tensor, batch: RankedBatch) -> Similarities:
    """The similarities of each image to the texts of its class.

    Args:
        image: `(B, D)`, of this rank.
        texts: `(N, D)`.
        classes: `(N,)`.
        batch: the ranks.
    """
    sums, counts, which = class_sums(texts, classes)
    which = which[batch.own]
    return Similarities((image * sums.index_select(0, which)).sum(1), counts[which])


@torch.no_grad()
def of_pairs(
    batch: RankedBatch,
    image: Tensor,
    texts: Tensor,
    hits: Tensor,
    positives: Similarities,
    same_class: Similarities,
) -> dict[str, Tensor]:
    """Statistics of image-text pairs, of the global batch.

    Args:
        batch: the ranks.
        image: `(B, D)`, of this rank.
        texts: `(N, D)`.
        hits: `(B,)`, whether the nearest text of an image is one of its class.
        positives: to the texts that are positives.
        same_class: to the texts that are no negatives: positives and masked ones.

    Returns:
        `in_batch_r1`, the share of hits; `positive_similarity` and `negative_similarity`, means over pairs.
    """
    everything = (image.sum(0) * texts.sum(0)).sum()  # no product that autocast would round
    shares = (
        hits.sum(),
        positives.sums.sum(),
        positives.counts.sum(),
        everything - same_class.sums.sum(),
        len(image) * len(texts) - same_class.counts.sum(),
    )
    hit, near, near_count, far, far_count = batch.sum(torch.stack([share.to(image) for share in shares]))
    return {
        "in_batch_r1": hit / batch.total,
        "positive_similarity": _mean(near, near_count),
        "negative_similarity": _mean(far, far_count),
    }


@torch.no_grad()
def of_views(views: Tensor, classes: Classes) -> dict[str, Tensor]:
    """Statistics of the views of all samples, each pair of different views counted.

    Args:
        views: `(N, V, D)`.
        classes: of the N samples.

    Returns:
        `positive_similarity` and `negative_similarity`, means over pairs of one class and of two.
    """
    positive = attraction(views, classes, views.new_ones(views.shape[:2]))
    diagonal = exact_sum(torch.linalg.vector_norm(views, dim=2).square())
    negative = exact_sum(views.sum((0, 1)).square()) - diagonal - positive
    counts = classes.sizes * views.shape[1]
    size, pairs = counts.sum(), counts.square().sum()
    return {
        "positive_similarity": _mean(positive.to(views), pairs - size),
        "negative_similarity": _mean(negative.to(views), size**2 - pairs),
    }


def of_samples(views: Tensor) -> dict[str, Tensor]:
    """The statistics of views `(N, V, D)` where every sample is a class of its own."""
    return of_views(views, classes_of(torch.arange(len(views), device=views.device)))


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count, torch.nan)
