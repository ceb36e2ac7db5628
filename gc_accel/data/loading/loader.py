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

from gc_accel.data.loading.plan import ChunkPlan


class ChunkSampler:
    """A plan as a batch sampler, which is iterated anew whenever reading starts at another batch.

    Attributes:
        first: the batch at which the next iteration starts.
        counts: how many chunks each batch has that was cut in this iteration; 0 for those before `first`.
    """

    def __init__(self, plan: ChunkPlan) -> None:
        self.plan, self.first = plan, 0
        self.counts: list[int] = []

    def __iter__(self) -> Iterator[list[Any]]:
        self.counts = counts = []
        for chunks in self.plan.batches_of_chunks(self.first):
            counts.append(len(chunks))
            yield from chunks


class ChunkedBatch:
    """A batch that loads its chunks while they are read."""

    def __init__(self, batches: "Batches", index: int) -> None:
        self.batches, self.index = batches, index

    def __iter__(self) -> Iterator[Any]:
        return self.batches.read(self.index)


class Batches(IterableDataset):
    """One handle per batch of the epoch, all over the same chunk loader."""

    def __init__(self, chunk_loader: DataLoader, sampler: ChunkSampler) -> None:
        self.chunk_loader, self.sampler, self.plan = chunk_loader, sampler, sampler.plan
        self.chunks: Iterator[Any] = iter(())
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

    def read(self, index: int) -> Iterator[Any]:
        """Load the chunks of one batch as they are read.

        Raises:
            ValueError: every sample of the batch was left out.
        """
        chunks = self._open(index)
        self.next_batch = None
        empty = True
        for chunk in chunks:
            if chunk is not None:  # None: every sample of it was left out
                empty = False
                yield chunk
        if empty:
            raise ValueError(
                f"expected samples in batch {index} of epoch {self.plan.epoch}, got none: all left out"
            )
        self.next_batch = index + 1
        if self.next_batch == len(self):
            # Workers stop at once when they are let go here, and only after seconds as garbage.
            self.chunks = iter(())

    def _open(self, index: int) -> Iterator[Any]:
        """Load the first chunk of a batch, and return an iterator over all of them."""
        if index != self.next_batch:
            self._restart(index)
        return self._with_rest(next(self.chunks), index)

    def _restart(self, first: int) -> None:
        self.sampler.first = first
        self.chunks = iter(self.chunk_loader)

    def _with_rest(self, chunk: Any, batch: int) -> Iterator[Any]:
        """The first chunk of a batch, and the others as they are loaded; `batch` counts from the epoch's beginning."""
        return chain([chunk], islice(self.chunks, self.sampler.counts[batch] - 1))


class ChunkedLoader(DataLoader):
    """Iterates over the batches of an epoch, each a lazy sequence of chunks on the host.

    Args:
        dataset: a map-style data set, whose `set_epoch` is called too if it has one.
        plan: which samples go into which chunk of which batch.
        collate_fn: from a list of samples to a chunk, or to None to leave the chunk out.
        num_workers, pin_memory, prefetch_factor, persistent_workers: options of the chunk loader, as in torch.

    Raises:
        ValueError: while a batch is read of which every sample is left out.

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
        plan: ChunkPlan,
        collate_fn: Callable[[Sequence[Any]], Any],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        self.samples, self.plan, self.collate = dataset, plan, collate_fn
        generator = torch.Generator()  # draws the workers' seeds, apart from the one that dropout uses
        sampler = ChunkSampler(plan)
        chunk_loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            generator=generator,
        )
        self.batches = self._make_batches(chunk_loader, sampler)
        super().__init__(self.batches, batch_size=None, generator=generator)

    def _make_batches(self, chunk_loader: DataLoader, sampler: ChunkSampler) -> Batches:
        return Batches(chunk_loader, sampler)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order, and what the data set draws by itself, for this epoch."""
        self.batches.set_epoch(epoch)

    def longest_chunk(self) -> Any | None:
        """Load a chunk to measure memory with: the last one of the first batch that has a sample.

        The last chunk has the longest texts if they are sorted. No other chunk is loaded and no worker started, and
        ranks need not be in step. The loader must not be in use.

        Returns:
            the chunk, or None if no sample of the first batch can be read.
        """
        for samples in reversed(next(self.plan.batches_of_chunks(), [])):
            chunk = self.collate([self.samples[sample] for sample in samples])
            if chunk is not None:
                return chunk
        return None
