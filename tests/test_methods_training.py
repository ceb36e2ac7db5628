"""Methods with a state through the trainer: it is saved, resumed exactly, and moves when the optimizer does."""

import math

import pytest
import torch
from safetensors.torch import load_file

from gc_accel import CachedContrastiveArguments, CachedContrastiveTrainer
from gc_accel.data import HandwrittenDigits, MultiViewDataset, ViewsCollator, simclr_transform
from gc_accel.losses import (
    LOSSES,
    BYOLLoss,
    HSICLoss,
    MoCoLoss,
    MomentumEncoder,
    NNCLRLoss,
    SimSiamLoss,
    SwAVLoss,
)
from gc_accel.training.loss_state import FILE
from tests.test_vision_encoder import BACKBONES, IMAGE, VisionEncoder

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
DIM, QUEUE = 6, 50  # of two steps and a half
LOSS_OF = {
    "simsiam": lambda encoder: SimSiamLoss(),
    "byol": lambda encoder: BYOLLoss(teacher=MomentumEncoder(encoder, momentum=0.9)),
    "moco": lambda encoder: MoCoLoss(
        queue_size=QUEUE, dim=DIM, teacher=MomentumEncoder(encoder, momentum=0.9)
    ),
    "nnclr": lambda encoder: NNCLRLoss(queue_size=QUEUE, dim=DIM),
    "hsic": lambda encoder: HSICLoss(features=16, redraw=True),
    "swav": lambda encoder: SwAVLoss(queue_size=QUEUE, dim=DIM, prototypes=encoder.further["scores"]),
}


def make_encoder(method):
    torch.manual_seed(1)
    heads = {"swav": {"prototypes": 4}, "hsic": {}}.get(method, {"predictor": 8})
    vit = BACKBONES["vit"](hidden_dropout_prob=0.2)  # so that the generators count as well
    return VisionEncoder(vit, projection_dim=DIM, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, **heads)


def make_trainer(folder, method, *, loss=None, **options):
    encoder = make_encoder(method)
    transform = simclr_transform(IMAGE, crop_scale=(0.7, 1.0), flip=0.0, jitter=0.0)
    arguments = {"per_device_train_batch_size": 20, "chunk_size": 8, "max_steps": 8, "learning_rate": 1e-2}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return CachedContrastiveTrainer(
        encoder,
        CachedContrastiveArguments(output_dir=str(folder), **(arguments | quiet | options)),
        loss=LOSS_OF[method](encoder) if loss is None else loss,
        train_dataset=MultiViewDataset(HandwrittenDigits("train", image_size=IMAGE), transform),
        eval_dataset=MultiViewDataset(HandwrittenDigits("test", image_size=IMAGE), transform),
        data_collator=ViewsCollator(),
        compute_metrics=lambda reps: {"rows": float(len(reps["views"]))},
    )


def everything(trainer):
    """Weights of the encoder and state of the loss."""
    states = {"encoder": trainer.encoder.state_dict(), "loss": trainer.loss.state_dict()}
    return {
        f"{part}.{name}": value.clone() for part, state in states.items() for name, value in state.items()
    }


