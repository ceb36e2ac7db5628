"""Reading image-text data: where it comes from, what a row may hold, what an error says."""

import gc
import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from gc_accel.data import ImageTextDataset, load_image_text

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(colour=RED, mode="RGB"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    """A folder with two images, to be described by a file beside them."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    (folder / "red.png").write_bytes(png(RED))
    (folder / "deep" / "blue.png").write_bytes(png(BLUE))
    return folder


def colours(dataset):
    return [item["image"].getpixel((0, 0)) for item in dataset]


def rows(image, text="a caption", **columns):
    return datasets.Dataset.from_list([{"image": image, "text": text, **columns}])


# --- where data comes from ---


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_with_metadata_is_read(photos, kind):
    lines = [("red.png", "a red thing"), ("deep/blue.png", "a blue thing")]
    if kind == "csv":
        text = "file_name,text\n" + "".join(f"{file},{caption}\n" for file, caption in lines)
    else:
        text = "".join(json.dumps({"file_name": file, "text": caption}) + "\n" for file, caption in lines)
    (photos / f"metadata.{kind}").write_text(text)
    dataset = ImageTextDataset(load_image_text(str(photos), "train"))
    gc.collect()  # datasets leaves the metadata file open: let the warning come here, where it is expected
    found = {item["text"]: item["image"].getpixel((0, 0)) for item in dataset}
    assert found == {"a red thing": RED, "a blue thing": BLUE}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_paths_in_a_file_count_from_its_folder(photos, kind, monkeypatch, tmp_path):
    table = datasets.Dataset.from_dict(
        {"image": ["red.png", "deep/blue.png"], "text": ["red, and big", "blue"]}
    )
    file = photos / f"captions.{kind}"
    if kind == "parquet":
        table.to_parquet(file)
    elif kind in ("json", "jsonl"):
        table.to_json(file)
    else:
        table.to_csv(file, sep="\t" if kind == "tsv" else ",")
    monkeypatch.chdir(tmp_path)
    dataset = ImageTextDataset(load_image_text(f"photos/captions.{kind}", "train"))
    assert colours(dataset) == [RED, BLUE]
    assert [item["text"] for item in dataset] == ["red, and big", "blue"]


def test_a_file_is_the_split_that_is_asked_for_and_can_be_sliced(photos):
    file = photos / "captions.csv"
    file.write_text("path,text\nred.png,red\ndeep/blue.png,blue\n")
    loaded = load_image_text(str(file), "validation[1:]", image_column="path")
    assert loaded["text"] == ["blue"]
    assert colours(ImageTextDataset(loaded, image_column="path")) == [BLUE]


def test_images_embedded_in_parquet_are_read(tmp_path):
    table = datasets.Dataset.from_dict({"image": [png(BLUE)], "text": ["blue"]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data.parquet")
    assert colours(ImageTextDataset(load_image_text(str(tmp_path / "data.parquet"), "train"))) == [BLUE]


def test_a_name_is_looked_up_on_the_hub(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)))
    load_image_text("someone/flowers", "test", name="small")
    assert calls == [(("someone/flowers", "small"), {"split": "test"})]


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "~/nowhere", "captions.csv", "data/raw/photos"])
def test_a_path_with_nothing_there_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"got '{source}', and there is nothing at"):
        load_image_text(source, "train")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "captions.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.csv.*captions\.xlsx"):
        load_image_text(str(tmp_path / "captions.xlsx"), "train")


def test_a_file_without_the_image_column_names_its_columns(photos):
    (photos / "captions.csv").write_text("filepath,title\nred.png,red\n")
    with pytest.raises(ValueError, match=r"'filepath', 'title'.*set image_column"):
        load_image_text(str(photos / "captions.csv"), "train")


# --- what a row may hold ---


@pytest.mark.parametrize("form", ["pil", "bytes", "dict of bytes", "dict of path", "path", "feature"])
def test_an_image_may_come_in_any_form(form, photos):
    path = str(photos / "deep" / "blue.png")
    dataset = {
        "pil": lambda: rows(Image.new("RGB", (4, 3), BLUE)),
        "bytes": lambda: rows(png(BLUE)),
        "dict of bytes": lambda: rows({"bytes": png(BLUE), "path": "not-there.png"}),
        "dict of path": lambda: rows({"bytes": None, "path": path}),
        "path": lambda: rows(path),
        "feature": lambda: rows(path).cast_column("image", datasets.Image()),
    }[form]()
    item = ImageTextDataset(dataset)[0]
    assert isinstance(item["image"], Image.Image)
    assert (item["image"].mode, item["image"].size) == ("RGB", (4, 3))
    assert item["image"].getpixel((0, 0)) == BLUE


def test_an_image_made_by_a_transform_of_the_data_set_is_taken():
    dataset = rows("unused").with_transform(
        lambda batch: {**batch, "image": [Image.new("L", (2, 2), 7) for _ in batch["text"]]}
    )
    assert colours(ImageTextDataset(dataset)) == [(7, 7, 7)]


def test_relative_paths_count_from_the_root(photos):
    assert colours(ImageTextDataset(rows("deep/blue.png"), root=photos)) == [BLUE]


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("I;16", (2, 2)) if mode == "I;16" else Image.new("RGB", (2, 2)).convert(mode)
    assert colours(ImageTextDataset(rows(image))) == [(0, 0, 0)]


def test_transparency_becomes_white_without_a_warning():
    palette = Image.new("P", (2, 2))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=bytes([0, 255]))
    assert colours(ImageTextDataset(rows(buffer.getvalue()))) == [(255, 255, 255)]


def test_an_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, "JPEG", exif=exif)
    assert ImageTextDataset(rows(buffer.getvalue()))[0]["image"].size == (3, 4)


def test_a_label_column_becomes_the_label():
    dataset = datasets.Dataset.from_dict({"image": [png()] * 2, "text": ["a", "b"], "kind": ["cat", "dog"]})
    encoded = dataset.class_encode_column("kind")
    assert [item["label"] for item in ImageTextDataset(encoded, label_column="kind")] == [0, 1]
    assert "label" not in ImageTextDataset(encoded)[0]
    with pytest.raises(ValueError, match=r"integers.*class_encode_column\('kind'\)"):
        ImageTextDataset(dataset, label_column="kind")


# --- errors ---


@pytest.mark.parametrize("argument", ["image_column", "caption_column", "label_column"])
def test_a_missing_column_is_named_with_those_that_exist(argument):
    with pytest.raises(ValueError, match=rf"'wrong'.*'image', 'text', 'number'.*set {argument}"):
        ImageTextDataset(rows(png(), number=1), **{argument: "wrong"})


def broken(kind):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    return {
        "missing file": {"bytes": None, "path": "/nowhere/cat.png"},
        "no image": {"bytes": b"this is text", "path": None},
        "truncated": {"bytes": whole.getvalue()[:2000], "path": None},
        "damaged": {"bytes": whole.getvalue()[:60] + b"\0" * 40 + whole.getvalue()[100:], "path": None},
        "nothing": None,
    }[kind]


KINDS = ["missing file", "no image", "truncated", "damaged", "nothing"]


def with_one_broken(kind):
    images = [{"bytes": png(), "path": None}, broken(kind), {"bytes": png(BLUE), "path": None}]
    return datasets.Dataset.from_list(
        [{"image": image, "text": "a"} for image in images],
        features=datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")}),
    ).cast_column("image", datasets.Image())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_cannot_be_read_is_reported_by_its_row(kind):
    dataset = ImageTextDataset(with_one_broken(kind))
    with pytest.raises(ValueError, match=r"row 1 .*cannot read image.*on_bad_image='skip'"):
        dataset[1]
    assert dataset[2]["image"].getpixel((0, 0)) == BLUE


def test_the_error_names_the_file():
    with pytest.raises(ValueError, match=r"'/nowhere/cat\.png'"):
        ImageTextDataset(with_one_broken("missing file"))[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_can_be_left_out_and_is_counted(kind):
    dataset = ImageTextDataset(with_one_broken(kind), on_bad_image="skip")
    assert [dataset[i] is None for i in range(3)] == [False, True, False]
    assert dataset.skipped == 1


def test_an_unknown_choice_for_bad_images_is_refused():
    with pytest.raises(ValueError, match=r"'error' or 'skip'.*'ignore'"):
        ImageTextDataset(rows(png()), on_bad_image="ignore")


@pytest.mark.parametrize("caption", [[], None, 7, [None]])
def test_a_caption_that_is_no_string_is_reported_by_its_row(caption):
    dataset = ImageTextDataset(datasets.Dataset.from_dict({"image": [png()], "text": [caption]}))
    with pytest.raises(ValueError, match=r"row 0 .*'text'"):
        dataset[0]
    with pytest.raises(ValueError, match=r"row 0 .*'text'"):
        dataset.texts([0])


# --- captions per epoch, workers ---


def captioned(count=40, image=b"not an image", **options):
    captions = [[f"{i}" + "x" * k for k in range(5)] for i in range(count)]
    dataset = datasets.Dataset.from_dict({"image": [image] * count, "text": captions})
    return ImageTextDataset(dataset, **options)


def draws(dataset):
    return [item["text"] for item in dataset]


def test_each_epoch_draws_other_captions_and_repeats_them_when_resumed():
    dataset = captioned(image=png())
    first = draws(dataset)
    assert draws(dataset) == first
    dataset.set_epoch(1)
    second = draws(dataset)
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 20
    resumed = captioned(image=png())
    resumed.set_epoch(1)
    assert [resumed[i]["text"] for i in reversed(range(40))] == second[::-1]


def test_the_seed_decides_the_draw():
    assert draws(captioned(image=png())) == draws(captioned(image=png(), seed=0))
    assert draws(captioned(image=png())) != draws(captioned(image=png(), seed=1))


def test_captions_are_known_without_their_images():
    readable, unreadable = captioned(image=png()), captioned()
    for epoch in (0, 3):
        readable.set_epoch(epoch)
        unreadable.set_epoch(epoch)
        texts = unreadable.texts(list(range(40)))
        assert texts == draws(readable)
        assert len({len(text) for text in texts}) > 3
    assert unreadable.skipped == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_that_are_already_running_see_the_epoch_and_report_their_skips():
    images = [png(), b"broken"] * 20
    table = datasets.Dataset.from_dict({"image": images, "text": [list("abcde")] * 40})
    dataset = ImageTextDataset(table, on_bad_image="skip")
    loader = DataLoader(dataset, batch_size=5, num_workers=2, persistent_workers=True, collate_fn=list)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen = [item["text"] for items in loader for item in items if item is not None]
        assert dataset.skipped == 20 * (epoch + 1)
        alone = ImageTextDataset(table, on_bad_image="skip")
        alone.set_epoch(epoch)
        assert seen == [item["text"] for item in alone if item is not None]
    assert torch.utils.data.get_worker_info() is None
