"""DualEncoder: the model's own embeddings inside, the model's own checkpoint outside."""

import json

import open_clip
import pytest
import torch
from torch import nn
from transformers import CLIPModel, SiglipModel, VisionTextDualEncoderModel

from gc_accel import DualEncoder, GradientCache
from gc_accel.losses import CLIPLoss, SigLIPLoss
from tests.comparing import assert_equal, gradients
from tests.models import MODELS, dual_encoder, image_text_batch

CLASSES = {"clip": CLIPModel, "siglip": SiglipModel, "vision_text": VisionTextDualEncoderModel}


def encode(encoder, size=5):
    batch = image_text_batch(size)
    with torch.no_grad():
        return encoder(image={"pixel_values": batch["pixel_values"]}, text={"input_ids": batch["input_ids"]})


def as_published(model, size=5):
    """Normalised embeddings and logit scale by the model's own forward."""
    batch = image_text_batch(size)
    with torch.no_grad():
        if isinstance(model, (open_clip.CLIP, open_clip.CustomTextCLIP)):
            image, text, scale, *_ = model(batch["pixel_values"], batch["input_ids"])
            return image, text, scale
        outputs = model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"])
        return outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()


@pytest.mark.parametrize("kind", MODELS)
def test_embeddings_are_the_models_own(kind):
    model = MODELS[kind]().double().eval()
    image, text, scale = as_published(model)
    reps = encode(DualEncoder(model))
    torch.testing.assert_close(reps["image"], image)
    torch.testing.assert_close(reps["text"], text)
    torch.testing.assert_close(reps["logit_scale"], scale.reshape(1))
    assert reps["logit_scale"].shape == (1,)
    torch.testing.assert_close(reps["image"].norm(dim=1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", CLASSES)
def test_checkpoint_of_transformers_reads_back(kind, tmp_path):
    encoder = DualEncoder(MODELS[kind]().eval()).double()
    encoder.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    model = CLASSES[kind].from_pretrained(tmp_path, dtype=torch.float64)
    assert model.logit_scale.shape == MODELS[kind]().logit_scale.shape
    image, text, _ = as_published(model)
    torch.testing.assert_close(encode(encoder)["image"], image)
    torch.testing.assert_close(encode(encoder)["text"], text)


def test_checkpoint_of_open_clip_reads_back(tmp_path):
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**config)
    open_clip.model.set_model_preprocess_cfg(model, {"size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    encoder = DualEncoder(model.eval(), model_config=config)
    encoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"] == config
    again = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    assert again.logit_scale.shape == ()
    assert_equal_embeddings(DualEncoder(again), encoder)


def assert_equal_embeddings(a, b):
    reps, expected = encode(a.double()), encode(b.double())
    for name, value in expected.items():
        torch.testing.assert_close(reps[name], value)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_load_in_place(kind, tmp_path):
    torch.manual_seed(1)
    saved = DualEncoder(MODELS[kind]().eval())
    saved.save_pretrained(tmp_path)
    torch.manual_seed(2)
    other = DualEncoder(MODELS[kind]().eval())
    parameters = [id(parameter) for parameter in other.parameters()]
    other.load_pretrained(tmp_path)
    assert parameters == [id(parameter) for parameter in other.parameters()]
    assert_equal_embeddings(other, saved)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_freezing_covers_a_whole_tower_and_nothing_else(kind, tower):
    encoder = dual_encoder(kind, freeze=(tower,))
    assert encoder.frozen_streams == {tower}
    other = "text" if tower == "image" else "image"
    reps = encoder(**{other: split(image_text_batch(3))[other]})
    (reps[other].sum() + sum(reps[name].sum() for name in encoder.global_names)).backward()
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None}
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert trained
    assert not trained & frozen
    unaccounted = {name for name, _ in encoder.named_parameters()} - trained - frozen
    assert not [name for name in unaccounted if "mask_token" not in name]
    encoder.train()
    modes = {name: module.training for name, module in encoder.model.named_modules() if name}
    assert not all(modes.values())
    assert any(modes.values())


def split(batch):
    return {"image": {"pixel_values": batch["pixel_values"]}, "text": {"input_ids": batch["input_ids"]}}


def test_partly_frozen_tower_stays_partly_frozen():
    model = MODELS["clip"]().double()
    model.vision_model.embeddings.requires_grad_(False)
    encoder = DualEncoder(model)
    assert encoder.frozen_streams == set()
    GradientCache(encoder, CLIPLoss(), 3).forward_backward(image_text_batch(7))
    grads = gradients(encoder)
    assert grads["model.vision_model.embeddings.patch_embedding.weight"] is None
    assert grads["model.visual_projection.weight"].norm() > 0


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])  # VisionTextDualEncoder has none
def test_gradient_checkpointing_changes_nothing(kind):
    batch = image_text_batch(7)
    found = []
    for checkpointing in (False, True):
        encoder = dual_encoder(kind)
        if checkpointing:
            encoder.gradient_checkpointing_enable()
        loss = SigLIPLoss() if kind == "siglip" else CLIPLoss()
        GradientCache(encoder, loss, 3).forward_backward(batch)
        found.append(gradients(encoder))
    assert_equal(found[1], found[0])


def test_uint8_images_are_normalised_on_the_way():
    model = MODELS["clip"]().double().eval()
    encoder = DualEncoder(model, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)).double()
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    )
    by_hand = encoder(image={"pixel_values": (pixels.double() / 255 - mean) / std})["image"]
    torch.testing.assert_close(
        encoder(image={"pixel_values": pixels})["image"], by_hand, rtol=1e-6, atol=1e-6
    )
    with pytest.raises(ValueError, match="image_mean and image_std for uint8"):
        DualEncoder(MODELS["clip"]())(image={"pixel_values": pixels})


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="towers to freeze"):
        DualEncoder(MODELS["clip"](), freeze=("vision",))
    with pytest.raises(ValueError, match="both image_mean and image_std"):
        DualEncoder(MODELS["clip"](), image_mean=(0.5,) * 3)


def test_logit_scale_has_one_dimension_inside():
    """Sharding backends take no 0-d parameters."""
    encoder = DualEncoder(MODELS["clip"]())
    assert all(isinstance(p, nn.Parameter) and p.ndim > 0 for p in encoder.parameters())
