"""Losses that need less than a gradient cache, and losses that have a state.

Where samples meet decides which schedule is exact; the cheapest of those is taken (`gc_accel/accumulation.py`):

    A   through gradients                       the gradient cache: two forwards of every sample
    B   through tensors without a gradient      one pass without a graph for those tensors, then accumulation
    C   nowhere                                 accumulation

In B and C the loss of N samples is a mean of terms, each of one sample and of targets t without a gradient,

    L = 1/N sum_i l(z_i, t_i),      so      dL = sum over chunks of  d [ 1/N sum_{i in chunk} l(z_i, t_i) ]

and each chunk can be taken forward and backward on its own. A loss that declares nothing is in regime A.

Shape letters: N samples of the global batch, B those of this rank, C those of a chunk, V views, D dim.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gc_accel.distributed import GlobalLoss, RankedBatch
from gc_accel.losses.checks import full_precision
from gc_accel.losses.stateful.momentum import MomentumEncoder

Reps = Mapping[str, Tensor]


class StatefulLoss(GlobalLoss):
    """A loss with buffers, such as a queue, that move once per batch.

    Args:
        process_group: ranks whose batches make up the global batch; None is the default group.
    """

    def __init__(self, *, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.process_group = process_group

    def update(self, reps: Reps) -> None:
        """Move the state: called by the engine, on all ranks, once the gradients of a batch are there.

        Args:
            reps: of this rank's whole batch, from the first pass, without a gradient.
        """

    def everywhere(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, in rank order, so that the state is the same on each of them."""
        return RankedBatch(len(rows), rows.device, self.process_group).gather(rows)


class AccumulatedLoss(StatefulLoss):
    """A loss in regime B or C, as `targets` of a whole batch and terms, `per_sample`, of each of its chunks.

    Args:
        teacher: the momentum encoder whose representations the targets are made of, where the loss asks for one.
        process_group: ranks whose batches make up the global batch; None is the default group.

    `targets_from` says whose representations `targets` wants, without a graph, of the whole batch before the first
    term is taken: the "teacher"'s, the "encoder"'s own, or nobody's.
    """

    regime: Literal["A", "B", "C"] = "C"
    targets_from: ClassVar[Literal["teacher", "encoder"] | None] = None

    def __init__(
        self, *, teacher: MomentumEncoder | None = None, process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(process_group=process_group)
        self.teacher = teacher

    def targets(self, reps: Reps, batch: RankedBatch) -> Any:
        """From representations without a gradient to targets. Ranks may meet here, and only here.

        Args:
            reps: `(B, ...)` by name, as `targets_from` says; nothing, if it says so.
            batch: the ranks.
        """
        return None

    def per_sample(self, reps: Reps, targets: Any, rows: slice) -> Tensor:
        """The terms `(C,)` of the samples of a chunk.

        Args:
            reps: `(C, ...)` by name, of the encoder.
            targets: of the whole batch.
            rows: where in the batch of this rank the chunk is.
        """
        raise NotImplementedError

    def forward(self, labels: Tensor | None = None, **reps: Tensor) -> Tensor:
        """The loss of the global batch, 0-d, from the representations of all of its samples at once.

        What a gradient cache or an evaluation would do. A momentum encoder has no part in it: in eval mode the
        encoder stands in for it, which is another number than that of a training step.

        Args:
            labels: not looked at, so that a labelled data set can be used as it is.
            reps: `(B, ...)` by name, of this rank.

        Raises:
            ValueError: in training mode for a loss with a momentum encoder, which `GradientCache` runs.
        """
        if self.targets_from == "teacher" and self.training:
            raise ValueError(
                f"expected {type(self).__name__} in eval mode, where the encoder stands in for its momentum encoder, "
                "got it in training mode: let GradientCache train with it, or call loss.eval() first"
            )
        return self.in_one_graph(reps, reps)

    def in_one_graph(self, reps: Reps, source: Reps) -> Tensor:
        """The loss of the global batch, 0-d, with targets from the representations of a `source`.

        Args:
            reps: `(B, ...)` by name, of the encoder, for all samples of this rank.
            source: likewise, of whom `targets_from` names; no gradient goes into them.
        """
        reps, source = (
            dict(zip(each, full_precision(*each.values()), strict=True)) for each in (reps, source)
        )
        first = next(iter(reps.values()))
        batch = RankedBatch(len(first), first.device, self.process_group)
        with torch.no_grad():
            targets = self.targets({name: rep.detach() for name, rep in source.items()}, batch)
        return batch.sum(self.per_sample(reps, targets, slice(0, len(first))).sum() / batch.total)


def output_of(reps: Reps, name: str, option: str) -> Tensor:
    """An output that an encoder has if it was asked for one.

    Raises:
        ValueError: it has none of that name.
    """
    if name not in reps:
        raise ValueError(
            f"expected {name!r} among the outputs of the encoder, got {list(reps)}: make it with "
            f"VisionEncoder(..., {option}=...)"
        )
    return reps[name]
