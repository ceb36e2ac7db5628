"""The steps of one cache, each made again with half the chunk where memory runs out (see `recovery`)."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from transformers.utils import logging

from gc_accel.distributed import Replicas
from gc_accel.engine.joining import JoinedCalls
from gc_accel.memory.chunk_sizes import ChunkSizes
from gc_accel.memory.recovery import Reread, no_way_back, retry
from gc_accel.memory.retention import Retention
from gc_accel.state.snapshot import Snapshot

T = TypeVar("T")
logger = logging.get_logger(__name__)


class Attempts:
    """Steps of a cache, each made as often as it takes; chunk sizes stay what they have become.

    Args:
        replicas, sizes, retention, joined: of the cache.
    """

    def __init__(
        self, replicas: Replicas, sizes: ChunkSizes, retention: Retention, joined: JoinedCalls
    ) -> None:
        self.replicas, self.sizes, self.retention, self.joined = replicas, sizes, retention, joined

    def make(self, attempt: Callable[[Reread, Snapshot], T], chunks: Reread) -> T:
        """Make one step.

        Args:
            attempt: of chunks, which notes in a snapshot what it will change.
            chunks: of the batch.
        """
        snapshot = Snapshot(self.replicas.device)

        def step(chunks: Reread) -> T:
            self.replicas.is_reducing = False
            return attempt(chunks, snapshot)

        return retry(step, chunks, partial(self._undo, snapshot), self._shrink)

    def _undo(self, snapshot: Snapshot, error: Exception) -> None:
        if self.replicas.is_lost:
            raise no_way_back("where ranks depend on each other's calls", str(self.sizes)) from error
        self.replicas.leave_step(error)
        snapshot.restore()
        if max(self.sizes.by_stream.values()) == 1:
            raise no_way_back("with chunks of one sample", str(self.sizes)) from error

    def _shrink(self) -> None:
        self.retention.give_up()
        self.joined.halve()
        self.sizes.halve()
        logger.warning("Out of memory: this step is made again in chunks of %s.", self.sizes)
