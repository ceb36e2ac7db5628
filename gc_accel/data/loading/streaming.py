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
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate, chain
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset

from gc_accel.data.loading.loader import Batches, ChunkedLoader, ChunkSampler
from gc_accel.data.loading.plan import ChunkPlan
from gc_accel.data.sources.rows import GROUP_SIZE, RowGroups, StreamedRow
from gc_accel.distributed.collectives import lowest

END_OF_PASS = object()


@dataclass(eq=False)
class StreamPlan(ChunkPlan):
    """Which rows of a stream go into which chunk of which batch.

    Args:
        stream: rows with undecoded images, such as `ImageTextDataset.stream`.
        batch_size: samples of one batch on one rank.
        chunk_size: samples of one chunk.
        batches: how many to make, over as many passes as it takes.
        shuffle_buffer: rows that are shuffled among themselves, and kept in memory; 0 leaves the order as it is.
        read_ahead: read the rows of the next batch in a process of its own.
        rank, world_size, seed, lengths, chunk_tokens: see `PlanOptions`; `lengths` gets a list of `StreamedRow`.

    Attributes:
        epoch: number of the current pass.
        passes: how many batches each finished pass had, on every rank.

    Raises:
        ValueError: `batches` is not positive, as a stream has no length of its own; chunks have no sample, or tokens
            are bounded and lengths unknown.
    """

    stream: datasets.IterableDataset
    batch_size: int
    chunk_size: int
    _: KW_ONLY
    batches: int
    shuffle_buffer: int = 5000
    read_ahead: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise ValueError(f"expected the number of batches, as a stream has no length, got {self.batches}")
        stream = self.stream
        if self.shuffle_buffer > 1:
            stream = stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        self.share = split_dataset_by_node(stream, self.rank, self.world_size)
        self.size = self.batches * self.batch_size * self.world_size
        self.passes: list[int] = []

    def __len__(self) -> int:
        return self.batches

    def locate(self, batch: int) -> tuple[int, int]:
        """Find the first pass that may have a batch, and how many batches there are before that pass."""
        starts = list(accumulate(self.passes, initial=0))
        number = bisect_right(starts, batch) - 1
        return number, starts[number]

    def end_pass(self, batches: int) -> None:
        """Note that the current pass has no more than this many batches.

        Raises:
            ValueError: it has not one.
        """
        if batches == 0:
            raise ValueError(
                f"expected at least one batch of {self.batch_size} samples for each of {self.world_size} process(es) "
                "in a stream, got fewer samples, and none is repeated within a pass: lower the batch size"
            )
        self.passes[self.epoch :] = [batches]

    def batches_of_chunks(self, first: int = 0) -> Iterator[list[list[StreamedRow]]]:
        """The chunks of this rank batch by batch, to the end of the pass; no chunks for batches before `first`."""
        rows: list[StreamedRow] = []
        for count, row in enumerate(chain.from_iterable(self._reader(first)), 1):
            rows.append(StreamedRow((count - 1) * self.world_size + self.rank, row))
            if len(rows) == self.batch_size:
                yield self.cut(rows) if count > first * self.batch_size else []
                rows = []

    def _reader(self, first: int) -> DataLoader:
        self.share.set_epoch(self.epoch)
        return DataLoader(
            RowGroups(self.share, skip=first * self.batch_size),
            batch_size=None,
            collate_fn=list,  # leaves rows as they are
            num_workers=int(self.read_ahead),
            prefetch_factor=2 + self.batch_size // GROUP_SIZE if self.read_ahead else None,
            generator=torch.Generator(),  # draws the worker's seed, apart from the one that dropout uses
        )


class _StreamBatches(Batches):
    """Handles of batches, each read from the pass that has it."""

    plan: StreamPlan

    def __init__(self, chunk_loader: DataLoader, sampler: ChunkSampler, device: torch.device) -> None:
        super().__init__(chunk_loader, sampler)
        self.device = device
        self.pass_start = 0  # batches before the current pass

    def _open(self, index: int) -> Iterator[Any]:
        """Wait until every rank has loaded the first chunk; so all ranks have to begin a batch at the same time."""
        in_place = index == self.next_batch
        while True:
            if not in_place:
                epoch, self.pass_start = self.plan.locate(index)
                self.set_epoch(epoch)
                self._restart(index - self.pass_start)
            place = index - self.pass_start  # of the batch in its pass
            chunk = next(self.chunks, END_OF_PASS)
            batches = len(self.sampler.counts) if chunk is END_OF_PASS else place + 1
            (common,) = lowest([batches], self.device)
            if common == place + 1:
                return self._with_rest(chunk, place)
            self.plan.end_pass(int(common))
            in_place = False


class StreamLoader(ChunkedLoader):
    """Iterates over batches of a stream, each a lazy sequence of chunks on the host.

    Handles are free, as those of `ChunkedLoader`. A run is one iteration; its passes over the stream are counted
    here, and `set_epoch` of the data set is called for each.

    Args:
        dataset: a data set that is indexed by `StreamedRow`, such as an `ImageTextDataset` over a stream.
        plan: which rows go into which chunk of which batch.
        collate_fn: from a list of samples to a chunk, or to None to leave the chunk out.
        device: where the process group communicates.
        options: `num_workers` and other options of the chunk loader, as for `ChunkedLoader`.

    Raises:
        ValueError: while a batch is read of which every sample is left out, or of a stream that has none.

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
        collate_fn: Callable[[Sequence[Any]], Any],
        *,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        self.device = torch.device(device)
        super().__init__(dataset, plan, collate_fn, **options)

    def _make_batches(self, chunk_loader: DataLoader, sampler: ChunkSampler) -> Batches:
        return _StreamBatches(chunk_loader, sampler, self.device)

    def set_epoch(self, epoch: int) -> None:
        """Accept the one epoch that there is, number 0, of `len(self)` batches.

        Raises:
            ValueError: the epoch is another one.
        """
        if epoch:
            raise ValueError(
                f"expected a stream to be read in one epoch, got epoch {epoch}: ask for more batches"
            )
