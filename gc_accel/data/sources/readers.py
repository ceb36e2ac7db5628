"""Image-text data sets of one's own: from rows to pairs of image and caption.

`load_image_text` (`image_text.py`) finds the rows and leaves their reading to `datasets`. `ImageTextDataset` turns a
row into a pair: it decodes the image itself (`images.py`), so that a broken file is reported by its row or left out,
and draws one caption where a row has several (`epochs.py`). In a stream, a row takes the place of its index
(`rows.py`).
"""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch

from gc_accel.data.epochs import EpochDataset
from gc_accel.data.sources.image_text import HFDataset, features_of, require_columns
from gc_accel.data.sources.images import describe_image, read_image
from gc_accel.data.sources.precomputed import file_times
from gc_accel.data.sources.rows import StreamedRow, take_rows

MAX_WORKERS = 256
COLUMNS = {
    "image": "image_column",
    "text": "caption_column",
}  # the argument that names the column, by modality


class ImageTextDataset(EpochDataset):
    """Images with their captions, from the columns of a `datasets.Dataset` or a `datasets.IterableDataset`.

    An item is ``{"image": PIL image in RGB, "text": str}``, with an integer "label" if a label column is
    named, without "text" if no caption column is, or None for a row that is left out.

    Args:
        dataset: one split. ``datasets.Dataset.from_list`` makes one from rows in memory. Of a stream, items
            are found by `StreamedRow`, and there is no length.
        image_column: holds images, encoded bytes, ``{"bytes", "path"}`` or paths.
        caption_column: holds strings, or lists of strings of which each epoch draws one per row; None for images
            alone.
        label_column: holds integers.
        root: the folder from which relative paths count.
        on_bad_image: "error", or "skip" to leave out rows whose image cannot be read.
        seed: random seed of the draw of captions.

    Raises:
        ValueError: in the constructor for a column that is missing or of the wrong kind; on access, naming
            the row, for an image that cannot be read, an empty list of captions or a caption that is no
            string.

    Example:
        >>> rows = load_image_text("photos/captions.csv", "train", image_column="file")
        >>> dataset = ImageTextDataset(rows, image_column="file", caption_column="title")
    """

    def __init__(
        self,
        dataset: HFDataset,
        *,
        image_column: str = "image",
        caption_column: str | None = "text",
        label_column: str | None = None,
        root: str | Path | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"expected on_bad_image 'error' or 'skip', got {on_bad_image!r}")
        named = {"image_column": image_column, "caption_column": caption_column, "label_column": label_column}
        columns = {argument: column for argument, column in named.items() if column is not None}
        features = features_of(dataset)
        require_columns(features, **columns)
        if label_column is not None:
            _require_integers(features, label_column)
        if isinstance(features[image_column], datasets.Image):
            dataset = _undecoded(dataset, image_column)
        self._rows = dataset.select_columns(list(columns.values()))
        self._captions = dataset.select_columns([] if caption_column is None else [caption_column])
        self.image_column: str | None = image_column
        self.caption_column = caption_column
        self.label_column = label_column
        self.root = Path(root or "")
        self.on_bad_image = on_bad_image
        # Counts are in shared memory too, so that workers that are already running report their skips.
        self._skipped = torch.zeros(1 + MAX_WORKERS, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def stream(self) -> datasets.IterableDataset | None:
        """The rows, if they are a stream."""
        return self._rows if isinstance(self._rows, datasets.IterableDataset) else None

    def __getitem__(self, index: int | StreamedRow) -> dict[str, Any] | None:
        row = index.row if isinstance(index, StreamedRow) else self._rows[index]
        item: dict[str, Any] = {}
        if self.caption_column is not None:
            item["text"] = self._draw_caption(row[self.caption_column], index)
        if self.label_column is not None:
            item["label"] = int(row[self.label_column])
        if self.image_column is None:
            return item
        try:
            item["image"] = read_image(row[self.image_column], self.root)
        except Exception as error:  # PIL's decoders raise almost anything on corrupt bytes
            if self.on_bad_image == "skip":
                self._count_skip()
                return None
            raise ValueError(
                f"row {index} of the data set: cannot read image {describe_image(row[self.image_column])}: "
                f"expected one that PIL can open, got {type(error).__name__}: {error}. Correct the row, "
                "or pass on_bad_image='skip' to leave such rows out"
            ) from error
        return item

    @property
    def skipped(self) -> int:
        """How many times a row was left out because its image could not be read, over all workers."""
        return int(self._skipped.sum())

    def take(self, count: int, *, seed: int = 0) -> "ImageTextDataset":
        """Take some samples from the beginning of a stream (`take_rows`), in memory, as a map-style data set."""
        assert self.stream is not None
        taken = copy(self)
        taken._rows = take_rows(self.stream, count, seed=seed)
        taken._captions = taken._rows.select_columns(
            [] if self.caption_column is None else [self.caption_column]
        )
        return taken

    def without(self, modality: str) -> "ImageTextDataset":
        """The same samples without their "image", which is then not opened, or without their "text"."""
        others = copy(self)
        others._rows = self._rows.remove_columns(getattr(self, COLUMNS[modality]))
        setattr(others, COLUMNS[modality], None)
        return others

    def fingerprint(self, modality: str) -> str:
        """A string that tells all images, with the times of their files, or all texts from others.

        Raises:
            ValueError: rows are a stream, or have lists of captions, of which each epoch draws one.
        """
        column = getattr(self, COLUMNS[modality])
        lists = isinstance(self._rows.features[column], (datasets.List, datasets.LargeList))
        if self.stream is not None or (modality == "text" and lists):
            kind = "a stream" if self.stream is not None else f"lists in {column!r}, of which each draws one"
            raise ValueError(f"expected a {modality} for every row, the same in every epoch, got {kind}")
        rows = self._rows.select_columns([column])
        files = "" if modality == "text" else file_times(rows.data.column(column), self.root)
        return f"{rows._fingerprint} {self.root} {self.on_bad_image} {files}"

    def texts(self, indices: Sequence[int | StreamedRow]) -> list[str]:
        """The captions of some samples as this epoch draws them; no image is read."""
        column = str(self.caption_column)
        if self.stream is None:
            captions = self._captions[indices][column]
        else:
            captions = [index.row[column] for index in indices if isinstance(index, StreamedRow)]
        return [self._draw_caption(caption, index) for caption, index in zip(captions, indices, strict=True)]

    def _draw_caption(self, caption: Any, index: int | StreamedRow) -> str:
        if isinstance(caption, list) and caption:
            draw = np.random.default_rng(self._seed_of(index))
            caption = caption[draw.integers(len(caption))]
        if not isinstance(caption, str):
            raise ValueError(
                f"row {index} of the data set: expected a string or a list of strings in the column "
                f"{self.caption_column!r}, got {caption!r}: correct the row or filter it out"
            )
        return caption

    def _count_skip(self) -> None:
        # Each worker has a slot of its own: += on shared memory is not atomic.
        worker = torch.utils.data.get_worker_info()
        self._skipped[0 if worker is None else 1 + worker.id % MAX_WORKERS] += 1


def _undecoded(dataset: HFDataset, column: str) -> HFDataset:
    """Leave images as they are stored: `datasets` would decode with the row, and fail without saying which it was."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.decode(False)
    return dataset.cast_column(column, datasets.Image(decode=False))


def _require_integers(features: datasets.Features, column: str) -> None:
    feature = features[column]
    if "int" not in str(feature.dtype):
        raise ValueError(
            f"expected integers in the column {column!r}, got {feature}: "
            f"use dataset.class_encode_column({column!r}), or for a stream cast_column to a ClassLabel with names"
        )
