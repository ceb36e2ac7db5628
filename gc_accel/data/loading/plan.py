"""Which samples make up which chunk of which batch, from seed and epoch alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(kw_only=True, eq=False)
class PlanOptions:
    """The options that every plan takes by keyword.

    Args:
        rank: index of this process.
        world_size: number of processes.
        seed: random seed of the order, which is another one in every epoch.
        lengths: from samples (as the data set is indexed by them) to the lengths of their texts. A rank's samples are
            sorted by length before they are cut into chunks, which changes no loss (it does not see the order) and
            trims padding.
        chunk_tokens: what a chunk's samples, padded to its longest, have at most of this length in all, but for a
            sample that is longer by itself. It bounds chunks beside `chunk_size`, for texts of any length.
    """

    rank: int = 0
    world_size: int = 1
    seed: int = 0
    lengths: Callable[[list[Any]], Sequence[int]] | None = None
    chunk_tokens: int | None = None


class ChunkPlan(PlanOptions, ABC):
    """What every plan has: how a rank's samples of a batch are cut into chunks.

    Raises:
        ValueError: chunks have no sample, or tokens are bounded and lengths unknown.
    """

    size: int  # samples of all ranks that an epoch draws from
    batch_size: int  # samples of one batch on one rank
    chunk_size: int

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"expected a chunk size of at least 1, got {self.chunk_size}")
        if self.chunk_tokens is not None and (self.chunk_tokens < 1 or self.lengths is None):
            raise ValueError(
                f"expected chunk_tokens of at least 1, and texts whose lengths are known, got {self.chunk_tokens}"
            )
        self.epoch = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""

    @abstractmethod
    def batches_of_chunks(self, first: int = 0) -> Iterator[list[list[Any]]]:
        """The chunks of this rank batch by batch, each a list of samples; no chunks for batches before `first`."""

    def cut(self, samples: list[Any]) -> list[list[Any]]:
        """Cut one rank's samples of one batch into chunks, by length where it is known."""
        if self.lengths is None:
            return [samples[i : i + self.chunk_size] for i in range(0, len(samples), self.chunk_size)]
        chunks: list[list[Any]] = [[]]
        for length, sample in sorted(zip(self.lengths(samples), samples, strict=True)):
            count = len(chunks[-1])  # samples of the chunk, all no longer than this one
            too_long = self.chunk_tokens is not None and (count + 1) * length > self.chunk_tokens
            if count == self.chunk_size or (count and too_long):
                chunks.append([])
            chunks[-1].append(sample)
        return chunks


@dataclass(eq=False)
class BatchPlan(ChunkPlan):
    """Which samples of a map-style data set go into which chunk of which batch.

    The epoch's permutation is cut into global batches, and each into one slice per rank, so the global batch
    does not depend on the number of ranks. What does not fill a global batch is left out of the epoch.

        permutation   [ rank 0 | rank 1 | ... ] [ rank 0 | rank 1 | ... ] ... rest
                           global batch 0            global batch 1

    Args:
        size: samples in the data set.
        batch_size: samples of one batch on one rank.
        chunk_size: samples of one chunk.
        shuffle: whether to permute at all.
        rank, world_size, seed, lengths, chunk_tokens: see `PlanOptions`; samples are given by their indices.

    Raises:
        ValueError: the data set does not fill one global batch, chunks have no sample, or tokens are bounded and
            lengths unknown.
    """

    size: int
    batch_size: int
    chunk_size: int
    shuffle: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < self.batch_size * self.world_size:
            raise ValueError(
                f"expected at least one global batch of {self.batch_size} samples on {self.world_size} process(es), "
                f"got a data set of {self.size} samples, and none is repeated within a batch: lower the batch size"
            )

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.size // (self.batch_size * self.world_size)

    def batches_of_chunks(self, first: int = 0) -> Iterator[list[list[int]]]:
        """The chunks of this rank batch by batch, each a list of indices; no chunks for batches before `first`."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        for batch in range(len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield self.cut(order[start : start + self.batch_size].tolist()) if batch >= first else []
