"""The vision examples as a person runs them: through `accelerate launch`, on small sizes."""

import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ViTConfig, ViTImageProcessor, ViTModel

from gc_accel import VisionEncoder
from gc_accel.data import HandwrittenDigits
from tests.launching import QUICK, ROOT, assert_drawn, launch, metrics, training_log

BATCH = ["--per_device_train_batch_size", "128", "--chunk_size", "48"]
SHORT = ["--max_steps", "2", "--logging_steps", "1", "--use_cpu", "--eval_strategy", "no"]
ACCURACIES = ("knn20", "knn200", "probe_last", "probe_best")


def save_classes(folder, count, *, subfolders=True):
    """Scans as PNG files, in a subfolder for each of three classes or all in one."""
    scans = HandwrittenDigits("train", image_size=16)
    chosen = [i for i in range(len(scans)) if scans.labels[i] < 3][:count]
    for i in chosen:
        place = folder / "abc"[scans.labels[i]] if subfolders else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scans[i]["image"].permute(1, 2, 0).numpy()).save(place / f"{i}.png")


def save_vit(folder):
    """A published model: a tiny ViT and its processor."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **shape)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def assert_complete(folder):
    """The metrics, and two pictures with something on them."""
    assert np.isfinite(metrics(folder)["eval_loss"])
    assert_drawn(folder / "training_curve.png", folder / "embedding_map.png")
    assert (folder / "README.md").exists()
    assert (folder / "trainer_state.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "views", "config"),
    [("simclr", 2, "cpu.yaml"), ("supcon", 2, "ddp_cpu.yaml"), ("selfcon", 1, "cpu.yaml")],
)
def test_built_in_run_writes_everything(tmp_path, loss, views, config):
    few = ["--probe_labels_per_class", "10", "--probe_draws", "2"]
    run = launch(
        "vision_train.py", "--loss", loss, "--output_dir", tmp_path, *BATCH, *SHORT, *few, config=config
    )
    assert_complete(tmp_path)
    assert len(training_log(tmp_path)) == 2
    found = metrics(tmp_path)
    for name in ACCURACIES:
        for key in (f"eval_{name}_backbone", f"eval_{name}_projection", f"eval_raw_{name}"):
            assert 0 < found[key] <= 1
    assert found["eval_raw_knn20"] > 0.9
    middle, low, high = (found[f"eval_few_labels_{name}_raw"] for name in ("mean", "lowest", "highest"))
    assert low < middle < high
    assert "knn20: error" in run.stdout
    assert "embedding_map.png" in run.stdout
    backbone, heads = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "head"))
    assert backbone["0.0.weight"].shape == (32, 3, 3, 3)
    assert {name.split(".")[0] for name in heads} == {str(i) for i in range(1 + (loss == "selfcon"))}


@pytest.mark.slow
def test_arguments_come_from_a_yaml_file_and_a_folder_of_classes_fine_tunes_a_model(tmp_path):
    save_classes(tmp_path / "data", 60)
    save_vit(tmp_path / "model")
    config = {
        "model": str(tmp_path / "model"),
        "loss": "selfcon",
        "exits": ["layers.0"],
        "dataset": str(tmp_path / "data"),
        "eval_size": 20,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 16,
        "chunk_size": 8,
        "num_train_epochs": 1,
        "eval_strategy": "epoch",
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launch("vision_train.py", tmp_path / "run.yaml")
    assert_complete(tmp_path / "out")
    size = ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).config.image_size
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size.height == size
    encoder = VisionEncoder.from_pretrained(tmp_path / "out")
    assert encoder(views={"pixel_values": torch.zeros(1, 3, size, size)})["views"].shape == (1, 2, 128)
    assert "eval_knn20_backbone" in metrics(tmp_path / "out")
    assert "eval_knn200_backbone" not in metrics(tmp_path / "out"), "there are 40 training images"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert any(not torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.slow
def test_words_in_a_table_are_classes_and_unlabelled_images_have_no_accuracy(tmp_path):
    save_classes(tmp_path / "data", 60, subfolders=False)
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    rows = [{"file": name, "kind": "even" if i % 2 else "odd"} for i, name in enumerate(names)]
    table = tmp_path / "data" / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    options = [
        "--dataset",
        table,
        "--image_column",
        "file",
        "--eval_size",
        "20",
        "--image_size",
        "16",
        *SHORT,
    ]
    options += ["--per_device_train_batch_size", "16", "--chunk_size", "8"]
    launch(
        "vision_train.py",
        "--output_dir",
        tmp_path / "a",
        *options,
        "--loss",
        "supcon",
        "--label_column",
        "kind",
    )
    assert_complete(tmp_path / "a")
    assert 0 < metrics(tmp_path / "a")["eval_knn20_backbone"] <= 1
    launch("vision_train.py", "--output_dir", tmp_path / "b", *options)
    assert_complete(tmp_path / "b")
    assert not [key for key in metrics(tmp_path / "b") if "knn" in key]


@pytest.mark.slow
def test_resume_gives_the_same_weights(tmp_path):
    """The views of a sample are those of its epoch, wherever a run begins."""
    options = [*BATCH, "--max_steps", "14", "--use_cpu", "--save_steps", "5", "--save_total_limit", "9"]
    options += ["--eval_strategy", "no"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    launch("vision_train.py", "--output_dir", whole, *options)
    launch(
        "vision_train.py",
        "--output_dir",
        resumed,
        *options,
        "--resume_from_checkpoint",
        whole / "checkpoint-5",
    )
    for name in ("model.safetensors", "head.safetensors"):
        first, early, second = (
            load_file(folder / name) for folder in (whole, whole / "checkpoint-5", resumed)
        )
        assert all(torch.equal(second[key], value) for key, value in first.items())
        assert not all(torch.equal(early[key], value) for key, value in first.items())


@pytest.mark.slow
def test_a_model_of_timm_trains_from_scratch_with_frozen_batch_norm(tmp_path):
    options = [
        "--model",
        "timm/test_resnet",
        "--from_scratch",
        "--batch_norm",
        "frozen",
        "--image_size",
        "32",
    ]
    options += ["--per_device_train_batch_size", "16", "--chunk_size", "8", "--probe_size", "50", *SHORT]
    launch("vision_train.py", "--output_dir", tmp_path, *options)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == timm.create_model("test_resnet", num_classes=0).state_dict().keys()
    assert "eval_probe_last_backbone" in metrics(tmp_path)


def test_missing_labels_are_refused_before_training(tmp_path):
    save_classes(tmp_path / "data", 12, subfolders=False)
    options = ["--dataset", tmp_path / "data", "--eval_size", "4", "--output_dir", tmp_path / "out", *QUICK]
    run = launch("vision_train.py", "--loss", "supcon", *options, check=False)
    assert run.returncode != 0
    assert "expected labels for --loss supcon" in run.stderr
    assert not (tmp_path / "out").exists()


def test_missing_exits_are_refused_before_training(tmp_path):
    save_vit(tmp_path / "model")
    run = launch(
        "vision_train.py", "--loss", "selfcon", "--model", tmp_path / "model", "--use_cpu", check=False
    )
    assert run.returncode != 0
    assert "expected exits for --loss selfcon" in run.stderr


@pytest.mark.slow
def test_minimal_loop_learns(tmp_path):
    run = launch("vision_minimal.py")
    before, after = (
        float(line.rsplit(" ", 1)[1]) for line in run.stdout.splitlines() if "kNN accuracy" in line
    )
    assert after > before + 0.1
    assert len((ROOT / "examples" / "vision_minimal.py").read_text().splitlines()) < 70
