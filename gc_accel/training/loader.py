"""The loader that training reads, made from the arguments: of a map-style data set, or of a stream."""

from collections.abc import Callable
from typing import Any

import torch

from gc_accel.data import BatchPlan, ChunkedLoader, StreamLoader, StreamPlan
from gc_accel.data.sources.rows import stream_of
from gc_accel.engine.joining import samples_of_a_call
from gc_accel.training.arguments import CachedContrastiveArguments


def training_loader(
    dataset: Any, collator: Any, args: CachedContrastiveArguments, chunk_size: int
) -> ChunkedLoader:
    """A loader for the trainer, of as many batches as `drop_last` leaves of a data set, or `max_steps` of a stream.

    Args:
        dataset: has `texts`, if a batch can be sorted by their lengths.
        collator: has `token_lengths`, if chunks are bounded in tokens.
        args: of the run.
        chunk_size: samples of a chunk.

    Raises:
        ValueError: the data set does not fill a global batch, or is a stream that nobody decodes.
    """
    planned: dict[str, Any] = {
        "batch_size": args.per_device_train_batch_size,
        "chunk_size": _samples_per_load(args, chunk_size),
        "rank": args.process_index,
        "world_size": args.world_size,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "lengths": _lengths_of(dataset, collator, args),
        "chunk_tokens": args.chunk_tokens,
    }
    workers = args.dataloader_num_workers
    options: dict[str, Any] = {
        "num_workers": workers,
        "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
        "prefetch_factor": args.dataloader_prefetch_factor,
        "persistent_workers": args.dataloader_persistent_workers and workers > 0,
    }
    stream = stream_of(dataset)
    if stream is None:
        return ChunkedLoader(dataset, BatchPlan(len(dataset), **planned), collator, **options)
    planned |= {"batches": args.max_steps * args.gradient_accumulation_steps, "read_ahead": workers > 0}
    plan = StreamPlan(stream, shuffle_buffer=args.shuffle_buffer, **planned)
    return StreamLoader(dataset, plan, collator, device=args.device, **options)


def _samples_per_load(args: CachedContrastiveArguments, chunk_size: int) -> int:
    """How many samples are loaded at once: as many whole chunks as may go into a call of the first pass."""
    if args.chunk_tokens is not None:
        return chunk_size
    on_host, checkpoints = args.device.type == "cpu", args.gradient_checkpointing
    return samples_of_a_call(chunk_size, args.forward_chunk_size, on_host=on_host, checkpoints=checkpoints)


def _lengths_of(
    dataset: Any, collator: Any, args: CachedContrastiveArguments
) -> Callable[[list[Any]], list[int]] | None:
    """From samples to the lengths of their texts, None if batches are not sorted by them."""
    texts = getattr(dataset, "texts", None) if args.sort_by_length else None
    if texts is None:
        return None
    if args.chunk_tokens is None:  # characters are counted faster than tokens
        return lambda samples: [len(text) for text in texts(samples)]
    return lambda samples: collator.token_lengths(texts(samples))
