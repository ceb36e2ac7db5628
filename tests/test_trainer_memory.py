"""The trainer and memory: sizes that are measured, graphs that are kept, steps that are made again, all on resume."""

import json

import pytest
import torch
from transformers import TrainerState

from gc_accel.losses import CLIPLoss
from tests.test_trainer import clip_model, make_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
BUDGET = 30 * 2**20  # bytes, in which several chunks of the small model fit


def test_automatic_sizes_are_found_once_and_stay(tmp_path):
    trainer = make_trainer(tmp_path, chunk_size="auto", retain="auto", memory_budget=BUDGET)
    trainer.train()
    assert 1 <= trainer.chunk_sizes.of_loader <= 8
    assert trainer.cache.retention.automatic is not None, "one cache for all steps, which remembers"


def test_sizes_are_measured_with_the_longest_texts(tmp_path, monkeypatch):
    """Padded each as its chunk is; the first chunk of a batch has the shortest ones."""
    measured = []

    def fit(sample, *args, **kwargs):
        measured.append(sample["input_ids"].shape[1])
        assert kwargs["most"] == 40
        return 3

    monkeypatch.setattr("gc_accel.training.chunk_sizes.SAMPLE", 3)
    monkeypatch.setattr("gc_accel.training.chunk_sizes.fit_chunk_size", fit)
    trainer = make_trainer(tmp_path, chunk_size="auto", per_device_train_batch_size=40)
    widths = [chunk["input_ids"].shape[1] for chunk in next(iter(trainer.get_train_dataloader()))]
    assert measured == [max(widths)]
    assert min(widths) < max(widths)


class OutOfMemoryOnce(CLIPLoss):
    """Raises in the step of that number."""

    def __init__(self, step):
        super().__init__()
        self.countdown = step

    def forward(self, image, text, **shared):
        self.countdown -= 1
        if self.countdown == 0:
            raise torch.OutOfMemoryError("injected")
        return super().forward(image, text, **shared)


def test_a_run_goes_on_with_smaller_chunks_and_resumes_with_them(tmp_path):
    options = {"chunk_size": 4, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    run = make_trainer(tmp_path / "run", model=clip_model(dropout=0.3), loss=OutOfMemoryOnce(2), **options)
    run.train()
    assert run.state.global_step == 6
    state = json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["chunk_sizes"] == {"loader": 4, "encoder": {"image": 2, "text": 2}}

    resumed = make_trainer(tmp_path / "resumed", model=clip_model(dropout=0.3), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(run)[name]), name
    afresh = make_trainer(tmp_path / "afresh", model=clip_model(dropout=0.3), **options)
    afresh.train()
    assert not torch.equal(weights(afresh)["text_projection.weight"], weights(run)["text_projection.weight"])


def tight_model(most):
    """A model that has memory for the graph of so many images, and for any number without one."""
    model = clip_model(dropout=0.3)
    model.tried = set()  # images in calls with a graph

    def check(_, args, kwargs):
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        if not torch.is_grad_enabled():
            return
        model.tried.add(len(pixels))
        if len(pixels) > most:
            raise torch.OutOfMemoryError(f"{len(pixels)} images")

    model.vision_model.register_forward_pre_hook(check, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    ("most", "options", "found"),
    [
        (4, {"chunk_size": 4, "forward_chunk_size": 8}, 4),  # loaded in chunks of 8
        (2, {"chunk_size": 4}, 2),
        (1, {"chunk_size": 8, "forward_chunk_size": 8}, 1),
    ],
)
def test_a_run_begins_and_resumes_with_as_much_memory_as_a_step_takes(tmp_path, most, options, found):
    options |= {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    run = make_trainer(tmp_path / "run", model=tight_model(most), **options)
    run.train()
    assert run.cache.chunk_sizes == {"image": found, "text": found}
    assert max(run.encoder.model.tried) == options["chunk_size"], "the look takes no more than a step"
    resumed = make_trainer(tmp_path / "resumed", model=tight_model(most), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert resumed.state.global_step == 6
    assert max(resumed.encoder.model.tried) == found
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(run)[name]), name


def test_a_measured_size_comes_back_on_resume(tmp_path, monkeypatch):
    options = {"chunk_size": "auto", "memory_budget": BUDGET, "save_strategy": "steps", "save_steps": 3}
    options["num_train_epochs"] = 1
    run = make_trainer(tmp_path / "run", model=clip_model(dropout=0.3), **options)
    run.train()
    resumed = make_trainer(tmp_path / "resumed", model=clip_model(dropout=0.3), **options)
    monkeypatch.setattr("gc_accel.training.chunk_sizes.fit_chunk_size", None)  # not to be called
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert resumed.chunk_sizes.of_loader == run.chunk_sizes.of_loader
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(run)[name]), name
    assert isinstance(resumed.state, TrainerState)


@pytest.mark.parametrize("options", [{"chunk_size": "many"}, {"chunk_size": 0}, {"retain": "most"}])
def test_refuses_what_is_no_size(tmp_path, options):
    with pytest.raises(ValueError, match="expected"):
        make_trainer(tmp_path, **options)
