"""The pictures are opened again: their size, what is drawn in which colour, what a failure leaves behind."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from gc_accel.pictures import embedding_map, retrieval_sheet, training_curve
from gc_accel.pictures.sheet import RIGHT, WRONG

LOSS = [{"step": step, "loss": 1 / step, "epoch": 0.1} for step in (1, 2, 3)]
SCORES = [{"step": 2, "eval_loss": 0.4, "eval_image_to_text_r1": 0.5, "eval_image_to_text_r5": 0.9}]
SUMMARY = [{"step": 3, "train_loss": 0.6, "train_runtime": 12.0}]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def count(path: Path, colour: str) -> int:
    """How many pixels have exactly this colour, as `#rrggbb`."""
    return int((pixels(path) == np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)).all(axis=-1).sum())


@pytest.mark.parametrize(
    ("log_history", "panels"),
    [
        (LOSS + SUMMARY, (1, 1)),
        (LOSS + SCORES + SUMMARY, (1, 2)),
        ([{**entry, "learning_rate": 0.1, "grad_norm": 2.0} for entry in LOSS], (2, 2)),
        (
            [{**entry, "learning_rate": 0.1, "logit_scale": 14.0, "grad_norm": 2.0} for entry in LOSS]
            + SCORES,
            (2, 2),
        ),
    ],
    ids=["loss", "loss and scores", "no scores", "all"],
)
def test_the_curve_has_a_panel_for_what_was_logged(log_history: list, panels: tuple, tmp_path: Path) -> None:
    training_curve(log_history, tmp_path / "new" / "curve.png")
    rows, columns = panels
    assert pixels(tmp_path / "new" / "curve.png").shape == (510 * rows, 780 * columns, 3)


@pytest.mark.parametrize(
    "key", ["eval_image_to_text_r1", "eval_coco_text_to_image_r1", "eval_zero_shot_top1", "eval_knn_accuracy"]
)
def test_every_score_has_a_line(key: str, tmp_path: Path) -> None:
    training_curve([{"step": 1, key: 0.2}, {"step": 9, key: 0.4}], tmp_path / "score.png")
    assert count(tmp_path / "score.png", "#1f77b4") > 100


def test_a_curve_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keys \\['epoch', 'step'\\]"):
        training_curve([{"step": 1, "epoch": 1.0}], tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


def image(height: int = 32, width: int = 32, value: int = 90) -> Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("retrieved", "green", "red"), [(["a", "a"], 1, 0), (["b"], 0, 1), (["b", "a"], 1, 1)]
)
def test_right_captions_are_green_and_wrong_ones_red(
    retrieved: list, green: int, red: int, tmp_path: Path
) -> None:
    retrieval_sheet([image()], ["a"], [retrieved], tmp_path / "sheet.png")
    assert (count(tmp_path / "sheet.png", RIGHT) > 0, count(tmp_path / "sheet.png", WRONG) > 0) == (
        green,
        red,
    )


def test_a_small_image_is_enlarged_without_smoothing(tmp_path: Path) -> None:
    checkers = torch.zeros(3, 2, 2, dtype=torch.uint8)
    checkers[0, 0, 0] = checkers[0, 1, 1] = 200
    retrieval_sheet([checkers], [""], [[]], tmp_path / "sheet.png")
    colours = {tuple(c) for c in pixels(tmp_path / "sheet.png")[100:140, 60:180].reshape(-1, 3).tolist()}
    assert colours == {(200, 0, 0), (0, 0, 0)}


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "caption",
    [
        "a photo of the number four thousand three hundred and twelve",
        "word " * 150,
        "W" * 300,
        "between $5 and $6, 100 % _{sure}",
        "",
    ],
    ids=["usual", "long", "one word", "formula", "empty"],
)
def test_no_text_overlaps_another_or_leaves_the_sheet(
    caption: str, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("gc_accel.pictures.sheet.save_png", lambda figure, path: drawn.append(figure))
    images = [image(20 + 90 * i, 50) for i in range(n)]
    retrieval_sheet(images, [caption] * n, [[caption, "no"]] * n, tmp_path / "x.png", title=caption or None)
    (figure,) = drawn
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.get_window_extent() for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        # Neighbouring lines may touch by the rounding of a glyph's box, not by more.
        assert not any(box.padded(-1).overlaps(other.padded(-1)) for other in boxes[:i])


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        ([], [], "one at least"),
        ([image()], ["a", "b"], "got 1, 2 and 2"),
        ([image().float()], ["a"], "undo the normalisation"),
        ([image()[:1]], ["a"], r"uint8 \(3, H, W\)"),
    ],
)
def test_a_sheet_refuses_input_that_does_not_fit(
    images: list, captions: list, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_sheet(images, captions, [[c] for c in captions], tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []


def blobs(n: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    return torch.randn(n, 7, generator=generator) + 9 * labels[:, None], labels


@pytest.mark.parametrize(("n", "classes"), [(5, 1), (31, 2), (53, 26)])
def test_the_map_shows_every_label_and_repeats_with_its_seed(n: int, classes: int, tmp_path: Path) -> None:
    features, labels = blobs(n, classes)
    names = [f"class {i}" for i in range(classes)]
    embedding_map(features, labels, tmp_path / "a.png", label_names=names, title="A map")
    embedding_map(features, labels, tmp_path / "b.png", label_names=names, title="A map")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    height, width, _ = pixels(tmp_path / "a.png").shape
    assert (height, width > height) == (900, True)
    assert len(np.unique(pixels(tmp_path / "a.png").reshape(-1, 3), axis=0)) > classes


@pytest.mark.parametrize("columns", [1, 7])
def test_a_collapsed_encoder_has_a_map(columns: int, tmp_path: Path) -> None:
    embedding_map(torch.ones(13, columns), torch.arange(13) % 2, tmp_path / "map.png")
    assert (tmp_path / "map.png").exists()


@pytest.mark.parametrize(
    ("features", "labels", "names", "message"),
    [
        (torch.zeros(4, 2), torch.arange(4), None, "5 at least"),
        (torch.zeros(5, 2), torch.arange(4), None, "one label per row"),
        (torch.full((5, 2), torch.nan), torch.arange(5), None, "finite"),
        (torch.zeros(5, 2), torch.arange(5), ["a"] * 4, "4 names"),
    ],
)
def test_a_map_refuses_input_that_does_not_fit(features, labels, names, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        embedding_map(features, labels, tmp_path / "map.png", label_names=names)
    assert list(tmp_path.iterdir()) == []


def test_when_drawing_fails_the_old_picture_stays_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "curve.png"
    training_curve(LOSS, path)
    before = path.read_bytes()

    def half(self: Figure, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(RuntimeError, match="disk full"):
        training_curve(LOSS, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_pyplot_is_never_imported() -> None:
    """It would keep every figure and choose a window system for the user's whole program."""
    code = "import gc_accel.pictures, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
