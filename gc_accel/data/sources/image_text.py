"""Image-text data is found in a folder, a file, several of them, or on the hub, and is loaded or streamed."""

from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import Any

import datasets

BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
END_OF_TAR = bytes(1024)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # gzip, bzip2, xz
HFDataset = Any  # datasets.Dataset or datasets.IterableDataset


def load_image_text(
    source: str,
    split: str,
    *,
    name: str | None = None,
    image_column: str = "image",
    streaming: bool = False,
) -> HFDataset:
    """Load one split of an image-text data set.

    Args:
        source: a folder of images with a ``metadata.csv`` or ``metadata.jsonl`` (or any other folder that
            ``datasets.load_dataset`` reads, such as one of webdataset shards); a .csv, .tsv, .json, .jsonl,
            .parquet or .tar (webdataset) file, or a pattern with ``*`` for several of them, from whose folder
            relative image paths count; or the name of a data set on the Hugging Face hub.
        split: such as "train" or "train[:1%]". A single file is the split that is asked for.
        name: the configuration, for a data set that has several.
        image_column: the column in which a file keeps its image paths.
        streaming: read rows as they are needed, images undecoded, without a copy on disk.

    Raises:
        ValueError: ``source`` looks like a path but nothing is there, is a file of another kind, has no
            ``image_column``, or has a .tar file that is not whole; a part of a split is to be streamed.
    """
    if streaming and "[" in split:
        raise ValueError(f"expected a whole split to stream, got {split!r}: leave the part in brackets out")
    options: dict[str, Any] = {"split": split} | ({"streaming": True} if streaming else {})
    rows = _load(source, name, image_column, options)
    return rows.decode(False) if streaming and rows.features else rows


def _load(source: str, name: str | None, image_column: str, options: dict[str, Any]) -> HFDataset:
    path = Path(source).expanduser()
    files = [Path(file).resolve() for file in sorted(glob(str(path)))] if "*" in source else [path.resolve()]
    if files and all(file.is_file() for file in files):
        return _load_files(files, image_column, options)
    if path.is_dir():
        check_archives(file for file in path.rglob("*.tar") if file.is_file())
        return datasets.load_dataset(str(path.resolve()), name, **options)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or path.suffix.lower() in BUILDERS:
        raise ValueError(
            f"expected a folder, a {', '.join(BUILDERS)} file or the name of a data set on the hub, "
            f"got {source!r}, and there is nothing at {path.absolute()}: check the path"
        )
    return datasets.load_dataset(source, name, **options)


def _load_files(files: list[Path], image_column: str, options: dict[str, Any]) -> HFDataset:
    path, suffix = files[0], files[0].suffix.lower()
    if suffix not in BUILDERS:
        raise ValueError(f"expected a {', '.join(BUILDERS)} file, got {path}: convert it, or pass its folder")
    if suffix == ".tar":
        check_archives(files)
    dataset = read_files(files, **options)
    features = features_of(dataset)
    require_columns(features, image_column=image_column)
    if features[image_column].dtype not in ("string", "large_string"):
        return dataset
    paths = {"column": image_column, "folder": path.parent}
    return dataset.map(_resolve, input_columns=image_column, fn_kwargs=paths, batched=True)


def read_files(files: list[Path], split: str, **options: Any) -> HFDataset:
    """Read files of one of the kinds in `BUILDERS`, which are the split that is asked for."""
    suffix = files[0].suffix.lower()
    # The files are given by the plain name of the split, without a slice such as "[:1%]".
    data_files = {split.partition("[")[0]: [str(file) for file in files]}
    separator = {"sep": "\t"} if suffix == ".tsv" else {}
    return datasets.load_dataset(BUILDERS[suffix], data_files=data_files, split=split, **options, **separator)


def check_archives(files: Iterable[Path]) -> None:
    """Refuse tar files that end early, whose tail the reader would leave out without a word.

    A whole file ends in two blocks of zeros. Compressed files, whatever they are called, are not looked into.

    Raises:
        ValueError: a file ends early; the error names it.
    """
    for path in files:
        with path.open("rb") as file:
            compressed = file.read(6).startswith(COMPRESSED)
            file.seek(max(0, path.stat().st_size - len(END_OF_TAR)))
            if not compressed and file.read() != END_OF_TAR:
                raise ValueError(
                    f"expected a whole tar archive, got one that ends early, or another kind of file: {path}. Copy it "
                    "again, or leave it out"
                )


def features_of(dataset: HFDataset) -> datasets.Features:
    """The columns and their types. A stream may not know them, and then its first row is read."""
    return dataset.features or datasets.Dataset.from_list(list(dataset.take(1))).features


def require_columns(features: datasets.Features, **columns: str) -> None:
    """Check that columns exist.

    Raises:
        ValueError: a column is missing; the error names the argument to set.
    """
    for argument, column in columns.items():
        if column not in features:
            raise ValueError(
                f"expected a column {column!r}, got a data set with {list(features)}: set {argument}"
            )


def _resolve(images: list[str | None], *, column: str, folder: Path) -> dict[str, list[str | None]]:
    return {column: [image and str(folder / image) for image in images]}
