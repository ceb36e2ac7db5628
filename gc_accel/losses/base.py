"""What losses of a global batch have in common: its ranks, their options, and how a call begins.

Shape letters: B samples of this rank, N samples of all ranks, V views, D dim.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gc_accel.distributed import GlobalLoss, RankedBatch
from gc_accel.losses.checks import check_above_zero, check_views, full_precision
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET

Group = dist.ProcessGroup | None


class BatchLoss(GlobalLoss):
    """A loss of the global batch, which consists of the batches of all ranks of a process group.

    Args:
        process_group: ranks whose batches make up the global batch; None is the default group.

    `statistics` has what the latest call notes for the logs, 0-d by name: nothing, for some losses.
    """

    def __init__(self, *, process_group: Group = None) -> None:
        super().__init__()
        self.process_group = process_group
        self.statistics: dict[str, Tensor] = {}


class TiledLoss(BatchLoss):
    """A loss over all pairs of the global batch, whose logits exist a tile at a time.

    Args:
        temperature: T, for a loss that has one; ValueError is raised unless it is above 0.
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.
    """

    temperature: float

    def __init__(
        self,
        temperature: float | None = None,
        *,
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(process_group=process_group)
        if temperature is not None:
            check_above_zero("a temperature", temperature)
            self.temperature = temperature
        self.tile_budget = tile_budget


def open_batch(loss: Any, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors `(B, ...)` of this rank in full precision, then the global batch that those rows are part of.

    The loss has a `process_group`. The first tensor counts the rows; any other may have any shape, or be None.
    """
    first, *others = full_precision(*tensors)
    return first, *others, RankedBatch(len(first), first.device, loss.process_group)


def open_views(loss: Any, views: Tensor, *, at_most: int | None = None) -> tuple[Tensor, RankedBatch]:
    """From 2 to `at_most` views `(B, V, D)` of this rank in full precision, and their global batch.

    Raises ValueError for another shape, and for a global batch of a single sample, which has no negatives.
    """
    check_views(views, at_least=2, at_most=at_most)
    views, batch = open_batch(loss, views)
    if batch.total < 2:
        name = type(loss).__name__
        raise ValueError(f"expected at least 2 samples in the global batch of {name}, got {batch.total}")
    return views, batch


def gather_labels(labels: Tensor | None, batch: RankedBatch, device: torch.device) -> Tensor:
    """Labels `(N,)` of the global batch from those of this rank `(B,)`; without any, one for each sample."""
    return torch.arange(batch.total, device=device) if labels is None else batch.gather(labels)
