"""The representations of a frozen tower, computed once before training and read from disk in every step.

    images ──> frozen tower ──> output_dir/precomputed/image-<fingerprint>.npy      once, in shares over ranks
                                                   │
    captions ──> text tower ──> text    image <────┘ row of the sample              every step

A tower that does not train gives the same representations in every epoch, as long as nothing in its data is drawn
anew. Training then neither opens images nor runs the tower. The file's name is a fingerprint of all that went into
it, so that a file of other weights, data or collator is never taken for it; and it gets that name when it is
complete, so that half a file is never taken for a whole one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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

INCOMPLETE = ".partial"
Encode = Callable[[Any], Tensor]  # from a chunk to its representations
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

    All ranks have to call this, before the encoder is prepared. They encode a share each.

    Args:
        encoder: has one frozen tower.
        dataset: `Precomputable`, such as an `ImageTextDataset`.
        collator: `ImageTextCollator`, `OpenClipCollator`, or another with their `settings`.
        folder: where the files are kept, common to all ranks.
        accelerator: knows the ranks and the precision.
        batch_size: samples encoded at once.
        num_workers: processes that read samples.
        progress: whether to show a bar.

    Raises:
        ValueError: no tower is frozen; the data are drawn anew in each epoch, or are a stream; parameters are
            sharded; a representation is not finite.
    """
    tower, dataset = frozen_tower(encoder), _source(dataset)
    if accelerator.distributed_type in SHARDING:
        raise ValueError(f"expected whole towers on every rank, got {accelerator.distributed_type}: use DDP")
    path = Path(folder) / f"{tower}-{fingerprint(encoder, dataset, collator, accelerator, tower)}.npy"
    path, on_disk = broadcast_object_list([path, path.is_file()])  # what the first rank saw
    if not on_disk:
        (other,) = encoder.streams.keys() - {tower}
        loader = _ShareLoader(dataset.without(other), collator, accelerator, batch_size, num_workers)
        # A tower that was frozen after it was built is in training mode until the first step.
        with in_mode(encoder, False):
            _write(path, partial(_encode, encoder, tower, accelerator), loader, accelerator, progress)
    return PrecomputedDataset(dataset, tower, path)


def _source(dataset: Any) -> Precomputable:
    """The data set itself, which a `PrecomputedDataset` of an earlier run may wrap.

    Raises:
        ValueError: the data are drawn anew in each epoch.
    """
    dataset = dataset.dataset if isinstance(dataset, PrecomputedDataset) else dataset
    if not isinstance(dataset, Precomputable):
        raise ValueError(
            f"expected a data set that is the same in every epoch, with `without` and `fingerprint`, got "
            f"{type(dataset).__name__}: leave precompute_frozen off"
        )
    return dataset


def frozen_tower(encoder: Any) -> str:
    """The name of the one tower that does not train, "image" or "text".

    Raises:
        ValueError: there is no such tower, or no other tower.
    """
    frozen = sorted(encoder.frozen_streams)
    if len(encoder.streams) == 1 or len(frozen) != 1:
        raise ValueError(
            f"expected one frozen tower of several to precompute, got {frozen} of {list(encoder.streams)}: freeze the "
            "image or the text tower of an image-text model, or leave precompute_frozen off"
        )
    return frozen[0]


