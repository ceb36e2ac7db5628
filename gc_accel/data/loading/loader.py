"""Batches as lazy sequences of chunks: workers decode chunk by chunk, nothing of batch size is ever built.

    plan          which samples make up batch i of this rank, from seed and epoch alone
    chunk loader  a torch DataLoader over the chunks of all batches, in order, with workers and pinned memory
    ChunkedLoader what a training loop iterates: one handle per batch, its chunks loaded as they are read

A handle costs nothing until its chunks are read, so skipping batches on resume loads nothing. The loader is a
torch DataLoader over handles, which is what `accelerate.skip_first_batches` and trainers expect. Every draw
depends on seed, epoch and index, never on the global generator.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from gc_accel.data.loading.plan import Plan

Chunk = Any


class _ChunkSampler:
    """The plan as a batch sampler: iterated anew whenever reading starts at another batch."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[list[Any]]:
        return self.plan.chunks()


class ChunkedBatch:
    """A batch that loads its chunks while they are read."""

    def __init__(self, batches: "Batches", index: int) -> None:
        self.batches, self.index = batches, index

    def __iter__(self) -> Iterator[Chunk]:
        return self.batches.read(self.index)


class Batches(IterableDataset):
    """One handle per batch of the epoch, all over the same chunk loader."""

    def __init__(self, chunk_loader: DataLoader, plan: Plan) -> None:
        self.chunk_loader, self.plan = chunk_loader, plan
        self.chunks: Iterator[Chunk] = iter(())
        self.next_batch: int | None = None  # the one that `chunks` continues with

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[ChunkedBatch]:
        self.next_batch = None
        return (ChunkedBatch(self, index) for index in range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Draw the order, what the data set draws by itself, and the workers' seeds for this epoch."""
        self.plan.epoch = epoch
        self.chunk_loader.generator.manual_seed(self.plan.seed + epoch)
        set_epoch = getattr(self.chunk_loader.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def read(self, index: int) -> Iterator[Chunk]:
        """The chunks of one batch, loaded as they are read."""
        first = self._first_chunk(index)
        self.next_batch = None
        rest = islice(self.chunks, self.plan.counts[index] - 1)  # which is known once the first is fetched
        empty = True
        for chunk in chain([first], rest):
            if chunk is not None:  # None: every sample of it was left out
                empty = False
                yield chunk
        if empty:
            raise ValueError(
                f"expected samples in batch {index} of epoch {self.plan.epoch}, got none: all left out"
            )
        self.next_batch = index + 1
        if self.next_batch == len(self):
            self.chunks = iter(
                ()
            )  # workers that are let go here stop at once, those of garbage after seconds

    def _first_chunk(self, index: int) -> Chunk:
        if index != self.next_batch:
            self.plan.first = index
            self.chunks = iter(self.chunk_loader)
        return next(self.chunks)


class ChunkedLoader(DataLoader):
    """Iterates over the batches of an epoch, each a lazy sequence of chunks on the host.

    Args:
        dataset: map-style; its `set_epoch` is called along, if it has one.
        plan: which samples go where.
        collate_fn: from a list of samples to a chunk, or to None to leave the chunk out.
        num_workers, pin_memory, prefetch_factor, persistent_workers: of the chunk loader, as in torch.

    Example:
        >>> loader = ChunkedLoader(dataset, BatchPlan(len(dataset), 1024, 64), collator, num_workers=4)
        >>> for epoch in range(3):
        ...     loader.set_epoch(epoch)
        ...     for batch in loader:
        ...         cache.forward_backward_chunks(batch)
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        collate_fn: Callable[[Sequence[Any]], Chunk],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        self.samples, self.plan, self.collate = dataset, plan, collate_fn
        self.draws = torch.Generator()  # of the workers' seeds, apart from the one that dropout uses
        chunk_loader = DataLoader(
            dataset,
            batch_sampler=_ChunkSampler(plan),
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            generator=self.draws,
        )
        self.batches = self._batches(chunk_loader)
        super().__init__(self.batches, batch_size=None, generator=self.draws)

    def _batches(self, chunk_loader: DataLoader) -> Batches:
        return Batches(chunk_loader, self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order, and what the data set draws by itself, for this epoch."""
        self.batches.set_epoch(epoch)

    def longest_chunk(self) -> Chunk | None:
        """A chunk to measure memory with, of a loader that nobody reads: of those of the first batch the last, which
        has the longest texts if they are sorted; None if no sample of that batch can be read.

        No other chunk is loaded and no worker started, and ranks need not be in step.
        """
        for indices in reversed(self.plan.first_batch()):
            chunk = self.collate([self.samples[index] for index in indices])
            if chunk is not None:
                return chunk
        return None
