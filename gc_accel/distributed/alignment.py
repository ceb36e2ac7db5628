"""Ranks that make the same calls in the same order, however their batches are cut.

Where parameters are sharded (FSDP2, ZeRO-3) every forward and backward pass is a collective call: a rank with
fewer chunks than its neighbour, or with another tower's chunk at this moment, leaves the neighbour waiting for
ever. So before each chunk the ranks agree on the stream that comes next, the first in the declared order that
any of them has left. A rank without a chunk of it repeats its latest one, of which no row counts:

    rank 0    image 1   image 2   text 1   image 3    text 2
    rank 1    image 1  (image 1)  text 1  (image 1)  (text 1)

Batches are still read chunk by chunk. The price is one number per chunk.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from gc_accel.distributed.collectives import lowest
from gc_accel.engine.encoding import Encoded, Named
from gc_accel.engine.schedule import Rows, Turn


def align(
    turns: Iterable[Turn], first: Mapping[Any, Rows], streams: Sequence[Any], device: torch.device
) -> Iterator[Turn]:
    """Turns of this rank, with repeated ones between them where other ranks have more.

    Args:
        turns: in the order in which this rank would encode them.
        first: chunks by stream that stand in for one before there was any; filled by the time that `turns`
            has been asked for its first, and empty only if this rank has no sample.
        streams: in the same order on every rank.
        device: of the process group.

    Raises:
        ValueError: a rank has no sample; on all of them, so that none waits.
    """
    remaining = iter(turns)
    turn = next(remaining, None)
    latest = dict(first)
    while True:
        own = -1 if not latest else len(streams) if turn is None else streams.index(turn.stream)
        chosen = int(lowest([own], device)[0])
        if chosen < 0:
            raise ValueError("expected a sample on every rank, got none on one: drop the last batch there")
        if chosen == len(streams):
            return
        stream = streams[chosen]
        if turn is not None and own == chosen:
            latest[stream] = turn.rows
            yield turn
            turn = next(remaining, None)
        else:
            yield Turn(stream, latest[stream], counts=False)


def without_rows(encoded: Encoded) -> Encoded:
    """An encoded chunk of which no row counts: the loss does not see it, its graph carries a gradient of zero."""

    def empty() -> Named:
        return {name: output[:0] for name, output in encoded.replay().items()}

    leaves = {name: leaf.detach()[:0].requires_grad_() for name, leaf in encoded.leaves.items()}
    return Encoded(leaves, empty)
