"""SimCLR, SupCon and SelfCon through encoder, cache and trainer: the gradient is that of the dense loss."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gc_accel import CachedContrastiveArguments, CachedContrastiveTrainer, GradientCache
from gc_accel.data import HandwrittenDigits, MultiViewDataset, ViewsCollator, simclr_transform
from gc_accel.losses import NTXentLoss, SelfConLoss, SupConLoss, dense
from tests.comparing import assert_equal
from tests.ranks import run_on_ranks
from tests.test_vision_encoder import EXITS, IMAGE, batch_of, encoder_of, taken_gradients

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
LOSSES = {  # the loss, its dense twin, views per image
    "simclr": (NTXentLoss(0.3), lambda views, labels: dense.nt_xent_loss(views, temperature=0.3), 2),
    "supcon": (SupConLoss(0.3), partial(dense.supcon_loss, temperature=0.3), 2),
    "selfcon": (SelfConLoss(0.3), partial(dense.selfcon_loss, temperature=0.3), 1),
}
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])  # classes reach over chunks and ranks; two have one sample
SHARES = (slice(0, 3), slice(3, 7))


def make(kind, loss):
    """An encoder of a kind, with exits where the loss contrasts them, and a batch."""
    encoder = encoder_of(kind, exits=EXITS[kind] if loss == "selfcon" else ())
    return encoder, {**batch_of(views=LOSSES[loss][2]), "labels": LABELS}


def dense_step(encoder, batch, loss):
    """The oracle: one forward of everything, the dense loss, one backward."""
    views = encoder(views={"pixel_values": batch["pixel_values"]})["views"]
    value = LOSSES[loss][1](views, batch["labels"])
    value.backward()
    return value.detach(), taken_gradients(encoder)


def cached_step(encoder, batch, loss, chunk_size):
    value = GradientCache(encoder, LOSSES[loss][0], chunk_size).forward_backward(batch)
    return value, taken_gradients(getattr(encoder, "module", encoder))


@pytest.mark.parametrize("chunk_size", range(1, 9))
@pytest.mark.parametrize("kind", ["vit", "resnet, frozen norm", "dinov2", "timm vit"])
@pytest.mark.parametrize("loss", LOSSES)
def test_cached_gradients_equal_those_of_the_dense_loss(loss, kind, chunk_size):
    encoder, batch = make(kind, loss)
    expected_value, expected = dense_step(encoder, batch, loss)
    value, found = cached_step(encoder, batch, loss, chunk_size)
    torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=0)
    assert_equal(found, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_belong_to_their_samples(loss):
    """Whatever the order of the samples, but not if labels alone change places; SimCLR does not look at them."""
    encoder, batch = make("vit", loss)
    order = torch.tensor([4, 2, 0, 6, 1, 3, 5])
    (value, found), (same, other) = (
        cached_step(encoder, each, loss, 3) for each in (batch, {k: v[order] for k, v in batch.items()})
    )
    torch.testing.assert_close(same, value, rtol=1e-9, atol=0)
    assert_equal(other, found)
    swapped, _ = cached_step(encoder, batch | {"labels": LABELS[order]}, loss, 3)
    assert (abs(float(swapped - value)) > 1e-5) == (loss != "simclr")


def ranks_step(rank):
    """Every loss on one rank's share of the batch."""
    assert dist.get_world_size() == len(SHARES)
    found = {}
    for loss in LOSSES:
        encoder, batch = make("vit", loss)
        replica = DistributedDataParallel(encoder, find_unused_parameters=True)
        own = {name: value[SHARES[rank]] for name, value in batch.items()}
        found[loss] = cached_step(replica, own, loss, 2)
    return found


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    results = run_on_ranks(ranks_step, 2, tmp_path)
    for loss in LOSSES:
        encoder, batch = make("vit", loss)
        expected_value, expected = dense_step(encoder, batch, loss)
        alone, _ = dense_step(encoder, {name: value[SHARES[0]] for name, value in batch.items()}, loss)
        assert abs(float(alone - expected_value)) > 1e-3, "ranks that keep to themselves would not be seen"
        for value, found in (result[loss] for result in results):
            torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=0)
            assert_equal(found, expected)


def make_trainer(folder, loss, **options):
    transform = simclr_transform(IMAGE, views=LOSSES[loss][2], crop_scale=(0.7, 1.0), flip=0.0, jitter=0.0)
    exits = EXITS["vit"] if loss == "selfcon" else ()
    arguments = {"per_device_train_batch_size": 12, "chunk_size": 5, "max_steps": 2, "save_strategy": "no"}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return CachedContrastiveTrainer(
        encoder_of("vit", exits=exits, image_mean=(0.5,) * 3, image_std=(0.5,) * 3),
        CachedContrastiveArguments(output_dir=str(folder), **(arguments | quiet | options)),
        loss=LOSSES[loss][0],
        train_dataset=MultiViewDataset(HandwrittenDigits("train", image_size=IMAGE), transform),
        eval_dataset=MultiViewDataset(HandwrittenDigits("test", image_size=IMAGE), transform),
        data_collator=ViewsCollator(),
        compute_metrics=lambda reps: {"rows": float(len(reps["views"]))},
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_training_step_sees_views_and_labels_of_its_batch(tmp_path, loss):
    plain_sgd = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0}
    trainer = make_trainer(tmp_path, loss, max_steps=1, lr_scheduler_type="constant", **plain_sgd)
    loader = trainer.get_train_dataloader()
    chunks = next(loader.plan.batches_of_chunks())
    assert [len(indices) for indices in chunks] == [5, 5, 2]
    batch = ViewsCollator()([trainer.train_dataset[i] for indices in chunks for i in indices])
    assert 2 <= len(batch["labels"].unique()) < 12
    expected_value, expected = dense_step(trainer.encoder.train(), batch, loss)
    before = {name: parameter.detach().clone() for name, parameter in trainer.encoder.named_parameters()}
    result = trainer.train()
    assert result.training_loss == pytest.approx(float(expected_value), rel=1e-6)  # in float32
    moved = {
        name: before[name] - parameter.detach() for name, parameter in trainer.encoder.named_parameters()
    }
    assert_equal(moved, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_evaluation_takes_the_loss_of_the_whole_set(tmp_path, loss):
    trainer = make_trainer(tmp_path, loss)
    scores = trainer.evaluate()
    reps = trainer.encode(trainer.eval_dataset)
    assert reps["labels"].tolist() == trainer.eval_dataset.dataset.labels.tolist()
    assert scores["eval_rows"] == len(reps["views"]) == 360
    expected = LOSSES[loss][1](reps["views"].double(), reps["labels"])
    assert scores["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_an_encoder_gets_a_model_card(tmp_path):
    trainer = make_trainer(tmp_path, "supcon")
    trainer.train()
    trainer.create_model_card()
    assert "learning_rate" in (tmp_path / "README.md").read_text()
