"""Ranks that make the same calls in the same order, however their batches are cut.

Where parameters are sharded (FSDP2, ZeRO-3) every forward and backward pass is a collective call: a rank with
fewer chunks than its neighbour, or with another tower's chunk at this moment, leaves the neighbour waiting for
ever. So before each piece the ranks agree on the stream that comes next, the first in the declared order that
any of them has left. A rank without a piece of it repeats its latest one, of which no row counts:

    rank 0    image 1   image 2   text 1   image 3    text 2
    rank 1    image 1  (image 1)  text 1  (image 1)  (text 1)

Batches are still read piece by piece. The price is one number per piece.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gc_accel.chunking import Inputs

Named = dict[Any, Tensor]
Piece = tuple[Any, Inputs]  # a stream (None where the encoder declares none) and its inputs
Turn = tuple[Any, Inputs, bool]  # the same, and whether its rows count


def align(
    pieces: Iterable[Piece], first: Mapping[Any, Inputs], streams: Sequence[Any], device: torch.device
) -> Iterator[Turn]:
    """Pieces of this rank, with repeated ones between them where other ranks have more.

    Args:
        pieces: in the order in which this rank would encode them.
        first: inputs by stream that stand in for a piece before there was one; filled by the time that
            `pieces` has been asked for its first, and empty only if this rank has no sample.
        streams: in the same order on every rank.
        device: of the process group.

    Raises:
        ValueError: a rank has no sample; on all of them, so that none waits.
    """
    remaining = iter(pieces)
    piece = next(remaining, None)
    latest = dict(first)
    while True:
        own = -1 if not latest else len(streams) if piece is None else streams.index(piece[0])
        chosen = _lowest(own, device)
        if chosen < 0:
            raise ValueError("expected a sample on every rank, got none on one: drop the last batch there")
        if chosen == len(streams):
            return
        stream = streams[chosen]
        if piece is not None and own == chosen:
            latest[stream] = piece[1]
            yield stream, piece[1], True
            piece = next(remaining, None)
        else:
            yield stream, latest[stream], False


def without_rows(leaves: Named, replay: Callable[[], Named]) -> tuple[Named, Callable[[], Named]]:
    """An encoded piece of which no row counts: the loss does not see it, its graph carries a gradient of zero."""

    def empty() -> Named:
        return {name: output[:0] for name, output in replay().items()}

    return {name: leaf.detach()[:0].requires_grad_() for name, leaf in leaves.items()}, empty


def _lowest(number: int, device: torch.device) -> int:
    """The lowest of the numbers that the ranks hand in."""
    lowest = torch.tensor(number, device=device)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return int(lowest)
