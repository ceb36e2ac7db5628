"""Sums over the rows of a class: positives of a supervised loss without a B x B mask.

On CUDA the order of these sums is fixed under `torch.use_deterministic_algorithms` alone, elsewhere always.

Shape letters: B samples, V views of each, K classes, D dim.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gc_accel.losses.kernel.tiling import exact_sum

CLASSES_AT_ONCE, ROWS_AT_ONCE = 1024, 1024


class Classes(NamedTuple):
    """Which of K classes each of B samples has, `(B,)`, and how many samples each class has, `(K,)`."""

    which: Tensor
    sizes: Tensor


def classes_of(labels: Tensor) -> Classes:
    """The classes of samples with labels `(B,)`, any integers."""
    return Classes(*torch.unique(labels, return_inverse=True, return_counts=True)[1:])


def class_sums(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the rows of each class, differentiably.

    Args:
        rows: `(B, D)`.
        labels: `(B,)` integers, any.

    Returns:
        sums `(K, D)` and counts `(K,)` of the K classes, and which of them each row has, `(B,)`. To look rows
        up, use `sums.index_select(0, which)`: the gradient of `sums[which]` adds in any order on CPUs too.
    """
    which, counts = classes_of(labels)
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add(0, which, rows)
    return sums, counts, which


def attraction(views: Tensor, classes: Classes, weights: Tensor, gradient: Tensor | None = None) -> Tensor:
    """The weighted sum, 0-d, of the similarities of each view z_i with all others of its class,

        sum_i w_i z_i.(S - z_i)  =  sum_classes N.S  -  sum_i w_i z_i.z_i,    S = sum z_j,  N = sum w_j z_j

    whose derivative by z_j is N + w_j (S - 2 z_j), with S and N of the class of j. The sums of some classes and
    copies of some rows exist at a time, so that beside the views nothing grows with B D.

    Args:
        views: `(B, V, D)`.
        classes: of the B samples.
        weights: `(B, V)`.
        gradient: `(B, V, D)`, is added to; None: not needed.
    """
    total = exact_sum(views.new_zeros(0))
    for count, members in _classes_in_parts(classes, views.shape[1]):
        sums = views.new_zeros(2, count, views.shape[2])
        for samples, which in members:
            rows, weight = views[samples], weights[samples, :, None]
            sums[0].index_add_(0, which, rows.sum(1))
            sums[1].index_add_(0, which, (weight * rows).sum(1))
            total -= exact_sum(weight * rows.square())
        total += exact_sum(sums[0] * sums[1])
        if gradient is None:
            continue
        for samples, which in members:
            rows, weight, (plain, weighted) = views[samples], weights[samples, :, None], sums[:, which, None]
            gradient.index_add_(0, samples, weighted + weight * (plain - 2 * rows))
    return total


def _classes_in_parts(classes: Classes, views: int) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
    """The classes, some at a time: their number, and their samples, some at a time, each with its class among these."""
    order = classes.which.argsort(stable=True)
    for sizes in classes.sizes.split(CLASSES_AT_ONCE):
        members, order = order.tensor_split([int(sizes.sum())])
        first = classes.which[members[0]]
        parts = members.split(max(1, ROWS_AT_ONCE // views))
        yield len(sizes), [(samples, classes.which[samples] - first) for samples in parts]
