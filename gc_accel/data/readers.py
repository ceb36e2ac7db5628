"""Image-text data sets of one's own: from a folder, a table or the hub to pairs of image and caption.

`load_image_text` finds the data and leaves the reading to `datasets`. `ImageTextDataset` turns a row into
a pair: it decodes the image itself, so that a broken file is reported by its row or left out, and draws one
caption where a row has several. The draw depends on (seed, epoch, index) alone, so a resumed run repeats it.
"""

from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from gc_accel.data.epochs import SharedEpoch

BUILDERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
MAX_WORKERS = 256


def load_image_text(
    source: str, split: str, *, name: str | None = None, image_column: str = "image"
) -> datasets.Dataset:
    """Load one split of an image-text data set.

    Args:
        source: a folder of images with a ``metadata.csv`` or ``metadata.jsonl`` (or any other folder that
            ``datasets.load_dataset`` reads); a .csv, .tsv, .json, .jsonl or .parquet file, from whose folder
            relative image paths count; or the name of a data set on the Hugging Face hub.
        split: such as "train" or "train[:1%]". A single file is the split that is asked for.
        name: the configuration, for a data set that has several.
        image_column: where a file keeps its image paths.

    Raises:
        ValueError: ``source`` looks like a path but nothing is there, is a file of another kind, or has no
            ``image_column``.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _load_file(path.resolve(), split, image_column)
    if path.is_dir():
        return datasets.load_dataset(str(path.resolve()), name, split=split)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or path.suffix.lower() in BUILDERS:
        raise ValueError(
            f"expected a folder, a {', '.join(BUILDERS)} file or the name of a data set on the hub, "
            f"got {source!r}, and there is nothing at {path.absolute()}: check the path"
        )
    return datasets.load_dataset(source, name, split=split)


def _load_file(path: Path, split: str, image_column: str) -> datasets.Dataset:
    suffix = path.suffix.lower()
    if suffix not in BUILDERS:
        raise ValueError(f"expected a {', '.join(BUILDERS)} file, got {path}: convert it, or pass its folder")
    # The files are given by the plain name of the split, without a slice such as "[:1%]".
    files = {split.partition("[")[0]: str(path)}
    separator = {"sep": "\t"} if suffix == ".tsv" else {}
    dataset = datasets.load_dataset(BUILDERS[suffix], data_files=files, split=split, **separator)
    _require_columns(dataset, image_column=image_column)
    if dataset.features[image_column].dtype not in ("string", "large_string"):
        return dataset
    options = {"column": image_column, "folder": path.parent}
    return dataset.map(_resolve, input_columns=image_column, fn_kwargs=options, batched=True)


def _resolve(images: list[str | None], *, column: str, folder: Path) -> dict[str, list[str | None]]:
    return {column: [image and str(folder / image) for image in images]}


class ImageTextDataset(torch.utils.data.Dataset[dict[str, Any] | None]):
    """Images with their captions, from the columns of a `datasets.Dataset`.

    An item is ``{"image": PIL image in RGB, "text": str}``, with an integer "label" if a label column is
    named, without "text" if no caption column is, or None for a row that is left out.

    Args:
        dataset: one split. ``datasets.Dataset.from_list`` makes one from rows in memory.
        image_column: images, encoded bytes, ``{"bytes", "path"}`` or paths.
        caption_column: strings, or lists of strings of which each epoch draws one per row;
            None for images alone.
        label_column: integers.
        root: the folder from which relative paths count.
        on_bad_image: "error", or "skip" to leave out rows whose image cannot be read.
        seed: of the draw of captions.

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
        dataset: datasets.Dataset,
        *,
        image_column: str = "image",
        caption_column: str | None = "text",
        label_column: str | None = None,
        root: str | Path | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        seed: int = 0,
    ) -> None:
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"expected on_bad_image 'error' or 'skip', got {on_bad_image!r}")
        asked = {"image_column": image_column, "caption_column": caption_column, "label_column": label_column}
        columns = {argument: column for argument, column in asked.items() if column is not None}
        _require_columns(dataset, **columns)
        if label_column is not None:
            _require_integers(dataset, label_column)
        if isinstance(dataset.features[image_column], datasets.Image):
            # datasets would decode while it reads the row, and fail without saying which row it was.
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self._rows = dataset.select_columns(list(columns.values()))
        self._captions = dataset.select_columns([] if caption_column is None else [caption_column])
        self.image_column = image_column
        self.caption_column = caption_column
        self.label_column = label_column
        self.root = Path(root or "")
        self.on_bad_image = on_bad_image
        self.seed = seed
        self._epoch = SharedEpoch()
        # In shared memory too, so that workers that are already running report their skips.
        self._skipped = torch.zeros(1 + MAX_WORKERS, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        row = self._rows[index]
        item: dict[str, Any] = {}
        if self.caption_column is not None:
            item["text"] = self._draw_caption(row[self.caption_column], index)
        if self.label_column is not None:
            item["label"] = int(row[self.label_column])
        try:
            item["image"] = _read_image(row[self.image_column], self.root)
        except Exception as error:  # PIL's decoders raise almost anything on corrupt bytes, even SyntaxError
            if self.on_bad_image == "skip":
                self._count_skip()
                return None
            raise ValueError(
                f"row {index} of the data set: cannot read image {_describe(row[self.image_column])}: "
                f"expected one that PIL can open, got {type(error).__name__}: {error}. Correct the row, "
                "or pass on_bad_image='skip' to leave such rows out"
            ) from error
        return item

    def set_epoch(self, epoch: int) -> None:
        """Draw the captions of this epoch from now on, also in workers that are already running."""
        self._epoch.set(epoch)

    @property
    def skipped(self) -> int:
        """How many times a row was left out because its image could not be read, over all workers."""
        return int(self._skipped.sum())

    def texts(self, indices: list[int]) -> list[str]:
        """The captions that this epoch draws; no image is read."""
        captions = self._captions[indices][self.caption_column]
        return [self._draw_caption(each, index) for each, index in zip(captions, indices, strict=True)]

    def _draw_caption(self, caption: Any, index: int) -> str:
        if isinstance(caption, list) and caption:
            draw = np.random.default_rng((self.seed, int(self._epoch), index))
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


def _require_columns(dataset: datasets.Dataset, **columns: str) -> None:
    for argument, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"expected a column {column!r}, got a data set with {dataset.column_names}: set {argument}"
            )


def _require_integers(dataset: datasets.Dataset, column: str) -> None:
    feature = dataset.features[column]
    if "int" not in str(feature.dtype):
        raise ValueError(
            f"expected integers in the column {column!r}, got {feature}: "
            f"use dataset.class_encode_column({column!r})"
        )


def _read_image(value: Any, root: Path) -> Image.Image:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return _to_rgb(value)
    with Image.open(BytesIO(value) if isinstance(value, bytes) else root / value) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, what is transparent becoming white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("path") or value.get("bytes")
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else repr(value)
