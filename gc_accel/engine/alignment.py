"""Ranks that make the same calls in the same order, however their batches are cut.

Where parameters are sharded (FSDP2, ZeRO-3) every forward and backward pass is a collective call: a rank with
fewer chunks than its neighbour, or with another tower's chunk at this moment, leaves the neighbour waiting for
ever. So before each chunk the ranks agree on the stream that comes next, the first in the declared order that
any of them has left. A rank without a chunk of it repeats its latest one, of which no row counts:

    rank 0    image 1   image 2   text 1   image 3    text 2
    rank 1    image 1  (image 1)  text 1  (image 1)  (text 1)

Batches are still read chunk by chunk. The price is one number per chunk.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from gc_accel.distributed.collectives import lowest
from gc_accel.engine.encoding import Encoded, Named
from gc_accel.engine.schedule import Chunk


def align(chunks: Iterable[Chunk], streams: Sequence[Any], device: torch.device) -> Iterator[Chunk]:
    """Chunks of this rank, with repeated ones between them where other ranks have more.

    Args:
        chunks: in the order in which this rank would encode them, of each batch all streams in their order. So a rank
            that has to repeat a chunk of a stream has had one.
        streams: in the same order on every rank.
        device: of the process group.

    Raises:
        ValueError: a rank has no sample; on all of them, so that none waits.
    """
    remaining = iter(chunks)
    chunk = next(remaining, None)
    latest = dict[Any, Chunk]()
    while True:
        place = len(streams) if chunk is None else streams.index(chunk.stream)
        if chunk is None and not latest:
            place = -1
        chosen = int(lowest([place], device)[0])
        if chosen < 0:
            raise ValueError("expected a sample on every rank, got none on one: drop the last batch there")
        if chosen == len(streams):
            return
        if chunk is not None and place == chosen:
            latest[chunk.stream] = chunk
            yield chunk
            chunk = next(remaining, None)
        else:
            yield latest[streams[chosen]]._replace(counts=False)


def without_rows(encoded: Encoded) -> Encoded:
    """An encoded chunk of which no row counts: the loss does not see it, its graph carries a gradient of zero."""

    def empty() -> Named:
        return {name: output[:0] for name, output in encoded.replay().items()}

    leaves = {name: leaf.detach()[:0].requires_grad_() for name, leaf in encoded.leaves.items()}
    return encoded._replace(leaves=leaves, replay=empty)
