"""Batches from a stream, which is read from its beginning and whose length nobody knows.

    stream     rows of a `datasets.IterableDataset`, images undecoded
    reader     this rank's share of them, shuffled in a buffer, in a process of its own if there are workers
    StreamPlan gathers the rows of one batch and cuts them into chunks
    workers    decode the rows of a chunk

The loader gives as many batches as are asked for, over as many passes over the stream as that takes. No sample
occurs twice in a pass. Ranks have different samples (`datasets.distributed.split_dataset_by_node`) and as many
batches each: before every batch they agree on whether all have one, and a rank that has none ends the pass for all.

    rank 0    batch 0 | batch 1 | batch 2 | (batch 3)    batch 4 ...        (not trained on in this pass)
    rank 1    batch 0 | batch 1 | batch 2 |  rest        batch 4 ...

Order and draws depend on seed, pass and the number of ranks, not on workers. Batches that are skipped on resume are
read as far as they lie in the same pass, but nothing of them is decoded; earlier passes are not even read where it
is known how many batches they had, as it is from a checkpoint.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset

from gc_accel.data.loading.loader import Batches, Chunk, ChunkedLoader
from gc_accel.data.loading.plan import Plan
from gc_accel.data.sources.rows import BLOCK, Blocks, StreamedRow
from gc_accel.distributed.collectives import lowest

END = object()


class StreamPlan(Plan):
    """Which rows of a stream go into which chunk of which batch.

    Args:
        stream: rows with undecoded images, such as `ImageTextDataset.stream`.
        batch_size: samples of one batch on one rank.
        chunk_size: samples of one chunk.
        batches: how many to make, over as many passes as it takes.
        rank, world_size: this process, and the number of processes.
        seed: of the order, which is another one in every pass.
        shuffle_buffer: rows that are shuffled among themselves, and kept in memory; 0 leaves the order as it is.
        lengths, chunk_tokens: as for `BatchPlan`; `lengths` gets a list of `StreamedRow`.
        read_ahead: read the rows of the next batch in a process of its own.

    Raises:
        ValueError: `batches` is not positive, as a stream has no length of its own.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        batch_size: int,
        chunk_size: int,
        *,
        batches: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 5000,
        lengths: Callable[[list[StreamedRow]], Sequence[int]] | None = None,
        chunk_tokens: int | None = None,
        read_ahead: bool = False,
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
        if batches < 1:
            raise ValueError(f"expected the number of batches, as a stream has no length, got {batches}")
        shuffled = stream.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer > 1 else stream
        self.share = split_dataset_by_node(shuffled, rank, world_size)
        self.batches, self.read_ahead = batches, read_ahead
        self.size = batches * batch_size * world_size
        self.passes: list[int] = []  # how many batches each finished pass had, on every rank
        self.start = 0  # batches before this pass
        self.found = 0  # batches that this rank has found in this pass

    def __len__(self) -> int:
        return self.batches

    def seek(self, batch: int) -> None:
        """Go to a batch, in the first pass that may have it."""
        ends = list(accumulate(self.passes, initial=0))
        self.epoch = bisect_right(ends, batch) - 1
        self.start = ends[self.epoch]
        self.first = batch - self.start

    def end_pass(self, batches: int) -> None:
        """Note that there are no more batches in this pass than that.

        Raises:
            ValueError: there is not one.
        """
        if batches == 0:
            raise ValueError(
                f"expected at least one batch of {self.batch_size} samples for each of {self.world_size} process(es) "
                "in a stream, got fewer samples, and none is repeated within a pass: lower the batch size"
            )
        self.passes[self.epoch :] = [batches]

    def chunks(self) -> Iterator[list[StreamedRow]]:
        """Rows of every chunk of this rank, from batch `first` of this pass to the end of the pass."""
        own: list[StreamedRow] = []
        self.found = 0
        for count, row in enumerate(chain.from_iterable(self._reader())):
            own.append(StreamedRow(count * self.world_size + self.rank, row))
            if len(own) == self.batch_size:
                self.found += 1
                if self.found > self.first:
                    cut = self.cut(own)
                    self.counts[self.start + self.found - 1] = len(cut)
                    yield from cut
                own = []

    def _reader(self) -> DataLoader:
        self.share.set_epoch(self.epoch)
        return DataLoader(
            Blocks(self.share, skip=self.first * self.batch_size),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=int(self.read_ahead),
            prefetch_factor=2 + self.batch_size // BLOCK if self.read_ahead else None,
            generator=torch.Generator(),  # of the worker's seed, apart from the one that dropout uses
        )


class _StreamBatches(Batches):
    """Handles of batches, each read from the pass that has it."""

    def __init__(self, chunk_loader: DataLoader, plan: StreamPlan, device: torch.device) -> None:
        super().__init__(chunk_loader, plan)
        self.stream_plan, self.device = plan, device

    def _first_chunk(self, index: int) -> Chunk:
        """Once every rank has one; so all ranks have to begin a batch at the same time."""
        plan, in_place = self.stream_plan, index == self.next_batch
        while True:
            if not in_place:
                plan.seek(index)
                self.set_epoch(plan.epoch)
                self.chunks = iter(self.chunk_loader)
            chunk = next(self.chunks, END)
            wanted = index - plan.start + 1
            (common,) = lowest([plan.found if chunk is END else wanted], self.device)
            if common == wanted:
                return chunk
            plan.end_pass(int(common))
            in_place = False


class StreamLoader(ChunkedLoader):
    """Iterates over batches of a stream, each a lazy sequence of chunks on the host.

    Handles are free, as those of `ChunkedLoader`. A run is one iteration; its passes over the stream are counted
    here, and `set_epoch` of the data set is called for each.

    Args:
        dataset: indexed by `StreamedRow`, such as an `ImageTextDataset` over a stream.
        plan: which rows go where.
        collate_fn: from a list of samples to a chunk, or to None to leave the chunk out.
        device: of the process group.
        options: `num_workers` and others of the chunk loader, as for `ChunkedLoader`.

    Example:
        >>> dataset = ImageTextDataset(load_image_text("shards/", "train", streaming=True), image_column="jpg")
        >>> plan = StreamPlan(dataset.stream, 1024, 64, batches=10_000)
        >>> for batch in StreamLoader(dataset, plan, collator):
        ...     cache.forward_backward_chunks(batch)
    """

    plan: StreamPlan

    def __init__(
        self,
        dataset: Dataset,
        plan: StreamPlan,
        collate_fn: Callable[[Sequence[Any]], Chunk],
        *,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        self.device = torch.device(device)
        super().__init__(dataset, plan, collate_fn, **options)

    def _batches(self, chunk_loader: DataLoader) -> Batches:
        return _StreamBatches(chunk_loader, self.plan, self.device)

    def set_epoch(self, epoch: int) -> None:
        """There is one epoch, number 0, of `len(self)` batches.

        Raises:
            ValueError: for another one.
        """
        if epoch:
            raise ValueError(
                f"expected a stream to be read in one epoch, got epoch {epoch}: ask for more batches"
            )


def _as_it_is(rows: Any) -> Any:
    return rows
