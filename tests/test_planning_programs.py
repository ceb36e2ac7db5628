"""The planner as a person runs it, and its forecast against resident memory."""

import sys

import pytest

from benchmarks.planning import measure_apart
from gc_accel import DualEncoder
from gc_accel.data import image_statistics, numbers_processor
from gc_accel.losses import DistillationLoss
from gc_accel.planning import plan
from gc_accel.programs.planning import plan_of, print_plan
from tests.launching import QUICK, launch
from tests.test_examples import SMALL
from tests.test_trainer import clip_model, make_trainer


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "case",
    [
        ("clip", 1024, 64, "0"),
        ("clip", 1024, 128, "1"),
        ("vit", 8, 2, "1"),
        ("vit", 16, 4, "3"),
        ("resnet", 8, 2, "0"),
        ("resnet", 16, 4, "1"),
    ],
)
def test_forecast_is_within_15_percent_of_resident_memory(case):
    measured, forecast = measure_apart(*case)
    assert measured > 20 * 2**20
    assert forecast == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "ddp_cpu.yaml"])
def test_plan_prints_and_stops(tmp_path, config):
    run = launch("clip_train.py", "--output_dir", tmp_path / "out", *SMALL, *QUICK, "--plan", config=config)
    assert run.stdout.count("Suggested: chunk_size=") == 1, "one of the processes prints"
    assert "A step with 16 samples" in run.stdout
    assert ("on each of 2 devices" in run.stdout) == (config == "ddp_cpu.yaml")
    assert not list(tmp_path.rglob("*.safetensors")), "nothing was trained"


@pytest.mark.slow
def test_plan_of_a_vision_model_and_of_a_loss_without_a_cache(tmp_path):
    options = ["--output_dir", tmp_path / "out", "--per_device_train_batch_size", "32", *QUICK, "--plan"]
    run = launch("vision_train.py", *options, "--gradient_checkpointing", "False")
    assert "A step with 32 samples on one device, chunk_size=64" in run.stdout
    run = launch("vision_train.py", *options, "--loss", "byol", check=False)
    assert run.returncode != 0
    assert "expected a loss over all pairs to plan with, got BYOLLoss" in run.stderr


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_the_plan_is_that_of_the_longest_texts(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=40)
    first, *_, last = next(iter(trainer.get_train_dataloader()))
    short, long = (plan(trainer.encoder, chunk, 40, chunk_size=3, retain=1) for chunk in (first, last))
    assert short.peak < plan_of(trainer).peak == long.peak


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_the_plan_with_a_precomputed_tower_does_not_wait_for_it(tmp_path):
    mean, std = image_statistics(numbers_processor())
    encoder = DualEncoder(clip_model(), image_mean=mean, image_std=std, freeze=("image",))
    options = {"per_device_train_batch_size": 40, "precompute_frozen": True}
    trainer = make_trainer(tmp_path, model=encoder, **options)
    found = plan_of(trainer)
    assert not list(tmp_path.rglob("*.npy"))
    *_, last = next(iter(trainer.get_train_dataloader()))
    assert list(tmp_path.rglob("*.npy"))
    assert "image_embeds" in last
    expected = plan(trainer.encoder, last, 40, chunk_size=3, retain=1)
    assert (found.bytes, found.flops) == (expected.bytes, expected.flops)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_the_plan_has_the_budget_of_the_run(tmp_path):
    options = {"per_device_train_batch_size": 40, "chunk_size": 4, "retain": "auto", "num_train_epochs": 1}
    one = plan_of(make_trainer(tmp_path, **(options | {"retain": 1}))).bytes["first pass"]["retained graphs"]
    trainer = make_trainer(tmp_path, memory_budget=3.7 * one, **options)
    planned = plan_of(trainer)
    assert planned.retain == 3
    trainer.train()
    costliest = next(iter(trainer.cache.retention.automatic))
    assert trainer.cache.retention.automatic[costliest] == planned.retain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retain": "auto"}, 'expected a memory_budget in bytes along with retain="auto"'),
        ({"precompute_frozen": True}, r"expected one frozen tower of several to precompute, got \[\]"),
    ],
)
def test_what_a_run_refuses_is_not_planned(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        plan_of(make_trainer(tmp_path, **options))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize(("loss", "known"), [("clip", True), ("siglip", True), (DistillationLoss(), False)])
def test_the_plan_says_whose_loss_it_has(tmp_path, capsys, loss, known):
    print_plan(make_trainer(tmp_path, loss=loss))
    printed = capsys.readouterr().out
    assert "Suggested: chunk_size=" in printed
    assert ("DistillationLoss may take another part" in printed) != known