def fingerprint(
    encoder: DualEncoder, dataset: Precomputable, collator: Any, accelerator: Accelerator, tower: str
) -> str:
    """A hash of all that the representations of one tower depend on: its weights, data, collator and precision."""
    facts = {
        "model": [type(encoder.model).__name__, str(encoder.config)],
        "precision": accelerator.mixed_precision,
        "data": [type(dataset).__name__, dataset.fingerprint(tower), len(dataset)],
        "collator": collator.settings(tower),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(encoder.tower(tower).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


class _ShareLoader(DataLoader):
    """One rank's share of a data set in chunks, each with its size and the positions of samples not left out."""

    def __init__(
        self,
        samples: Any,
        collator: Callable[..., Any],
        accelerator: Accelerator,
        batch_size: int,
        num_workers: int,
    ) -> None:
        rank, world = accelerator.process_index, accelerator.num_processes
        self.samples = samples
        self.indices = range(rank * len(samples) // world, (rank + 1) * len(samples) // world)
        super().__init__(
            Subset(samples, self.indices),
            batch_size=batch_size,
            collate_fn=partial(_collate_with_positions, collator),
            num_workers=num_workers,
            generator=torch.Generator(),  # draws the workers' seeds, apart from the one that dropout uses
        )


def _collate_with_positions(collator: Callable[..., Any], items: Sequence[Any]) -> tuple[int, list[int], Any]:
    kept = [position for position, item in enumerate(items) if item is not None]
    return len(items), kept, collator(items)


@torch.no_grad()
def _encode(encoder: DualEncoder, tower: str, accelerator: Accelerator, chunk: Any) -> Tensor:
    """Representations `(C, D)` on the host of a chunk on the host, as a cached step would have them."""
    inputs = {key: chunk[key] for key in encoder.streams[tower] if key in chunk}
    with accelerator.autocast():
        reps = encoder(**{tower: send_to_device(inputs, next(encoder.parameters()).device)})[tower]
    reps = reps.cpu() if reps.dtype == torch.float64 else reps.cpu().float()
    if not reps.isfinite().all():
        raise ValueError(f"expected finite representations of the frozen {tower} tower, got {reps}")
    return reps


def _write(
    path: Path, encode: Encode, loader: _ShareLoader, accelerator: Accelerator, progress: bool
) -> None:
    """Encode the shares of all ranks into one file, which gets its name when it is complete."""
    incomplete, example = path.with_suffix(INCOMPLETE), _encode_one(encode, loader)
    bar = tqdm(
        total=len(loader.indices),
        desc=f"Encoding {path.stem.partition('-')[0]}s once",
        disable=not (progress and accelerator.is_local_main_process),
    )
    try:
        if accelerator.is_main_process:
            _create(incomplete, example, len(loader.samples))
        accelerator.wait_for_everyone()
        with bar, incomplete.open("r+b") as file:
            offset = np.load(incomplete, mmap_mode="r").offset
            file.seek(offset + loader.indices.start * example.nbytes)
            for reps in _encode_share(encode, loader, example):
                file.write(reps.tobytes())
                bar.update(len(reps))
            file.flush()
            os.fsync(file.fileno())
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            incomplete.rename(path)
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            incomplete.unlink(missing_ok=True)


def _encode_one(encode: Encode, loader: _ShareLoader) -> np.ndarray:
    """The representation `(1, D)` of the first sample that can be read."""
    items = (loader.samples[index] for index in range(len(loader.samples)))
    first = next((item for item in items if item is not None), None)
    if first is None:
        raise ValueError("expected a sample to encode, got none that could be read")
    return encode(loader.collate_fn([first])[2]).numpy()


def _create(incomplete: Path, example: np.ndarray, size: int) -> None:
    """Create a file with room for `size` rows, and delete what a run that was killed left behind."""
    incomplete.parent.mkdir(parents=True, exist_ok=True)
    for leftover in incomplete.parent.glob(f"*{INCOMPLETE}"):
        leftover.unlink()
    if others := sorted(incomplete.parent.glob(f"{incomplete.stem.partition('-')[0]}-*.npy")):
        logger.warning(
            "%s: of other weights, data or settings, so encoding anew", ", ".join(map(str, others))
        )
    np.lib.format.open_memmap(incomplete, "w+", example.dtype, (size, example.shape[1]))


def _encode_share(encode: Encode, loader: _ShareLoader, example: np.ndarray) -> Iterator[np.ndarray]:
    """Representations `(C, D)` of this rank, chunk by chunk; the rows of samples that were left out are NaN."""
    missing = 0
    for count, kept, chunk in loader:
        reps = np.full((count, example.shape[1]), np.nan, example.dtype)
        if kept:
            reps[kept] = encode(chunk).numpy()
        missing += count - len(kept)
        yield reps
    if missing:
        logger.warning("%d unreadable sample(s) are left out of training, whenever one is drawn", missing)
