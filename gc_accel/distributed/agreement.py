"""Ranks that give up a step together, so that none waits for another that has run out of memory.

    rank 0    ... check ... collective ... (out of memory) report   -> all of them are out of the step
    rank 1    ... check ... collective ............................ check -> PeerOutOfMemory

`report` and `check` are the same collective call, which says whether any rank has failed. So there has to be a
check before every other collective call of a step; those of the losses have it built in.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist

_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


class PeerOutOfMemory(torch.OutOfMemoryError):
    """Another rank has run out of memory."""


class Agreement:
    """Whether all ranks can go on.

    Args:
        device: of the process group; the flag is allocated at once, while there is memory.
        group: the ranks.
        world_size: with a single one nothing is exchanged.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None, world_size: int) -> None:
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.group, self.world_size = group, world_size

    def check(self) -> None:
        """Go on, if all ranks can.

        Raises:
            PeerOutOfMemory: another rank has reported.
        """
        if self.world_size > 1 and self._any_failed(False):
            raise PeerOutOfMemory("another rank has run out of memory")

    def report(self) -> None:
        """Tell the other ranks, at their next check, that this one cannot go on."""
        if self.world_size > 1:
            self._any_failed(True)

    @contextmanager
    def before_each_collective(self) -> Iterator[None]:
        """A block in which the collective calls of losses check first."""
        token = _check.set(self.check)
        try:
            yield
        finally:
            _check.reset(token)

    def _any_failed(self, failed: bool) -> bool:
        self.flag.fill_(failed)
        dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=self.group)
        return bool(self.flag)


def current_check() -> Callable[[], None]:
    """What to call before a collective call: nothing, outside of `Agreement.before_each_collective`."""
    return _check.get() or _nothing


def _nothing() -> None:
    pass
