"""VisionEncoder: any backbone, exits, crops and freezing leave the gradient that of the full batch."""

import copy

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import GroupNorm1
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from gc_accel import GradientCache
from gc_accel.encoders.vision import VisionEncoder
from tests.comparing import assert_equal, gradients

SIZE, IMAGE = 7, 16
DINO = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": 8,
}
VIT = {**DINO, "intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 12], "depths": [1, 1]}


def vit(**options):
    return ViTModel(ViTConfig(**VIT, **options))


def dinov2():
    return Dinov2Model(Dinov2Config(**DINO))


def resnet():
    model = ResNetModel(ResNetConfig(embedding_size=8, layer_type="basic", **STAGES))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def frozen_norm_resnet():
    model = resnet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


def convnext():
    config = ConvNextConfig(num_stages=2, patch_size=2, layer_scale_init_value=0.5, **STAGES)
    return ConvNextModel(config)


def timm_vit(**options):
    shape = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape, **options)


def timm_swin():
    shape = {"img_size": IMAGE, "patch_size": 2, "window_size": 4, "embed_dim": 8, "drop_path_rate": 0}
    return timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(1, 2), **shape)


def open_clip_tower():
    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": IMAGE, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    )
    return model.visual


BACKBONES = {
    "vit": vit,
    "dinov2": dinov2,
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
    "clip, projected": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT, projection_dim=8)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)),
    "resnet, frozen norm": frozen_norm_resnet,
    "convnext": convnext,
    "timm vit": timm_vit,
    "timm resnet, group norm": lambda: timm.create_model("test_resnet", norm_layer=GroupNorm1),
    "timm swin": timm_swin,
    "open_clip": open_clip_tower,
}
EXITS = {
    "vit": ["layers.0"],
    "dinov2": ["encoder.layer.0", "encoder.layer.1"],
    "resnet, frozen norm": ["embedder", "encoder.stages.0"],
    "convnext": ["encoder.stages.0"],
    "timm vit": ["blocks.0"],
    "timm resnet, group norm": ["layer1", "layer3"],
    "timm swin": ["layers.0"],
    "open_clip": ["transformer.resblocks.0"],
}


def encoder_of(kind, **options):
    torch.manual_seed(1)
    return VisionEncoder(BACKBONES[kind]().train(), projection_dim=6, **options).double()


