"""Every method of `examples/vision_train.py`: its recipe makes a loss and an encoder that fit each other."""

import math
import sys

import pytest
import torch
from safetensors.torch import load_file

from gc_accel import GradientCache
from gc_accel.losses import LOSSES
from tests.launching import ROOT, launch, metrics
from tests.test_vision_examples import save_vit

BATCH = ["--per_device_train_batch_size", "128", "--chunk_size", "48", "--projection_dim", "16"]
SHORT = ["--max_steps", "3", "--use_cpu", "--eval_strategy", "no", "--save_steps", "2"]


@pytest.fixture
def examples(monkeypatch):
    """The modules of the example, as its own folder sees them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import vision_models
    import vision_recipes

    yield vision_models, vision_recipes
    for name in ("vision_models", "vision_recipes"):
        del sys.modules[name]


def make(examples, loss, *, model=None, seed=0, **flags):
    """An encoder and a loss, and a batch for them."""
    models, recipes = examples
    recipe = recipes.RECIPES[loss]
    args = models.ModelArguments(projection_dim=8, **(model or {}))
    torch.manual_seed(seed)
    encoder = models.load_encoder(args, models.pixels_of(None, 16), recipe.exits, recipe.encoder)
    made = recipes.make_loss(recipes.LossArguments(loss=loss, **flags), encoder)
    batch = {
        "pixel_values": torch.randn(6, recipe.views, 3, 16, 16),
        "labels": torch.tensor([0, 1, 0, 2, 1, 0]),
    }
    return encoder.train(), made, batch


def test_every_vision_loss_has_a_recipe(examples):
    _, recipes = examples
    kinds = {recipe.kind or name for name, recipe in recipes.RECIPES.items()}
    assert kinds == set(LOSSES) - {"clip", "siglip", "dclw"}
    assert set(recipes.RECIPES) == kinds | {"moco_v2"}


@pytest.mark.parametrize(
    "loss", [name for name in [*LOSSES, "moco_v2"] if name not in ("clip", "siglip", "dclw")]
)
def test_a_recipe_trains(examples, loss):
    encoder, made, batch = make(examples, loss)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    values = []
    for _ in range(3):
        values.append(float(GradientCache(encoder, made, 4).forward_backward(batch)))
        optimizer.step()
        optimizer.zero_grad()
    assert all(math.isfinite(value) for value in values)
    still = [name for name, p in encoder.named_parameters() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ("simclr", "byol", set()),  # with LayerNorm in the head
        ("byol", "moco", {"heads", "further"}),
        ("byol", "simclr", {"heads"}),
        ("simclr", "swav", {"heads"}),
        ("swav", "simclr", {"heads"}),
        ("spectral", "simclr", {"heads"}),
        ("selfcon", "byol", set()),
    ],
)
def test_a_run_by_one_method_is_a_model_for_another(tmp_path, examples, caplog, before, after, kept):
    save_vit(tmp_path / "vit")
    exits = {"exits": ["layers.0"]} if before == "selfcon" else {}
    first, _, _ = make(examples, before, model={"model": str(tmp_path / "vit"), **exits})
    first.save_pretrained(tmp_path / "run")
    with caplog.at_level("WARNING"):
        encoder, loss, batch = make(examples, after, model={"model": str(tmp_path / "run")}, seed=1)
    old, new = first.state_dict(), {name: p for name, p in encoder.named_parameters() if p.ndim > 1}
    same = {name for name, value in new.items() if name in old and torch.equal(value, old[name])}
    loaded = {"backbone"} | kept
    assert same == {name for name in new if name.partition(".")[0] in loaded}
    others = {name.partition(".")[0] for name in new} - loaded
    assert caplog.text.count("which are new") == len(others)
    fresh, _, _ = make(examples, after)
    assert encoder.normalize == fresh.normalize
    assert math.isfinite(GradientCache(encoder, loss, 4).forward_backward(batch))
    if others:  # but a checkpoint of another method is not one to resume from
        with pytest.raises((RuntimeError, FileNotFoundError)):
            encoder.load_pretrained(tmp_path / "run")


@pytest.mark.parametrize("head", [None, "none"])
@pytest.mark.parametrize(("loss", "size"), [("swav", 4), ("moco_v2", 4), ("nnclr", 4)])
def test_a_queue_can_be_asked_for(examples, loss, size, head):
    encoder, made, batch = make(examples, loss, queue_size=size, model={"head": head})
    assert len(made.queue.rows) == size
    assert made.queue.rows.shape[-1] == encoder.dim == (8 if head is None else 128)
    for _ in range(2):
        GradientCache(encoder, made, 4).forward_backward(batch)
    assert made.queue.is_full


@pytest.mark.parametrize("loss", ["moco_v2", "nnclr"])
def test_a_loss_that_needs_its_queue_keeps_it(examples, loss):
    with pytest.raises(ValueError, match=f"--queue_size of at least 1 for --loss {loss}, got 0"):
        make(examples, loss, queue_size=0)


@pytest.mark.parametrize(("loss", "schedule"), [("moco", "cosine"), ("moco_v2", "constant")])
def test_moco_of_a_paper_has_its_queries_and_its_momentum(examples, loss, schedule):
    encoder, made, batch = make(examples, loss)
    assert made.teacher.schedule == schedule
    outputs = encoder(views={"pixel_values": batch["pixel_values"]})
    assert set(outputs) == ({"views"} if loss == "moco_v2" else {"views", "predictions"})
    assert (made.queue is not None) == (loss == "moco_v2")
    assert made.regime == ("C" if loss == "moco_v2" else "B")


@pytest.mark.parametrize(
    ("loss", "flags"),
    [
        ("simclr", {"momentum": 0.9}),
        ("byol", {"temperature": 0.1}),
        ("simsiam", {"queue_size": 3}),
        ("moco", {"queue_size": 3}),
    ],
)
def test_flags_without_a_use_are_refused(examples, loss, flags):
    with pytest.raises(ValueError, match=f"expected no --{next(iter(flags))} for --loss {loss}"):
        make(examples, loss, **flags)


@pytest.mark.parametrize(
    ("loss", "heads"),
    [("simclr", {"predictor": 16}), ("moco_v2", {"predictor": 16}), ("byol", {"prototypes": 4})],
)
def test_heads_without_a_use_are_refused(examples, loss, heads):
    with pytest.raises(ValueError, match=f"expected no --{next(iter(heads))} for a --loss that has none"):
        make(examples, loss, model=heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "options", "config"),
    [
        ("byol", [], "ddp_cpu.yaml"),
        ("swav", ["--queue_size", "200"], "ddp_cpu.yaml"),
        ("nnclr", [], "cpu.yaml"),
    ],
)
def test_a_run_resumes_with_its_state(tmp_path, loss, options, config):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = ["--loss", loss, *options, *BATCH, *SHORT]
    launch("vision_train.py", "--output_dir", whole, *arguments, config=config)
    again = ["--resume_from_checkpoint", whole / "checkpoint-2"]
    launch("vision_train.py", "--output_dir", resumed, *arguments, *again, config=config)
    assert 0 < metrics(whole)["eval_probe_last_backbone"] <= 1
    for file in ("model", "head", "further", "loss"):
        first, second = (load_file(folder / f"{file}.safetensors") for folder in (whole, resumed))
        assert first
        for name, value in first.items():
            assert torch.equal(second[name], value), name
