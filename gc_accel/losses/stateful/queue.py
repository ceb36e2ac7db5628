"""A queue of representations of earlier batches: a ring that forgets the oldest rows first.

    rows        3  4  5 | 0  1  2          of a queue of 6, after 6 rows
    push 4      3  4  5 | 6  7  8          the place to write to wraps around,
                9                          and nothing of a batch is lost at the end

Ranks push the rows of the global batch, in rank order, so the queue is the same on all of them and does not
depend on their number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_ROWS = 256  # of a search for the nearest rows


class Queue(nn.Module):
    """The latest rows `(Q, ...)`, in buffers, which go into checkpoints with the loss.

    It begins with random rows of unit length, as MoCo's and NNCLR's do, the same on every rank.

    Args:
        size: Q, at least 1.
        shape: of a row, D last.

    Raises:
        ValueError: for another size.
    """

    rows: Tensor
    position: Tensor
    filled: Tensor

    def __init__(self, size: int, *shape: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"expected a queue of at least 1 row, got {size}")
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("rows", F.normalize(torch.randn(size, *shape, generator=generator), dim=-1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # of the next row
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))  # rows pushed, Q at most

    @property
    def is_full(self) -> bool:
        """Whether no random row is left."""
        return int(self.filled) == len(self.rows)

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Put rows `(N, ...)` in the place of the oldest; of more than Q the last Q stay.

        Raises:
            ValueError: for rows of another shape.
        """
        self.check(rows)
        size, latest = len(self.rows), rows[-len(self.rows) :]
        end = int(self.position) + len(rows)
        places = torch.arange(end - len(latest), end, device=self.rows.device) % size
        self.rows.index_copy_(0, places, latest.to(self.rows))
        self.position.fill_(end % size)
        self.filled.add_(len(rows)).clamp_(max=size)

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """The row of the queue nearest to each row `(N, D)` by cosine, `(N, D)`; a tile of rows is compared at once."""
        self.check(rows)
        indices = [(part @ self.rows.to(part).T).argmax(1) for part in rows.split(TILE_ROWS)]
        return self.rows[torch.cat(indices)].to(rows)

    def check(self, rows: Tensor) -> None:
        """Raise ValueError for rows of another shape."""
        if rows.shape[1:] != self.rows.shape[1:]:
            raise ValueError(
                f"expected rows of shape {tuple(self.rows.shape[1:])} in the queue, got {tuple(rows.shape[1:])}: set "
                "dim of the loss to the width of the representations"
            )
