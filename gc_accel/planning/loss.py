"""What a loss over all pairs costs: bytes, FLOPs and what ranks send one another.

Counted is the streaming kernel of `gc_accel/losses`: pairs as for CLIP, where there are several representations
(those of the first are anchors, the others candidates), and self-similarity as for NT-Xent and SupCon where
there is one. A dense loss takes a few matrices of all logits instead.

Shape letters: R rows (anchors) of one rank, C columns (candidates) of all ranks, D dim, W world size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET, TILE_COLUMNS, TILE_ROWS

FLOAT = 4  # bytes
TILES_AT_WORK = 2


@dataclass(frozen=True)
class LossCost:
    """Of one rank and one batch."""

    representations: int  # bytes of one copy of all that this rank encodes
    workspace: int  # bytes at most, beyond representations and their gradients
    flops: float  # forward and backward
    sent: dict[str, int]  # bytes that this rank sends, by what they are


def loss_cost(shapes: Mapping[Any, tuple[int, ...]], batch_size: int, devices: int) -> LossCost:
    """The cost of a loss on representations.

    Args:
        shapes: of each representation of one sample, `(..., D)`.
        batch_size: samples of one device.
        devices: W.
    """
    dim = next(iter(shapes.values()))[-1]
    anchors, *others = (batch_size * prod(shape[:-1]) for shape in shapes.values())
    columns = devices * (sum(others) or anchors)
    rows_bytes, columns_bytes = FLOAT * anchors * dim, FLOAT * columns * dim
    own_bytes = FLOAT * (anchors + sum(others)) * dim

    halved = not others and devices == 1
    logits = FLOAT * anchors * columns / (2 if halved else 1)
    kept = min(DEFAULT_TILE_BUDGET, logits)
    products = (4 - kept / logits) * (0.5 if halved else 1)
    tiles = TILES_AT_WORK * FLOAT * min(TILE_ROWS, anchors) * min(TILE_COLUMNS, columns)
    at_work = int(kept) + tiles
    if not others:  # joined from chunks, of every rank, and the one gradient of them all
        workspace = at_work + 2 * columns_bytes
    else:  # representations joined from chunks; on several devices also all candidates, and their gradient
        workspace = at_work + (own_bytes if devices == 1 else rows_bytes + 2 * columns_bytes)

    gathered = (devices - 1) * columns_bytes // devices
    sums = 3 * FLOAT * columns if others else 0  # the maximum, the sum and the gradient of each column
    return LossCost(
        representations=own_bytes,
        workspace=workspace,
        flops=products * 2 * anchors * columns * dim,
        sent={"representations": 2 * gathered, "column sums": ring_all_reduce(sums, devices)},
    )


def ring_all_reduce(nbytes: int, devices: int) -> int:
    """Bytes that each of some devices sends to sum `nbytes` over all of them in a ring."""
    return 2 * (devices - 1) * nbytes // devices