@pytest.mark.parametrize("method", LOSS_OF)
def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path, method):
    whole = make_trainer(tmp_path / "whole", method, save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = make_trainer(tmp_path / "resumed", method)
    before = everything(resumed)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 8
    assert 0 < resumed.state.epoch < 1
    expected, found = everything(whole), everything(resumed)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    moved = {name for name, value in expected.items() if not torch.equal(before[name], value)}
    assert {name.split(".")[0] for name in moved} == (
        {"encoder"} if method == "simsiam" else {"encoder", "loss"}
    )
    assert any(name.startswith("encoder.further") for name in moved) == (method != "hsic")
    assert (checkpoint / FILE).exists() == (method != "simsiam")


@pytest.mark.parametrize("method", ["byol", "moco", "nnclr", "swav", "hsic"])
def test_a_state_that_stays_behind_would_be_seen(tmp_path, method, monkeypatch):
    whole = make_trainer(tmp_path / "whole", method, save_strategy="steps", save_steps=3)
    whole.train()
    monkeypatch.setattr("gc_accel.training.trainer.load_loss", lambda loss, directory: None)
    resumed = make_trainer(tmp_path / "resumed", method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    weights, other = whole.encoder.state_dict(), resumed.encoder.state_dict()
    assert not all(torch.equal(other[name], value) for name, value in weights.items())


def test_the_momentum_encoder_follows_once_per_step_of_the_optimizer(tmp_path):
    """By its formula, with two batches to a step and the momentum on its way to 1."""
    trainer = make_trainer(tmp_path, "byol", gradient_accumulation_steps=2, max_steps=4)
    teacher, name = trainer.loss.teacher, "heads.0.0.weight"
    expected, seen = teacher.encoder.get_parameter(name).clone(), []
    update = teacher.update

    def noted(encoder, **options):
        share = 0.1 * (math.cos(math.pi * len(seen) / 4) + 1) / 2
        expected.lerp_(encoder.get_parameter(name).detach(), share)
        seen.append(options["progress"])
        update(encoder, **options)

    teacher.update = noted
    trainer.train()
    assert seen == [0, 0.25, 0.5, 0.75]
    torch.testing.assert_close(teacher.encoder.get_parameter(name), expected)
    assert not torch.equal(expected, trainer.encoder.get_parameter(name))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_loss_by_name_gets_its_momentum_encoder(tmp_path):
    for name in ("byol", "moco", "simsiam"):
        trainer = make_trainer(tmp_path / name, "byol", loss=name, max_steps=1)
        assert isinstance(trainer.loss, LOSSES[name])
        assert (trainer.loss.teacher is None) == (name == "simsiam")
        trainer.train()


@pytest.mark.parametrize("method", LOSS_OF)
def test_evaluation_changes_no_state(tmp_path, method):
    trainer = make_trainer(tmp_path, method, max_steps=2)
    trainer.train()
    before = everything(trainer)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    assert math.isfinite(first["eval_loss"])
    assert all(torch.equal(value, before[name]) for name, value in everything(trainer).items())
    trainer.train()


@pytest.mark.parametrize("method", LOSS_OF)
def test_the_first_batch_can_be_checked_and_changes_nothing(tmp_path, capsys, method):
    plain = make_trainer(tmp_path / "plain", method, max_steps=2)
    plain.train()
    checked = make_trainer(tmp_path / "checked", method, max_steps=2, check_equivalence=True)
    checked.train()
    assert "\nequal: largest error" in capsys.readouterr().out
    for name, value in everything(plain).items():
        assert torch.equal(everything(checked)[name], value), name


@pytest.mark.parametrize("method", ["simsiam", "hsic"])
def test_evaluation_on_the_way_changes_no_training(tmp_path, method):
    plain = make_trainer(tmp_path / "plain", method, max_steps=3)
    plain.train()
    assert any(type(module) is torch.nn.Dropout and module.p > 0 for module in plain.encoder.modules())
    watched = make_trainer(tmp_path / "watched", method, max_steps=3, eval_strategy="steps", eval_steps=1)
    watched.train()
    assert sum("eval_loss" in entry for entry in watched.state.log_history) == 3
    for name, value in everything(plain).items():
        assert torch.equal(everything(watched)[name], value), name


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    make_trainer(tmp_path / "a", "simsiam", save_strategy="steps", save_steps=3).train()
    other = make_trainer(tmp_path / "b", "byol")
    with pytest.raises(ValueError, match="expected the state of BYOLLoss"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


@pytest.mark.parametrize("method", ["swav", "byol"])
def test_predictors_and_prototypes_are_saved_with_the_encoder(tmp_path, method):
    trainer = make_trainer(tmp_path, method, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert all(
        name.split(".")[0] in ("scores", "predictions")
        for name in load_file(tmp_path / "further.safetensors")
    )
    opened = VisionEncoder.from_pretrained(tmp_path)
    again = make_encoder(method)
    again.load_pretrained(tmp_path)
    for name, value in trainer.encoder.state_dict().items():
        if name.startswith(("heads", "further")):
            assert torch.equal(opened.state_dict()[name], value), name
            assert torch.equal(again.state_dict()[name], value), name
    assert opened.options == trainer.encoder.options
