"""The trainer: plain Trainer's steps and schedule, exact resume, saving in the model's own format, clear errors."""

import json
import math

import open_clip
import pytest
import torch
from torch import nn
from transformers import CLIPModel, CLIPProcessor, Trainer, TrainingArguments

from gc_accel import CachedContrastiveArguments, CachedContrastiveTrainer, DualEncoder
from gc_accel.data import (
    HandwrittenNumbers,
    ImageTextCollator,
    OpenClipCollator,
    numbers_config,
    numbers_processor,
)
from gc_accel.losses import dense
from tests.models import open_clip_vit, siglip

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
SMALL = {"width": 16, "layers": 1, "heads": 2}


def clip_model(*, dropout=0.0):
    torch.manual_seed(0)
    config = numbers_config(**SMALL)
    config.text_config.attention_dropout = config.vision_config.attention_dropout = dropout
    return CLIPModel(config)


def make_trainer(folder, *, model=None, size=52, eval_size=20, trainer=CachedContrastiveTrainer, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "chunk_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
    }
    loss = options.pop("loss", None)
    return trainer(
        model=clip_model() if model is None else model,
        args=CachedContrastiveArguments(**(defaults | options)),
        loss=loss,
        train_dataset=HandwrittenNumbers("train", size=size),
        eval_dataset=HandwrittenNumbers("test", size=eval_size),
        processing_class=numbers_processor(),
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.encoder.model.state_dict().items()}


