"""The representations of a frozen tower, computed once before training and read from disk in every step.

    images ──> frozen tower ──> output_dir/precomputed/image-<fingerprint>.npy      once, in shares over ranks
                                                   │
    captions ──> text tower ──> text    image <────┘ row of the sample              every step

A tower that does not train gives the same representations in every epoch, as long as nothing in its data is drawn
anew: training then neither opens images nor runs the tower. The file's name is a fingerprint of all that went into
it, so that a file of other weights, data or collator is never taken for it; and it gets that name when it is
complete, so that half a file is never taken for a whole one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.utils import logging

from gc_accel.data.sources.precomputed import Precomputable, PrecomputedDataset
from gc_accel.distributed.replicas import SHARDING
from gc_accel.encoders import DualEncoder
from gc_accel.state.modules import in_mode

PARTIAL = ".partial"
logger = logging.get_logger(__name__)


def precompute(
    encoder: DualEncoder,
    dataset: Any,
    collator: Any,
    folder: str | Path,
    *,
    accelerator: Accelerator,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> PrecomputedDataset:
    """A data set whose samples have the representations of the frozen tower, computed if they are not on disk.

    To be called on all ranks, which encode a share each, before the encoder is prepared.

    Args:
        encoder: with one frozen tower.
        dataset: `Precomputable`, such as an `ImageTextDataset`.
        collator: `ImageTextCollator`, `OpenClipCollator`, or another with their `settings`.
        folder: for the files; common to all ranks.
        accelerator: decides on the precision.
        batch_size: samples encoded at once.
        num_workers: that read them.
        progress: whether to show a bar.

    Raises:
        ValueError: no tower is frozen; the data are drawn anew in each epoch, or are a stream; parameters are
            sharded; a representation is not finite.
    """
    dataset = dataset.dataset if isinstance(dataset, PrecomputedDataset) else dataset
    part = frozen_tower(encoder)
    if not isinstance(dataset, Precomputable):
        raise ValueError(
            f"expected a data set that is the same in every epoch, with `without` and `fingerprint`, got "
            f"{type(dataset).__name__}: leave precompute_frozen off"
        )
    if accelerator.distributed_type in SHARDING:
        raise ValueError(f"expected whole towers on every rank, got {accelerator.distributed_type}: use DDP")
    path = Path(folder) / f"{part}-{fingerprint(encoder, dataset, collator, accelerator, part)}.npy"
    path, found = broadcast_object_list([path, path.is_file()])  # what the first rank saw
    if not found:
        (other,) = encoder.streams.keys() - {part}
        loader = _Share(dataset.without(other), collator, accelerator, batch_size, num_workers)
        # A tower that was frozen after it was built is in training mode until the first step.
        with in_mode(encoder, False):
            _write(path, _tower(encoder, part, accelerator), loader, accelerator, progress)
    return PrecomputedDataset(dataset, part, path)


def frozen_tower(encoder: Any) -> str:
    """The stream of the one tower that does not train.

    Raises:
        ValueError: there is none, or nothing else.
    """
    frozen = sorted(encoder.frozen_streams)
    if len(encoder.streams) == 1 or len(frozen) != 1:
        raise ValueError(
            f"expected one frozen tower of several to precompute, got {frozen} of {list(encoder.streams)}: freeze the "
            "image or the text tower of an image-text model, or leave precompute_frozen off"
        )
    return frozen[0]


def fingerprint(
    encoder: DualEncoder, dataset: Precomputable, collator: Any, accelerator: Accelerator, part: str
) -> str:
    """Of all that the representations of one tower depend on: its weights, data, collator and precision."""
    facts = {
        "model": [type(encoder.model).__name__, str(encoder.config)],
        "precision": accelerator.mixed_precision,
        "data": [type(dataset).__name__, dataset.fingerprint(part), len(dataset)],
        "collator": collator.settings(part),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(encoder.tower(part).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


class _Share(DataLoader):
    """One rank's part of a data set in chunks, each with the positions in it of what was not left out."""

    def __init__(
        self,
        samples: Any,
        collator: Callable[..., Any],
        accelerator: Accelerator,
        batch_size: int,
        num_workers: int,
    ) -> None:
        rank, world = accelerator.process_index, accelerator.num_processes
        own = range(rank * len(samples) // world, (rank + 1) * len(samples) // world)
        self.samples, self.own = samples, own
        super().__init__(
            Subset(samples, own),
            batch_size=batch_size,
            collate_fn=_WithPositions(collator),
            num_workers=num_workers,
            generator=torch.Generator(),  # of the workers' seeds, apart from the one that dropout uses
        )


class _WithPositions:
    """A collator that says how many samples it got, and which of them it kept."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[Any]) -> tuple[int, list[int], Any]:
        kept = [position for position, item in enumerate(items) if item is not None]
        return len(items), kept, self.collator(items)


def _tower(encoder: DualEncoder, part: str, accelerator: Accelerator) -> Callable[[Any], Tensor]:
    """From a chunk on the host to representations there, `(C, D)`, as a cached step would have them."""

    @torch.no_grad()
    def encode(chunk: Any) -> Tensor:
        inputs = {key: chunk[key] for key in encoder.streams[part] if key in chunk}
        with accelerator.autocast():
            reps = encoder(**{part: send_to_device(inputs, next(encoder.parameters()).device)})[part]
        reps = reps.cpu() if reps.dtype == torch.float64 else reps.cpu().float()
        if not reps.isfinite().all():
            raise ValueError(f"expected finite representations of the frozen {part} tower, got {reps}")
        return reps

    return encode


def _write(
    path: Path, encode: Callable[[Any], Tensor], loader: _Share, accelerator: Accelerator, progress: bool
) -> None:
    """Encode the shares of all ranks into one file, which gets its name when it is complete."""
    partial, example = path.with_suffix(PARTIAL), _example(encode, loader)
    bar = tqdm(
        total=len(loader.own),
        desc=f"Encoding {path.stem.partition('-')[0]}s once",
        disable=not (progress and accelerator.is_local_main_process),
    )
    try:
        if accelerator.is_main_process:
            _create(partial, example, len(loader.samples))
        accelerator.wait_for_everyone()
        with bar, partial.open("r+b") as file:
            file.seek(np.load(partial, mmap_mode="r").offset + loader.own.start * example.nbytes)
            for rows in _rows(encode, loader, example):
                file.write(rows.tobytes())
                bar.update(len(rows))
            file.flush()
            os.fsync(file.fileno())
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            partial.rename(path)
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            partial.unlink(missing_ok=True)


def _example(encode: Callable[[Any], Tensor], loader: _Share) -> np.ndarray:
    """The representation of one sample, `(1, D)`."""
    items = (loader.samples[index] for index in range(len(loader.samples)))
    first = next((item for item in items if item is not None), None)
    if first is None:
        raise ValueError("expected a sample to encode, got none that could be read")
    return encode(loader.collate_fn([first])[2]).numpy()


def _create(partial: Path, example: np.ndarray, size: int) -> None:
    """A file of the size of all rows, still empty; what a run that was killed left behind goes."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left in partial.parent.glob(f"*{PARTIAL}"):
        left.unlink()
    if others := sorted(partial.parent.glob(f"{partial.stem.partition('-')[0]}-*.npy")):
        logger.warning(
            "%s: of other weights, data or settings, so encoding anew", ", ".join(map(str, others))
        )
    np.lib.format.open_memmap(partial, "w+", example.dtype, (size, example.shape[1]))


def _rows(encode: Callable[[Any], Tensor], loader: _Share, example: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of this rank, chunk by chunk; of samples that were left out NaN."""
    missing = 0
    for count, kept, chunk in loader:
        rows = np.full((count, example.shape[1]), np.nan, example.dtype)
        if kept:
            rows[kept] = encode(chunk).numpy()
        missing += count - len(kept)
        yield rows
    if missing:
        logger.warning("%d unreadable sample(s) are left out of training, whenever one is drawn", missing)
