"""The examples as a person runs them: through `accelerate launch`, on small sizes."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from gc_accel.data import HandwrittenNumbers
from tests.launching import QUICK, ROOT, assert_drawn, launch, metrics, training_log

SMALL = [
    "--train_size",
    "96",
    "--eval_size",
    "20",
    "--per_device_train_batch_size",
    "16",
    "--chunk_size",
    "8",
]


def assert_complete(folder):
    """The model in its own format, the metrics, and two pictures with something on them."""
    assert CLIPModel.from_pretrained(folder).config.projection_dim > 0
    assert CLIPProcessor.from_pretrained(folder) is not None
    assert 0 <= metrics(folder)["eval_image_to_text_r1"] <= 1
    assert_drawn(folder / "training_curve.png", folder / "retrieval_sheet.png")
    assert (folder / "README.md").exists()
    assert (folder / "trainer_state.json").exists()


@pytest.mark.slow
def test_built_in_run_writes_everything(tmp_path):
    run = launch("clip_train.py", "--output_dir", tmp_path, *SMALL, *QUICK)
    assert_complete(tmp_path)
    log = training_log(tmp_path)
    assert len(log) == 6
    assert {"learning_rate", "logit_scale", "grad_norm", "samples_per_second", "peak_memory_mib"} <= set(
        log[0]
    )
    assert "eval_zero_shot_top1" in metrics(tmp_path)
    assert "6/6" in run.stderr, "no progress bar"


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Half the batch on each of two ranks: the same global batches, so the same losses."""
    one, two = tmp_path / "one", tmp_path / "two"
    launch("clip_train.py", "--output_dir", one, *SMALL, *QUICK)
    sizes = [*SMALL[:-4], "--per_device_train_batch_size", "8", "--chunk_size", "4"]
    launch("clip_train.py", "--output_dir", two, *sizes, *QUICK, config="ddp_cpu.yaml")
    assert_complete(two)
    losses = [[entry["loss"] for entry in training_log(folder)] for folder in (one, two)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "ddp_cpu.yaml"])
def test_own_loop_trains_and_saves(tmp_path, config):
    sizes = ["--train_size", "128", "--batch_size", "16", "--chunk_size", "8", "--epochs", "1"]
    run = launch("clip_train_no_trainer.py", "--output_dir", tmp_path, *sizes, config=config)
    assert "image_to_text_r1" in run.stdout
    assert CLIPModel.from_pretrained(tmp_path).logit_scale.shape == ()
    assert len((ROOT / "examples" / "clip_train_no_trainer.py").read_text().splitlines()) < 100


def save_images(folder, count):
    """Numbers as PNG files, and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [HandwrittenNumbers("train", size=count)[i] for i in range(count)]
    for i, sample in enumerate(samples):
        Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return [sample["text"] for sample in samples]


def test_arguments_come_from_a_yaml_file_and_a_folder_of_images_trains(tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    captions = save_images(data, 60)
    lines = ["file_name,text", *(f"{i}.png,{caption}" for i, caption in enumerate(captions))]
    (data / "metadata.csv").write_text("\n".join(lines))
    config = {
        "dataset": str(data),
        "eval_size": 12,
        "output_dir": str(output),
        "per_device_train_batch_size": 16,
        "chunk_size": 8,
        "num_train_epochs": 1,
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launch("clip_train.py", tmp_path / "run.yaml")
    assert_complete(output)


@pytest.mark.slow
def test_unreadable_image_is_named_or_skipped(tmp_path):
    data = tmp_path / "data"
    captions = save_images(data, 40)
    (data / "7.png").write_bytes(b"no image")
    rows = [{"image": f"{i}.png", "text": caption} for i, caption in enumerate(captions)]
    (data / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--dataset", data / "rows.jsonl", "--eval_split", "train", "--eval_size", "5", *QUICK]
    options += ["--per_device_train_batch_size", "40", "--chunk_size", "8"]
    run = launch("clip_train.py", "--output_dir", tmp_path / "a", *options, check=False)
    assert run.returncode != 0
    assert "row 7" in run.stderr
    assert not (tmp_path / "a" / "model.safetensors").exists()
    run = launch("clip_train.py", "--output_dir", tmp_path / "b", *options, "--on_bad_image", "skip")
    assert_complete(tmp_path / "b")
    assert "1 unreadable image(s) were left out" in run.stderr + run.stdout


def test_missing_column_is_named(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("image,title\n0.png,one\n1.png,two\n")
    run = launch("clip_train.py", "--dataset", table, "--eval_size", "1", *QUICK, check=False)
    assert run.returncode != 0
    assert "caption_column" in run.stderr
    assert "title" in run.stderr


def test_readme_commands_are_those_that_are_tested():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert 'pip install -e ".[dev]" && accelerate launch examples/clip_train.py' in readme
    assert 'pip install --quiet -e ".[dev]"' in ci
    tests = 'pytest -n 2 -m "not slow and not gpu"'
    assert tests in readme
    assert tests in ci
    assert not re.findall(r"\b[A-Z]+_[A-Z0-9_]{2,}\b", readme), "a placeholder was left"