class PlainModel(nn.Module):
    """What a plain Trainer needs to step through the same data set."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, labels, **_):
        return {"loss": (self.weight * labels.float()).mean()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_and_schedule_equal_those_of_a_plain_trainer(tmp_path, accumulation):
    ours = make_trainer(tmp_path / "ours", gradient_accumulation_steps=accumulation)
    ours.train()
    plain_args = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        per_device_train_batch_size=8,
        num_train_epochs=2,
        learning_rate=1e-2,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        gradient_accumulation_steps=accumulation,
    )
    plain = Trainer(
        PlainModel(),
        plain_args,
        data_collator=ImageTextCollator(numbers_processor()),
        train_dataset=HandwrittenNumbers("train", size=52),
    )
    plain.train()
    keys = ("step", "epoch", "learning_rate")
    schedules = [
        [tuple(entry[key] for key in keys) for entry in each.state.log_history if "learning_rate" in entry]
        for each in (ours, plain)
    ]
    assert schedules[0] == schedules[1]
    assert len(schedules[0]) == 2 * math.ceil(6 / accumulation)


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_in_the_middle_of_an_epoch_gives_the_same_weights(tmp_path, workers):
    """With dropout, so that the generators count as well."""
    options = {"save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": workers}
    whole = make_trainer(tmp_path / "run", model=clip_model(dropout=0.3), **options)
    whole.train()
    assert whole.state.global_step == 12
    resumed = make_trainer(tmp_path / "other", model=clip_model(dropout=0.3), **options)
    before = weights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 12
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert not torch.equal(before["visual_projection.weight"], weights(resumed)["visual_projection.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 8},
        {"chunk_size": 1},
        {"retain": "0"},
        {"retain": "all"},
        {"sort_by_length": False},
        {"chunk_tokens": 40},
        {"chunk_size": "auto", "memory_budget": 30e6},
        {"retain": "auto", "memory_budget": 1e6},
        {"retain": "auto", "memory_budget": 30e6},
        {"forward_chunk_size": 6},
    ],
)
def test_configuration_never_changes_the_training(tmp_path, options):
    reference = make_trainer(tmp_path / "a", optim="sgd", max_grad_norm=0.0, num_train_epochs=1)
    other = make_trainer(tmp_path / "b", optim="sgd", max_grad_norm=0.0, num_train_epochs=1, **options)
    start = weights(reference)
    for each in (reference, other):
        each.train()
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-4, atol=1e-6, msg=name)
    moved = [name for name, value in weights(reference).items() if not torch.equal(value, start[name])]
    assert len(moved) > 30


def test_logs_have_what_a_person_looks_for(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {
        "loss",
        "learning_rate",
        "logit_scale",
        "grad_norm",
        "samples_per_second",
        "peak_memory_mib",
        "in_batch_r1",
        "positive_similarity",
        "negative_similarity",
    } <= set(entry)
    assert entry["logit_scale"] == pytest.approx(40, rel=2e-2)
    assert 1 < entry["loss"] < 4
    assert entry["grad_norm"] > 0


def test_the_first_batch_is_checked_on_request_and_training_goes_on_as_without(tmp_path, capsys):
    plain = make_trainer(tmp_path / "plain", model=clip_model(dropout=0.1))
    plain.train()
    assert "against" not in capsys.readouterr().out
    checked = make_trainer(tmp_path / "checked", model=clip_model(dropout=0.1), check_equivalence=True)
    checked.train()
    assert "cached step, batch of 8 in chunks of 3, against" in capsys.readouterr().out
    report = json.loads((tmp_path / "checked" / "equivalence.json").read_text())
    assert report["ok"]
    assert (tmp_path / "checked" / "equivalence.png").stat().st_size > 5000
    assert not (tmp_path / "plain" / "equivalence.json").exists()
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(checked)[name]), name


@pytest.mark.parametrize("on_drift", ["error", "warn", "ignore"])
def test_an_encoder_that_changes_its_mind(on_drift, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("gc_accel.engine.drift.logger.warning", warnings.append)
    make_trainer(tmp_path / "steady", max_steps=1, on_drift=on_drift).train()
    assert warnings == []
    model = clip_model()
    calls = iter(range(10_000))
    model.visual_projection.register_forward_hook(lambda module, args, output: output * (1 + next(calls) % 2))
    model.text_projection.register_forward_hook(lambda module, args, output: output + next(calls))
    restless = make_trainer(tmp_path / "restless", model=model, max_steps=1, on_drift=on_drift)
    if on_drift == "error":
        with pytest.raises(ValueError, match="expected the same representations of chunk"):
            restless.train()
        return
    restless.train()
    assert len(warnings) == (on_drift == "warn")
    assert all("expected the same representations" in text for text in warnings)


def test_evaluation_is_over_all_pairs(tmp_path):
    trainer = make_trainer(tmp_path, eval_size=30)
    scores = trainer.evaluate()
    assert {"eval_image_to_text_r1", "eval_text_to_image_r10", "eval_text_to_image_median_rank"} <= set(
        scores
    )
    reps = trainer.encode(trainer.eval_dataset)
    assert reps["labels"].tolist() == trainer.eval_dataset.numbers.tolist()
    expected = dense.clip_loss(reps["image"], reps["text"], trainer.shared["logit_scale"])
    assert scores["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != scores["eval_loss"]


def test_several_evaluation_sets(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = {"a": HandwrittenNumbers("test", size=5), "b": HandwrittenNumbers("test", size=7)}
    assert {"eval_a_loss", "eval_b_text_to_image_r1"} <= set(trainer.evaluate())


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")  # by the processor of transformers, of itself
def test_checkpoint_is_the_models_own(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    model, processor = CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path)
    assert model.logit_scale.shape == ()
    sample = [HandwrittenNumbers("test", size=3)[i] for i in range(3)]
    inputs = processor(
        images=[s["image"] for s in sample],
        text=[s["text"] for s in sample],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        outputs = model.eval()(**inputs)
        ours = trainer.encoder.eval()
        chunk = trainer.data_collator(sample)
        chunk.pop("labels")
        reps = ours(image={"pixel_values": chunk.pop("pixel_values")}, text=chunk)
    torch.testing.assert_close(outputs.image_embeds, reps["image"], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.text_embeds, reps["text"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.logit_scale.exp().reshape(1), reps["logit_scale"])
    assert (tmp_path / "model.safetensors").exists()


def test_best_model_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        num_train_epochs=3,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2


def test_logit_scale_is_clamped_and_not_decayed(tmp_path):
    model = clip_model()
    model.logit_scale.data.fill_(math.log(99.9))
    trainer = make_trainer(tmp_path, model=model, learning_rate=1.0, max_grad_norm=0.0)
    trainer.train()
    assert trainer.encoder.model.logit_scale.exp().item() <= 100 * (1 + 1e-6)
    decayed = trainer.get_decay_parameter_names(trainer.encoder)
    assert "model.visual_projection.weight" in decayed
    assert not [name for name in decayed if "logit" in name or "bias" in name or "norm" in name]


def test_loss_follows_the_model_or_the_name(tmp_path):
    assert type(make_trainer(tmp_path).loss).__name__ == "CLIPLoss"
    assert (
        type(make_trainer(tmp_path, model=siglip(max_position_embeddings=16)).loss).__name__ == "SigLIPLoss"
    )
    assert type(make_trainer(tmp_path, loss="siglip").loss).__name__ == "SigLIPLoss"
    with pytest.raises(ValueError, match=r"a loss among .*'clip'.*got 'no such'"):
        make_trainer(tmp_path, loss="no such")


def test_captions_are_padded_fully_where_the_model_sees_the_padding(tmp_path):
    """SigLIP pools the last position: chunks trimmed to their own width would change the result."""
    assert make_trainer(tmp_path).data_collator.padding == "longest"
    model = siglip(max_position_embeddings=16)
    assert make_trainer(tmp_path, model=model).data_collator.padding == "max_length"


def test_open_clip_model_trains_as_it_is(tmp_path):
    model = open_clip_vit()
    open_clip.model.set_model_preprocess_cfg(model, {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3})

    def tokenizer(texts):
        return torch.tensor([[len(word) for word in (text + " x" * 8).split()[:8]] for text in texts])

    args = CachedContrastiveArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        chunk_size=3,
        max_steps=2,
        use_cpu=True,
        report_to="none",
    )
    data = HandwrittenNumbers("train", size=16)
    collator = OpenClipCollator(model.visual.preprocess_cfg, tokenizer)
    trainer = CachedContrastiveTrainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=collator
    )
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(before["text_projection"], weights(trainer)["text_projection"])
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model()
    assert (tmp_path / "open_clip_model.safetensors").exists()


def test_frozen_tower_stays_as_it_was(tmp_path):
    encoder = DualEncoder(clip_model(), image_mean=(0.5,) * 3, image_std=(0.5,) * 3, freeze=("image",))
    trainer = make_trainer(tmp_path, model=encoder, num_train_epochs=1)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if name.startswith(("vision_model", "visual_projection"))]
    assert not trainer.encoder.model.vision_model.training


def test_log_history_survives_as_json(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.save_state()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]


class TestBadArguments:
    """Errors that come before any weight has changed."""

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"auto_find_batch_size": True}, "auto_find_batch_size.*changes the loss"),
            ({"chunk_size": 0}, "chunk_size"),
            ({"retain": "some"}, "retain"),
            ({"forward_chunk_size": 0}, "forward_chunk_size"),
            ({"memory_budget": -1.0}, "memory_budget"),
            ({"memory_budget": float("nan")}, "memory_budget"),
            ({"remove_unused_columns": True}, "remove_unused_columns"),
            ({"ddp_static_graph": True}, "ddp_static_graph"),
        ],
    )
    def test_arguments(self, tmp_path, options, match):
        with pytest.raises(ValueError, match=match):
            CachedContrastiveArguments(output_dir=str(tmp_path), use_cpu=True, **options)

    def test_data_set_smaller_than_the_batch(self, tmp_path):
        trainer = make_trainer(tmp_path, size=5)
        before = weights(trainer)
        with pytest.raises(ValueError, match="at least one global batch of 8"):
            trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())

    def test_no_loss_for_a_vision_encoder(self, tmp_path):
        encoder = nn.Linear(1, 1)
        encoder.streams = {"views": ("pixel_values",)}
        with pytest.raises(ValueError, match="expected a loss"):
            make_trainer(tmp_path, model=encoder)

    def test_no_collator(self, tmp_path):
        args = CachedContrastiveArguments(output_dir=str(tmp_path), use_cpu=True)
        with pytest.raises(ValueError, match="processing_class or a data_collator"):
            CachedContrastiveTrainer(clip_model(), args)

    def test_reentrant_checkpointing(self, tmp_path):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            DualEncoder(clip_model()).gradient_checkpointing_enable({"use_reentrant": True})
