"""Rows of a stream: they are found, handed over undecoded, and some of them are taken into memory."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
from torch.utils.data import IterableDataset

GROUP_SIZE = 32  # rows that are handed over at once


class StreamedRow(NamedTuple):
    """A row of a stream, in place of the index by which a map-style data set finds it."""

    number: int  # in the order of the pass, over all ranks
    row: dict[str, Any]

    def __index__(self) -> int:
        return self.number

    def __str__(self) -> str:
        return f"{self.number} (in the order of the stream)"


class RowGroups(IterableDataset):
    """Rows in groups. The first `skip` rows of all are None."""

    def __init__(self, rows: datasets.IterableDataset, skip: int) -> None:
        self.rows, self.skip = rows, skip

    def __iter__(self) -> Iterator[list[dict[str, Any] | None]]:
        start = 0
        # Rows one by one would come in another order in a worker process, for which `datasets` shifts its seeds.
        for columns in self.rows.iter(batch_size=GROUP_SIZE):
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield [row if start + i >= self.skip else None for i, row in enumerate(rows)]
            start += len(rows)


def stream_of(dataset: Any) -> datasets.IterableDataset | None:
    """Return the rows of a data set that reads a stream, or None for a map-style one.

    Raises:
        ValueError: the data set is a bare stream.
    """
    if isinstance(dataset, (IterableDataset, datasets.IterableDataset)):
        raise ValueError(
            f"expected a map-style data set or an ImageTextDataset over a stream, got {type(dataset).__name__}, "
            "whose rows nobody decodes: wrap it in an ImageTextDataset"
        )
    return getattr(dataset, "stream", None)


def take_rows(stream: datasets.IterableDataset, count: int, *, seed: int = 0) -> datasets.Dataset:
    """Take `count` rows from the beginning of a stream into memory, or all of them if it has fewer.

    The stream is shuffled in a buffer of as many rows, and of at least 1000.
    """
    rows = list(stream.shuffle(seed=seed, buffer_size=max(count, 1000)).take(count))
    return datasets.Dataset.from_list(rows, features=stream.features)
