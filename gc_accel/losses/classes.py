"""Sums over the rows of a class: positives of a supervised loss without a B x B mask."""

import torch
from torch import Tensor


def class_sums(rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the rows of each class.

    On CUDA the order of the sum is fixed under `torch.use_deterministic_algorithms` alone, elsewhere always.

    Args:
        rows: `(B, D)`.
        classes: `(B,)` integers, any.

    Returns:
        sums `(K, D)` and counts `(K,)` of the K classes, and which of them each row has, `(B,)`. To look rows
        up, use `sums.index_select(0, which)`: the gradient of `sums[which]` adds in any order on CPUs too.
    """
    _, which, counts = torch.unique(classes, return_inverse=True, return_counts=True)
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add(0, which, rows)
    return sums, counts, which
