"""Which rows a program trains on and which it evaluates on."""

from dataclasses import dataclass
from typing import Any

import datasets

from gc_accel.command_line import option
from gc_accel.data.readers import load_image_text


@dataclass
class SplitArguments:
    """A data set, its splits, and the columns that any program with images reads."""

    dataset: str = option("", "A folder of images, a csv, jsonl or parquet file, or a data set of the hub.")
    dataset_config: str | None = option(None, "Configuration, for a data set that has several.")
    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option(
        None, "Split to evaluate on; by default part of the training split is held out."
    )
    eval_size: int = option(1000, "Samples to evaluate on.")
    split_seed: int = option(0, "Which samples are held out.")
    image_column: str = option("image", "Column with images, their bytes or their paths.")
    label_column: str | None = option(None, "Column of integers, or of class names where a program says so.")
    on_bad_image: str = option("error", "What to do with unreadable images.", choices=["error", "skip"])


def load_splits(args: SplitArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train on, and at most `eval_size` others, drawn by `split_seed`, to evaluate on.

    Raises:
        ValueError: there is no evaluation split and the training split is no larger than `eval_size`.
    """
    options: dict[str, Any] = {"name": args.dataset_config, "image_column": args.image_column}
    rows = load_image_text(args.dataset, args.train_split, **options)
    if args.eval_split is not None:
        held_out = load_image_text(args.dataset, args.eval_split, **options).shuffle(args.split_seed)
        return rows, held_out.select(range(min(args.eval_size, len(held_out))))
    if args.eval_size >= len(rows):
        raise ValueError(
            f"expected more than eval_size = {args.eval_size} rows in split {args.train_split!r}, got {len(rows)}: "
            "lower eval_size, or name an eval_split"
        )
    parts = rows.train_test_split(test_size=args.eval_size, seed=args.split_seed)
    return parts["train"], parts["test"]
