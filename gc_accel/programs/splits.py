"""Which rows a program trains on and which it evaluates on."""

from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import datasets

from gc_accel.data.sources.image_text import HFDataset, features_of, load_image_text, require_columns
from gc_accel.data.sources.rows import take_rows
from gc_accel.training.options import option


@dataclass
class SplitArguments:
    """A data set, its splits, and the columns that any program with images reads."""

    dataset: str = option(
        "",
        "A folder of images or webdataset shards, a csv, jsonl, parquet or tar file (or several: 'shards/*.tar'), or a "
        "data set of the hub.",
    )
    dataset_config: str | None = option(None, "Configuration, for a data set that has several.")
    streaming: bool = option(
        False,
        "Read the training data in its own order, shuffled in a buffer (--shuffle_buffer), without a copy on disk: for "
        "sets too large for one. Needs --max_steps, as a stream has no length.",
    )
    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option(
        None, "Split to evaluate on; by default part of the training split is held out."
    )
    eval_size: int = option(
        1000,
        "Samples to evaluate on. With --streaming they are drawn from the beginning of the stream, stay in memory, and "
        "are left out of training wherever they turn up again.",
    )
    split_seed: int = option(0, "Which samples are held out.")
    image_column: str = option("image", "Column with images, their bytes or their paths.")
    label_column: str | None = option(None, "Column of integers, or of class names where a program says so.")
    on_bad_image: str = option("error", "What to do with unreadable images.", choices=["error", "skip"])


def check_streaming(args: SplitArguments, max_steps: int, *, built_in: str) -> None:
    """Refuse, before anything is loaded, to stream without an end, or what is no stream.

    Raises:
        ValueError: `max_steps` is not set, or the data set is the built-in one.
    """
    if args.streaming and max_steps < 1:
        raise ValueError("expected --max_steps with --streaming, as a stream has no length: set it")
    if args.streaming and args.dataset == built_in:
        raise ValueError(f"expected a --dataset to stream, got the built-in {built_in!r}: name one")


def load_splits(args: SplitArguments) -> tuple[HFDataset, datasets.Dataset]:
    """Load rows to train on, and at most `eval_size` others, drawn by `split_seed`, to evaluate on.

    Raises:
        ValueError: there is no evaluation split and the training split is no larger than `eval_size`.
    """
    options: dict[str, Any] = {"name": args.dataset_config, "image_column": args.image_column}
    if args.streaming:
        return _stream_splits(args, options | {"streaming": True})
    rows = load_image_text(args.dataset, args.train_split, **options)
    if args.eval_split is not None:
        held_out = load_image_text(args.dataset, args.eval_split, **options).shuffle(args.split_seed)
        return rows, held_out.select(range(min(args.eval_size, len(held_out))))
    if args.eval_size >= len(rows):
        raise _too_few(args, len(rows))
    splits = rows.train_test_split(test_size=args.eval_size, seed=args.split_seed)
    return splits["train"], splits["test"]


def _stream_splits(
    args: SplitArguments, options: dict[str, Any]
) -> tuple[datasets.IterableDataset, datasets.Dataset]:
    rows = load_image_text(args.dataset, args.train_split, **options)
    if args.eval_split is not None:
        eval_rows = load_image_text(args.dataset, args.eval_split, **options)
        return rows, take_rows(eval_rows, args.eval_size, seed=args.split_seed)
    require_columns(features_of(rows), image_column=args.image_column)
    held_out = take_rows(rows, args.eval_size, seed=args.split_seed)
    # Rows are not told by their place in the stream, which is another one when shards are shuffled or shared out.
    known = frozenset(_digest(image) for image in held_out[args.image_column])
    rows = rows.filter(
        partial(_are_not_in, known), input_columns=args.image_column, batched=True, batch_size=64
    )
    if next(iter(rows), None) is None:
        raise _too_few(args, len(held_out))
    return rows, held_out


def _are_not_in(known: frozenset[bytes], images: list[Any]) -> list[bool]:
    return [_digest(image) not in known for image in images]


def _digest(image: Any) -> bytes:
    """A hash that tells an image that is not decoded, bytes or a path, from others."""
    if isinstance(image, dict):
        image = image["bytes"] or image["path"]
    return blake2b(image if isinstance(image, bytes) else str(image).encode(), digest_size=16).digest()


def _too_few(args: SplitArguments, count: int) -> ValueError:
    return ValueError(
        f"expected more than eval_size = {args.eval_size} rows in split {args.train_split!r}, got {count}: "
        "lower eval_size, or name an eval_split"
    )
