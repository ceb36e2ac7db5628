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
    """A map-style data set with samples ``{"image", "text", "label"?}`` of which a modality stays the same for ever.

    A data set that draws crops of its images has no such modality, and not these methods.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any] | None: ...

    def texts(self, indices: list[int], /) -> list[str]:
        """The texts of some samples, as this epoch draws them."""

    def without(self, modality: str, /) -> "Precomputable":
        """The same samples without their "image", which is then not opened, or without their "text"."""

    def fingerprint(self, modality: str, /) -> str:
        """A string that tells the "image" or "text" of all samples from others, equal in every process.

        Raises:
            ValueError: that modality is drawn anew in each epoch.
        """


class PrecomputedDataset(Dataset[dict[str, Any] | None]):
    """Another data set, with the representations of a frozen tower in place of what that tower encodes.

    An item has ``"image_embeds"`` `(D,)` instead of ``"image"``, or ``"text_embeds"`` instead of ``"text"``. A
    sample that was left out when they were computed is left out here.

    Args:
        dataset: has the samples.
        modality: "image" or "text".
        path: an .npy file of the representations, `(N, D)`; rows of NaN are samples that were left out. It is
            mapped into memory, row by row as it is read.
    """

    def __init__(self, dataset: Precomputable, modality: str, path: Path) -> None:
        self.dataset: Any = dataset
        self.modality, self.path = modality, path
        self._rest: Any = dataset.without(modality)
        if modality != "text":  # otherwise there is nothing to sort by
            self.texts: Any = self._rest.texts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        reps = torch.from_numpy(np.array(_open_rows(self.path)[index]))
        if reps.isnan().any():
            return None
        item = self._rest[index]
        return None if item is None else item | {f"{self.modality}_embeds": reps}

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set, which may still draw something, such as one of several captions."""
        set_epoch = getattr(self._rest, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def file_times(paths: pa.ChunkedArray, root: Path) -> str:
    """A fingerprint of the sizes and times of files, from a column of paths or of images as `datasets` stores them."""
    digest = sha256()
    for array in paths.chunks:
        if pa.types.is_struct(array.type):  # the table's own fingerprint covers images whose bytes it has
            array = pc.if_else(array.field("bytes").is_valid(), None, array.field("path"))
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            digest.update(repr([path and _time(root / path) for path in array.to_pylist()]).encode())
    return digest.hexdigest()


def _time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:  # there is no file, or it is inside an archive
        return None
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4)
def _open_rows(path: Path) -> np.ndarray:
    """Map the rows `(N, D)` into memory, once in each process, so that no worker is sent them."""
    return np.load(path, mmap_mode="r")
