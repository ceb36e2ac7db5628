"""Which samples make up which chunk of which batch, from seed and epoch alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch


class Plan(ABC):
    """What every plan has: how a rank's samples of a batch are cut into chunks, and where reading begins.

    Args:
        batch_size, chunk_size, rank, world_size, seed, lengths, chunk_tokens: as for `BatchPlan`.

    Raises:
        ValueError: chunks of no sample, or tokens are bounded and lengths unknown.
    """

    size: int  # samples of all ranks that an epoch draws from

    def __init__(
        self,
        batch_size: int,
        chunk_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        lengths: Callable[[list[Any]], Sequence[int]] | None,
        chunk_tokens: int | None,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"expected a chunk size of at least 1, got {chunk_size}")
        if chunk_tokens is not None and (chunk_tokens < 1 or lengths is None):
            raise ValueError(
                f"expected chunk_tokens of at least 1, and texts whose lengths are known, got {chunk_tokens}"
            )
        self.batch_size, self.chunk_size = batch_size, chunk_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.lengths, self.chunk_tokens = lengths, chunk_tokens
        self.epoch = 0
        self.first = 0  # batch at which the next iteration over chunks begins
        self.counts: dict[int, int] = {}  # chunks of the batches that were cut

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""

    @abstractmethod
    def chunks(self) -> Iterator[list[Any]]:
        """Every chunk of this rank from batch `first` on, as a list of what the data set is indexed by."""

    def first_batch(self) -> list[list[Any]]:
        """The chunks of batch `first`, none if there is no such batch."""
        chunks = self.chunks()
        found = list(islice(chunks, 1))  # with which is known how many there are
        return [*found, *islice(chunks, self.counts[self.first] - 1)] if found else []

    def cut(self, own: list[Any]) -> list[list[Any]]:
        """One rank's samples of one batch as chunks, by length where it is known."""
        if self.lengths is None:
            return [own[i : i + self.chunk_size] for i in range(0, len(own), self.chunk_size)]
        chunks: list[list[Any]] = [[]]
        for length, sample in sorted(zip(self.lengths(own), own, strict=True)):
            count = len(chunks[-1])  # of samples no longer than this one
            too_long = self.chunk_tokens is not None and (count + 1) * length > self.chunk_tokens
            if count == self.chunk_size or (count and too_long):
                chunks.append([])
            chunks[-1].append(sample)
        return chunks


class BatchPlan(Plan):
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
        super().__init__(
            batch_size,
            chunk_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            lengths=lengths,
            chunk_tokens=chunk_tokens,
        )
        if size < batch_size * world_size:
            raise ValueError(
                f"expected at least one global batch of {batch_size} samples on {world_size} process(es), got a "
                f"data set of {size} samples, and none is repeated within a batch: lower the batch size"
            )
        self.size, self.shuffle = size, shuffle

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.size // (self.batch_size * self.world_size)

    def chunks(self) -> Iterator[list[int]]:
        """Indices of every chunk of this rank, from batch `first` of the epoch on."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        for batch in range(self.first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            cut = self.cut(order[start : start + self.batch_size].tolist())
            self.counts[batch] = len(cut)
            yield from cut
