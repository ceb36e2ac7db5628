"""Batches as lazy sequences of chunks: workers decode chunk by chunk, nothing of batch size is ever built.

    batch plan    which samples make up batch i of this rank, from seed and epoch alone
    chunk loader  a torch DataLoader over the chunks of all batches, in order, with workers and pinned memory
    ChunkedLoader what a training loop iterates: one handle per batch, its chunks loaded as they are read

A handle costs nothing until its chunks are read, so skipping batches on resume loads nothing. The loader is a
torch DataLoader over handles, which is what `accelerate.skip_first_batches` and trainers expect. Every draw
depends on seed, epoch and index, never on the global generator.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

Chunk = Any


class BatchPlan:
    """Which samples go into which chunk of which batch.

    The epoch's permutation is cut into global batches, and each into one slice per rank, so the global batch
    does not depend on the number of ranks. What does not fill a global batch is left out of the epoch.

        permutation   [ rank 0 | rank 1 | ... ] [ rank 0 | rank 1 | ... ] ... rest
                           global batch 0            global batch 1

    Args:
        size: samples in the data set.
        batch_size: samples of one batch on one rank.
        chunk_size: samples of one chunk.
        rank: this process.
        world_size: number of processes.
        seed: of the permutations.
        shuffle: whether to permute at all.
        lengths: from indices to the lengths of their texts; a rank's samples are sorted by length before they
            are cut into chunks, which changes no loss (it does not see the order) and trims padding.
        chunk_tokens: what a chunk's samples, padded to its longest, have at most of this length in all, but
            for a sample that is longer by itself. A bound beside `chunk_size`, for texts of any length.

    Raises:
        ValueError: if the data set does not fill one global batch, or tokens are bounded and lengths unknown.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        chunk_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        lengths: Callable[[list[int]], Sequence[int]] | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        if size < batch_size * world_size:
            raise ValueError(
                f"expected at least one global batch of {batch_size} samples on {world_size} process(es), got a "
                f"data set of {size} samples, and none is repeated within a batch: lower the batch size"
            )
        if chunk_size < 1:
            raise ValueError(f"expected a chunk size of at least 1, got {chunk_size}")
        if chunk_tokens is not None and (chunk_tokens < 1 or lengths is None):
            raise ValueError(
                f"expected chunk_tokens of at least 1, and texts whose lengths are known, got {chunk_tokens}"
            )
        self.size, self.batch_size, self.chunk_size = size, batch_size, chunk_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.lengths, self.chunk_tokens = lengths, chunk_tokens
        self.epoch = 0
        self.first = 0  # batch at which the next iteration over chunks begins
        self.counts: dict[int, int] = {}  # chunks of the batches that were cut

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.size // (self.batch_size * self.world_size)

    def chunks(self) -> Iterator[list[int]]:
        """Indices of every chunk of this rank, from batch `first` of the epoch on."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        for batch in range(self.first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            cut = self._cut(order[start : start + self.batch_size].tolist())
            self.counts[batch] = len(cut)
            yield from cut

    def _cut(self, own: list[int]) -> list[list[int]]:
        """One rank's samples of one batch as chunks, by length where it is known."""
        if self.lengths is None:
            return [own[i : i + self.chunk_size] for i in range(0, len(own), self.chunk_size)]
        chunks: list[list[int]] = [[]]
        for length, index in sorted(zip(self.lengths(own), own, strict=True)):
            count = len(chunks[-1])  # of samples no longer than this one
            too_long = self.chunk_tokens is not None and (count + 1) * length > self.chunk_tokens
            if count == self.chunk_size or (count and too_long):
                chunks.append([])
            chunks[-1].append(index)
        return chunks


class _ChunkSampler:
    """The plan as a batch sampler: iterated anew whenever reading starts at another batch."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.chunks()


class ChunkedBatch:
    """A batch that loads its chunks while they are read."""

    def __init__(self, batches: "_Batches", index: int) -> None:
        self.batches, self.index = batches, index

    def __iter__(self) -> Iterator[Chunk]:
        return self.batches.read(self.index)


class _Batches(IterableDataset):
    """One handle per batch of the epoch, all over the same chunk loader."""

    def __init__(self, chunk_loader: DataLoader, plan: BatchPlan) -> None:
        self.chunk_loader, self.plan = chunk_loader, plan
        self.chunks: Iterator[Chunk] = iter(())
        self.next_batch: int | None = None  # the one that `chunks` continues with

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[ChunkedBatch]:
        self.next_batch = None
        return (ChunkedBatch(self, index) for index in range(len(self)))

    def read(self, index: int) -> Iterator[Chunk]:
        if index != self.next_batch:
            self.plan.first = index
            self.chunks = iter(self.chunk_loader)
        self.next_batch = None
        empty, read = True, 0
        while read == 0 or read < self.plan.counts[index]:  # a batch is cut when its first chunk is fetched
            chunk, read = next(self.chunks), read + 1
            if chunk is not None:  # None: every sample of it was left out
                empty = False
                yield chunk
        if empty:
            raise ValueError(
                f"expected samples in batch {index} of epoch {self.plan.epoch}, got none: all left out"
            )
        self.next_batch = index + 1


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
        plan: BatchPlan,
        collate_fn: Callable[[Sequence[Any]], Chunk],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        self.samples, self.plan = dataset, plan
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
        super().__init__(_Batches(chunk_loader, plan), batch_size=None, generator=self.draws)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order, and what the data set draws by itself, for this epoch."""
        self.plan.epoch = epoch
        self.draws.manual_seed(self.plan.seed + epoch)
        set_epoch = getattr(self.samples, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
