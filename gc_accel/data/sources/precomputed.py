"""Samples whose image (or text) has been encoded before, for a tower that does not train."""

from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset


@runtime_checkable
class Precomputable(Protocol):
    """A map-style data set with samples ``{"image", "text", "label"?}`` of which a part stays the same for ever.

    One that draws crops of its images has no such part, and not these methods.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any] | None: ...

    def texts(self, indices: list[int], /) -> list[str]:
        """Of some samples, as this epoch draws them."""

    def without(self, part: str, /) -> "Precomputable":
        """The same samples without their "image", which is then not opened, or without their "text"."""

    def fingerprint(self, part: str, /) -> str:
        """Of all that decides on the "image" or "text" of every sample, equal in every process.

        Raises:
            ValueError: that part is drawn anew in each epoch.
        """


class PrecomputedDataset(Dataset[dict[str, Any] | None]):
    """Another data set, with the representations of a frozen tower in place of what that tower encodes.

    An item has ``"image_embeds"`` `(D,)` instead of ``"image"``, or ``"text_embeds"`` instead of ``"text"``. A
    sample that was left out when they were computed is left out here.

    Args:
        dataset: the samples.
        part: "image" or "text".
        path: an .npy file of the representations, `(N, D)`; rows of NaN are samples that were left out. It is
            mapped into memory, row by row as it is read.
    """

    def __init__(self, dataset: Precomputable, part: str, path: Path) -> None:
        self.dataset: Any = dataset
        self.part, self.path = part, path
        self._rest: Any = dataset.without(part)
        if part != "text":  # otherwise there is nothing to sort by
            self.texts: Any = self._rest.texts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        row = torch.from_numpy(np.array(_rows(self.path)[index]))
        if row.isnan().any():
            return None
        item = self._rest[index]
        return None if item is None else item | {f"{self.part}_embeds": row}

    def set_epoch(self, epoch: int) -> None:
        """For what the data set still draws, such as one of several captions."""
        set_epoch = getattr(self._rest, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def file_times(paths: pa.ChunkedArray, root: Path) -> str:
    """A fingerprint of the sizes and times of files: of a column of paths, or of what `datasets` makes of images."""
    digest = sha256()
    for chunk in paths.chunks:
        if pa.types.is_struct(chunk.type):  # what has its bytes in the table is known by the table
            chunk = pc.if_else(chunk.field("bytes").is_valid(), None, chunk.field("path"))
        if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
            digest.update(repr([path and _time(root / path) for path in chunk.to_pylist()]).encode())
    return digest.hexdigest()


def _time(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:  # none there, or inside an archive
        return None
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4)
def _rows(path: Path) -> np.ndarray:
    """Opened once in each process, so that no worker is sent the rows."""
    return np.load(path, mmap_mode="r")