def images(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch_of(size=SIZE, views=2):
    return {"pixel_values": images(size, views, 3, IMAGE, IMAGE), "labels": torch.arange(size) // 2}


def contrastive_loss(views, labels):
    """SupCon, dense: it couples every representation with every other, and knows samples by their label."""
    ids, reps = labels.repeat_interleave(views.shape[1]), views.flatten(0, 1)
    logits = (reps @ reps.T / 0.3).masked_fill(torch.eye(len(reps), dtype=torch.bool), -1e9)
    positive = (ids[:, None] == ids) & ~torch.eye(len(reps), dtype=torch.bool)
    return -(logits.log_softmax(1) * positive).sum() / positive.sum()


def full_batch(encoder, batch):
    """The oracle: one forward of everything, one backward."""
    views = encoder(views={"pixel_values": batch["pixel_values"]})["views"]
    loss = contrastive_loss(views, batch["labels"])
    loss.backward()
    return loss.detach(), taken_gradients(encoder)


def taken_gradients(encoder):
    taken = gradients(encoder)
    encoder.zero_grad(set_to_none=True)
    return taken


def assert_equals_the_full_batch(encoder, batch, chunk_size=3, retain=1):
    expected_loss, expected = full_batch(encoder, batch)
    loss = GradientCache(encoder, contrastive_loss, chunk_size, retain=retain).forward_backward(batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    found = taken_gradients(encoder)
    assert_equal(found, expected)
    return found


class TestGradients:
    @pytest.mark.parametrize("kind", BACKBONES)
    def test_equal_the_full_batch(self, kind):
        assert_equals_the_full_batch(encoder_of(kind), batch_of())

    @pytest.mark.parametrize("retain", [0, 1, "all"])
    @pytest.mark.parametrize("chunk_size", [1, 3, 64])
    @pytest.mark.parametrize("kind", ["dinov2", "resnet, frozen norm"])
    def test_equal_the_full_batch_whatever_the_chunks(self, kind, chunk_size, retain):
        encoder = encoder_of(kind, exits=EXITS[kind])
        assert_equals_the_full_batch(encoder, batch_of(), chunk_size, retain)

    @pytest.mark.parametrize("kind", EXITS)
    def test_equal_the_full_batch_with_exits(self, kind):
        found = assert_equals_the_full_batch(encoder_of(kind, exits=EXITS[kind]), batch_of())
        heads = [grad for name, grad in found.items() if name.startswith("heads.")]
        assert len(heads) == 4 * (len(EXITS[kind]) + 1)
        assert all(grad.norm() > 0 for grad in heads)

    @pytest.mark.parametrize("kind", ["vit", "dinov2", "timm vit"])
    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    def test_equal_the_full_batch_with_every_pooling(self, kind, pooling):
        assert_equals_the_full_batch(encoder_of(kind, pooling=pooling), batch_of())

    @pytest.mark.parametrize("kind", ["vit", "resnet, frozen norm"])
    @pytest.mark.parametrize("chunk_size", [1, 3, 64])
    def test_equal_the_full_batch_with_crops_of_several_resolutions(self, kind, chunk_size):
        batch = batch_of()
        crops = [images(SIZE, 3, side, side, seed=side + n) for n, side in enumerate([16, 8, 16, 8, 8])]
        batch["pixel_values"] = crops
        assert_equals_the_full_batch(encoder_of(kind), batch, chunk_size)

    def test_the_mask_token_of_dinov2_never_has_one(self):
        found = assert_equals_the_full_batch(encoder_of("dinov2"), batch_of())
        assert [name for name, grad in found.items() if grad is None] == ["backbone.embeddings.mask_token"]

    @pytest.mark.parametrize("kind", ["vit", "timm vit"])
    def test_are_the_same_under_gradient_checkpointing(self, kind):
        encoder = encoder_of(kind, exits=EXITS[kind])
        _, expected = full_batch(encoder, batch_of())
        encoder.gradient_checkpointing_enable()
        runs = []
        inner = encoder.backbone.get_submodule(f"{EXITS[kind][0]}.mlp")
        inner.register_forward_pre_hook(lambda *_: runs.append(1))
        found = assert_equals_the_full_batch(encoder, batch_of())
        assert_equal(found, expected)
        # The full batch and its recomputation; the first pass of three chunks; the second pass of those two
        # that were not retained; a recomputation of all three.
        assert len(runs) == 2 + 3 + 2 + 3

    def test_equal_the_full_batch_without_head_or_normalisation(self):
        encoder = encoder_of("vit", head="none", normalize=False)
        assert_equals_the_full_batch(encoder, batch_of())


class TestRepresentations:
    def test_every_view_is_that_image_encoded_alone(self):
        encoder, pixels = encoder_of("vit").eval(), batch_of(views=3)["pixel_values"]
        reps = encoder(views={"pixel_values": pixels})["views"]
        assert reps.shape == (SIZE, 3, 6)
        torch.testing.assert_close(reps.norm(dim=-1), torch.ones(SIZE, 3, dtype=torch.float64))
        for view in range(3):
            alone = encoder(views={"pixel_values": pixels[4:5, view]})["views"]
            torch.testing.assert_close(reps[4:5, view], alone[:, 0])
        assert (reps[4, 0] - reps[4, 1]).norm() > 1e-3

    def test_crops_keep_their_order(self):
        encoder = encoder_of("resnet, frozen norm").eval()
        crops = [images(2, 3, side, side, seed=side + n) for n, side in enumerate([16, 8, 16, 12, 8])]
        reps = encoder(views={"pixel_values": crops})["views"]
        for place, crop in enumerate(crops):
            alone = encoder(views={"pixel_values": crop})["views"][:, 0]
            torch.testing.assert_close(reps[:, place], alone)

    def test_of_each_view_exits_come_first_and_the_final_one_last(self):
        encoder = encoder_of("vit", exits=["layers.0", "layers.1"], normalize=False).eval()
        pixels = batch_of()["pixel_values"]
        reps = encoder(views={"pixel_values": pixels})["views"]
        assert reps.shape == (SIZE, 2 * 3, 6)
        for view in range(2):
            model = encoder.backbone(pixels[:, view], output_hidden_states=True)
            features = [model.hidden_states[1][:, 0], model.hidden_states[2][:, 0], model.pooler_output]
            for place, feature in enumerate(features):
                torch.testing.assert_close(reps[:, 3 * view + place], encoder.heads[place](feature))

    def test_one_forward_gives_all_exits(self):
        encoder = encoder_of("dinov2", exits=EXITS["dinov2"])
        calls = []
        encoder.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
        encoder(views={"pixel_values": batch_of()["pixel_values"]})
        assert len(calls) == 1
        hooks = sum(len(module._forward_hooks) for module in encoder.modules())
        assert hooks == 0, "hooks outlive the call"

    def test_uint8_images_are_normalised_on_the_way_in(self):
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
        encoder = encoder_of("vit", image_mean=mean, image_std=std).eval()
        raw = torch.randint(0, 256, (3, 2, 3, IMAGE, IMAGE), dtype=torch.uint8)
        normalised = (raw.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        found = encoder(views={"pixel_values": raw})["views"]
        torch.testing.assert_close(found, encoder(views={"pixel_values": normalised})["views"])

    @pytest.mark.parametrize(("head", "layers", "width"), [("mlp", 2, 6), ("linear", 1, 6), ("none", 0, 16)])
    def test_heads(self, head, layers, width):
        encoder = encoder_of("vit", head=head, hidden_dim=20)
        linears = [module for module in encoder.heads.modules() if isinstance(module, nn.Linear)]
        assert len(linears) == layers
        assert encoder(views={"pixel_values": images(2, 3, IMAGE, IMAGE)})["views"].shape == (2, 1, width)
        if head == "mlp":
            assert linears[0].out_features == 20


class TestFeatures:
    """`features` against the models' own outputs."""

    def features(self, model, pooling, size=IMAGE):
        encoder = VisionEncoder(model.eval(), pooling=pooling).double()
        return encoder.features(images(5, 3, size, size))

    def test_of_the_class_token(self):
        model = vit().double()
        state = model.eval()(images(5, 3, IMAGE, IMAGE)).last_hidden_state
        torch.testing.assert_close(self.features(model, "cls"), state[:, 0])

    @pytest.mark.parametrize("registers", [0, 4])
    def test_of_the_patches_leave_class_and_register_tokens_out(self, registers):
        config = Dinov2WithRegistersConfig(**DINO, num_register_tokens=registers)
        model = Dinov2WithRegistersModel(config).double().eval()
        state = model(images(5, 3, IMAGE, IMAGE)).last_hidden_state
        assert state.shape[1] == 1 + registers + 4
        torch.testing.assert_close(self.features(model, "mean"), state[:, 1 + registers :].mean(1))

    def test_of_the_patches_of_another_resolution(self):
        model = dinov2().double().eval()
        state = model(images(5, 3, 24, 24)).last_hidden_state
        assert state.shape[1] == 1 + 9
        torch.testing.assert_close(self.features(model, "mean", 24), state[:, 1:].mean(1))

    @pytest.mark.parametrize("tokens", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 3}])
    def test_of_the_patches_in_timm(self, tokens):
        model = timm_vit(**tokens).double().eval()
        state = model.forward_features(images(5, 3, IMAGE, IMAGE))
        torch.testing.assert_close(self.features(model, "mean"), state[:, -4:].mean(1))

    @pytest.mark.parametrize("pooling", [None, "pooler", "mean"])
    def test_of_a_map(self, pooling):
        model = resnet().double().eval()
        state = model(images(5, 3, IMAGE, IMAGE)).last_hidden_state
        torch.testing.assert_close(self.features(model, pooling), state.mean((2, 3)))

    def test_of_a_map_with_channels_last(self):
        model = timm_swin().double().eval()
        state = model.forward_features(images(5, 3, IMAGE, IMAGE))
        assert state.shape[-1] == 16
        torch.testing.assert_close(self.features(model, "mean"), state.mean((1, 2)))

    @pytest.mark.parametrize("kind", ["vit", "siglip", "clip", "convnext"])
    def test_are_the_models_own_by_default(self, kind):
        model = BACKBONES[kind]().double().eval()
        own = model(images(5, 3, IMAGE, IMAGE)).pooler_output
        torch.testing.assert_close(self.features(model, None), own)

    def test_are_the_projection_where_there_is_one(self):
        model = BACKBONES["clip, projected"]().double().eval()
        own = model(images(5, 3, IMAGE, IMAGE)).image_embeds
        torch.testing.assert_close(self.features(model, None), own)

    def test_come_before_the_classifier_of_timm(self):
        model = timm.create_model("test_resnet", num_classes=10, norm_layer=GroupNorm1).double().eval()
        assert self.features(model, None).shape == (5, model.num_features)

    def test_are_those_of_the_class_token_without_a_pooler(self):
        model = ViTModel(ViTConfig(**VIT), add_pooling_layer=False).double().eval()
        torch.testing.assert_close(self.features(model, None), self.features(model, "cls"))

    def test_are_the_mean_of_tokens_without_a_class_token(self):
        config = SwinConfig(
            image_size=16, patch_size=2, window_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2]
        )
        model = SwinModel(config, add_pooling_layer=False).double().eval()
        state = model(images(5, 3, IMAGE, IMAGE)).last_hidden_state
        torch.testing.assert_close(self.features(model, None), state.mean(1))


class TestFreezing:
    def test_a_partly_frozen_backbone_stays_frozen(self):
        encoder = encoder_of("vit")
        encoder.backbone.embeddings.requires_grad_(False)
        encoder.backbone.layers[0].requires_grad_(False)
        frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
        found = assert_equals_the_full_batch(encoder.train(), batch_of())
        assert {name for name, p in encoder.named_parameters() if not p.requires_grad} == frozen
        assert {name for name, grad in found.items() if grad is None} == frozen
        assert "backbone.layers.0.mlp.fc1.weight" in frozen

    def test_a_frozen_backbone_trains_the_head_alone(self):
        encoder = encoder_of("vit", freeze_backbone=True)
        found = assert_equals_the_full_batch(encoder, batch_of())
        trained = {name for name, grad in found.items() if grad is not None}
        assert trained == {name for name in found if name.startswith("heads.")}

    def test_what_is_frozen_draws_no_dropout(self):
        torch.manual_seed(1)
        encoder = VisionEncoder(vit(hidden_dropout_prob=0.5), freeze_backbone=True).train()
        pixels = images(3, 3, IMAGE, IMAGE).float()
        assert torch.equal(encoder.features(pixels), encoder.features(pixels))
        encoder.backbone.requires_grad_(True)
        encoder.train()
        assert not torch.equal(encoder.features(pixels), encoder.features(pixels))

    def test_only_parts_without_a_trainable_parameter_are_in_eval_mode(self):
        encoder = encoder_of("vit")
        encoder.backbone.layers[0].requires_grad_(False)
        encoder.train()
        assert not any(module.training for module in encoder.backbone.layers[0].modules())
        assert all(module.training for module in encoder.backbone.layers[1].modules())
        assert encoder.training
        assert encoder.backbone.training

    def test_frozen_batch_norm_keeps_its_statistics(self):
        encoder = encoder_of("resnet, frozen norm").train()
        before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        assert_equals_the_full_batch(encoder, batch_of())
        assert len(before) > 3
        for name, buffer in encoder.named_buffers():
            assert torch.equal(buffer, before[name]), name

    def test_batch_norm_that_trains_is_refused_by_the_engine(self):
        encoder = VisionEncoder(resnet().train()).double()
        with pytest.raises(ValueError, match="BatchNorm in training mode"):
            GradientCache(encoder, contrastive_loss, 3).forward_backward(batch_of())

    def test_looking_at_the_backbone_changes_neither_its_mode_nor_its_statistics(self):
        model = resnet().train()
        model.encoder.eval()
        modes = [module.training for module in model.modules()]
        before = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        VisionEncoder(model, head="none", exits=["encoder.stages.1"])
        assert [module.training for module in model.modules()] == [True] * len(modes)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_the_views_are_a_frozen_stream_only_if_nothing_trains(self):
        assert encoder_of("vit", freeze_backbone=True).frozen_streams == set()
        assert encoder_of("vit", freeze_backbone=True, head="none").frozen_streams == {"views"}


class TestCheckpoints:
    @pytest.mark.parametrize("kind", ["vit", "resnet, frozen norm", "timm vit", "open_clip"])
    def test_restore_backbone_and_heads_in_place(self, kind, tmp_path):
        encoder, other = encoder_of(kind, exits=EXITS[kind]), encoder_of(kind, exits=EXITS[kind])
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.randn_like(parameter))
        encoder.save_pretrained(tmp_path / "new")
        before = [id(parameter) for parameter in other.parameters()]
        other.load_pretrained(tmp_path / "new")
        assert [id(parameter) for parameter in other.parameters()] == before
        for name, value in encoder.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name

    def test_of_transformers_are_opened_by_transformers(self, tmp_path):
        encoder = encoder_of("dinov2")
        encoder.save_pretrained(tmp_path)
        opened = Dinov2Model.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(opened[name], value) for name, value in encoder.backbone.state_dict().items())

    def test_of_timm_are_opened_by_timm(self, tmp_path):
        torch.manual_seed(1)
        encoder = VisionEncoder(timm.create_model("test_vit", num_classes=0))
        encoder.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        opened = timm.create_model("test_vit", num_classes=0, checkpoint_path=path).state_dict()
        assert all(torch.equal(opened[name], value) for name, value in encoder.backbone.state_dict().items())

    def test_hold_the_state_that_is_given(self, tmp_path):
        encoder = encoder_of("vit")
        zeros = {name: torch.zeros_like(value) for name, value in encoder.state_dict().items()}
        encoder.save_pretrained(tmp_path, zeros)
        assert not load_file(tmp_path / "head.safetensors")["0.0.weight"].any()
        assert not load_file(tmp_path / "model.safetensors")["layernorm.weight"].any()
        assert encoder.heads[0][0].weight.any()

    def test_bring_heads_and_options_along(self, tmp_path):
        options = {"exits": ["layers.0"], "pooling": "mean", "hidden_dim": 20, "normalize": False}
        statistics = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.2, 0.3)}
        encoder = encoder_of("vit", **options, **statistics).eval()
        encoder.save_pretrained(tmp_path)
        opened = VisionEncoder.from_pretrained(tmp_path).double().eval()
        raw = torch.randint(0, 256, (3, 2, 3, IMAGE, IMAGE), dtype=torch.uint8)
        expected = encoder(views={"pixel_values": raw})["views"]
        assert torch.equal(opened(views={"pixel_values": raw})["views"], expected)
        assert expected.shape == (3, 4, 6)

    def test_without_a_pooler_are_restored(self, tmp_path):
        encoder = VisionEncoder(ViTModel(ViTConfig(**VIT), add_pooling_layer=False))
        other = VisionEncoder(ViTModel(ViTConfig(**VIT), add_pooling_layer=False))
        encoder.save_pretrained(tmp_path)
        other.load_pretrained(tmp_path)
        assert all(torch.equal(other.state_dict()[n], value) for n, value in encoder.state_dict().items())

    def test_without_a_pooler_are_pooled_by_the_class_token(self, tmp_path):
        ViTModel(ViTConfig(**VIT), add_pooling_layer=False).save_pretrained(tmp_path / "without")
        vit().save_pretrained(tmp_path / "with")
        pixels = images(2, 3, IMAGE, IMAGE).float()
        for folder, output in (("without", "last_hidden_state"), ("with", "pooler_output")):
            encoder = VisionEncoder.from_pretrained(tmp_path / folder).eval()
            own = getattr(encoder.backbone(pixels), output)
            features = own[:, 0] if own.ndim == 3 else own
            torch.testing.assert_close(encoder.features(pixels), features)

    def test_names_of_timm_are_opened_by_timm(self):
        options = {"pretrained": False, "img_size": 32}
        encoder = VisionEncoder.from_pretrained("timm/test_vit", backbone_options=options, head="linear")
        assert encoder.backbone.num_classes == 0
        assert encoder(views={"pixel_values": torch.randn(2, 3, 32, 32)})["views"].shape == (2, 1, 128)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pooling": "max"}, "pooling 'cls', 'mean', 'pooler' or None, got 'max'"),
            ({"head": "mlp3"}, "head 'mlp', 'norm_mlp', 'linear' or 'none', got 'mlp3'"),
            ({"exits": ["layers.7"]}, r"exits among the modules .*'layers\.1'.*, got \['layers\.7'\]"),
            ({"exits": ["pooler"]}, r"exit 'pooler' to give a hidden state .*, got \(3, 16\)"),
            ({"image_mean": [0.5] * 3}, "both image_mean and image_std"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            VisionEncoder(vit(), **options)

    @pytest.mark.parametrize(
        ("kind", "pooling", "message"),
        [
            ("siglip", "cls", r"'mean' or 'pooler' for SiglipVisionModel.*no class token"),
            ("convnext", "cls", r"'mean' or 'pooler' for ConvNextModel.*no class token"),
            ("open_clip", "mean", "outputs allow pooling 'mean', got VisionTransformer"),
        ],
    )
    def test_pooling_that_a_backbone_does_not_allow(self, kind, pooling, message):
        with pytest.raises(ValueError, match=message):
            VisionEncoder(BACKBONES[kind](), pooling=pooling)

    def test_an_own_pooling_that_a_backbone_has_not(self):
        with pytest.raises(ValueError, match="outputs allow pooling 'pooler', got ViTModel"):
            VisionEncoder(ViTModel(ViTConfig(**VIT), add_pooling_layer=False), pooling="pooler")

    def test_a_classifier(self):
        with pytest.raises(ValueError, match=r"got ViTForImageClassification.*base model"):
            VisionEncoder(ViTForImageClassification(ViTConfig(**VIT)))

    def test_a_model_of_something_else(self):
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        with pytest.raises(ValueError, match=r"vision backbone, got BertModel.*'input_ids'"):
            VisionEncoder(BertModel(BertConfig(**shape)))

    def test_exits_of_other_widths_without_a_head(self):
        with pytest.raises(ValueError, match=r"different widths, got 'none' for \[8, 12\]"):
            VisionEncoder(resnet(), head="none", exits=["encoder.stages.0"])

    def test_uint8_images_without_statistics(self):
        raw = torch.zeros(2, 3, IMAGE, IMAGE, dtype=torch.uint8)
        with pytest.raises(ValueError, match="image_mean and image_std for uint8"):
            VisionEncoder(vit())(views={"pixel_values": raw})

    @pytest.mark.parametrize(
        "pixels",
        [
            torch.zeros(3, IMAGE, IMAGE),
            [],
            [torch.zeros(2, 3, 16, 16), torch.zeros(3, 3, 16, 16)],
            [torch.zeros(2, 2, 3, 16, 16)],
        ],
        ids=["one image", "nothing", "different samples", "views in views"],
    )
    def test_shapes(self, pixels):
        with pytest.raises(ValueError, match=r"pixel_values \(C, V, 3, H, W\)"):
            VisionEncoder(vit())(views={"pixel_values": pixels})

    def test_views_for_features(self):
        with pytest.raises(ValueError, match=r"images \(C, 3, H, W\), got \(2, 2, 3, 16, 16\)"):
            VisionEncoder(vit()).features(torch.zeros(2, 2, 3, 16, 16))

    def test_reentrant_checkpointing(self):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            VisionEncoder(vit()).activation_checkpointing_enable({"use_reentrant": True})

    def test_checkpointing_that_a_model_does_not_offer(self):
        with pytest.raises(
            ValueError, match=r"can checkpoint \{'every_n_layers': 2\}, got VisionTransformer"
        ):
            VisionEncoder(timm_vit()).activation_checkpointing_enable(every_n_layers=2, offload=False)
        with pytest.raises(ValueError, match="can checkpoint its layers, got Sequential"):
            VisionEncoder(nn.Sequential(nn.Conv2d(3, 4, 4))).gradient_checkpointing_enable()
