"""The models that `vision_train.py` trains: of transformers or timm, or a small ViT, behind a projection head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, ViTConfig, ViTImageProcessor, ViTModel

from gc_accel import VisionEncoder
from gc_accel.command_line import option

BUILT_IN_SIZE = 16  # pixels per side
TIMM = "timm/"


@dataclass
class ModelArguments:
    """Which model, and what of it trains."""

    model: str | None = option(
        None,
        "Vision model of transformers (hub name or folder, one of this example's included) or 'timm/<name>'. By "
        "default a small ViT, from scratch, for the built-in data.",
    )
    from_scratch: bool = option(False, "Take the architecture of the model alone.")
    exits: list[str] | None = option(
        None, "Modules of the model whose outputs, pooled, are views too: what SelfCon contrasts."
    )
    pooling: str | None = option(
        None, "From tokens to features; by default the model's own.", choices=["cls", "mean", "pooler"]
    )
    head: str | None = option(
        None, "Between features and loss; by default 'mlp'.", choices=["mlp", "linear", "none"]
    )
    projection_dim: int | None = option(None, "Numbers that the loss sees of each view; by default 128.")
    freeze_backbone: bool = option(False, "Train the head alone.")


class Pixels(NamedTuple):
    """How a model wants its images."""

    size: int  # per side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    processor: Any  # to save with the model; timm has none


def small_vit(image_size: int) -> ViTModel:
    """A ViT of 0.2 M parameters that sees an image as 16 patches."""
    config = ViTConfig(
        image_size=image_size,
        patch_size=image_size // 4,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
    )
    return ViTModel(config, add_pooling_layer=False)


def pixels_of(model: str | None, image_size: int | None) -> Pixels:
    """What the model was made for, but for a size that is asked for."""
    if model is not None and model.startswith(TIMM):
        config = timm.get_pretrained_cfg(model.removeprefix(TIMM))
        if config is None:
            raise ValueError(f"expected timm/ and a name of timm.list_models(), got {model!r}: correct it")
        return Pixels(image_size or config.input_size[-1], config.mean, config.std, None)
    if model is None:
        side = image_size or BUILT_IN_SIZE
        processor = ViTImageProcessor(size={"height": side, "width": side})
    else:
        processor = AutoImageProcessor.from_pretrained(model)
    box = processor.crop_size if processor.do_center_crop else processor.size
    size = image_size or box.height or box.shortest_edge
    return Pixels(size, processor.image_mean, processor.image_std, processor)


def fresh_backbone(model: str | None, image_size: int) -> nn.Module:
    """A model with new weights."""
    if model is None:
        return small_vit(image_size)
    if model.startswith(TIMM):
        return timm.create_model(model.removeprefix(TIMM), num_classes=0)
    return AutoModel.from_config(AutoConfig.from_pretrained(model))


def load_encoder(args: ModelArguments, pixels: Pixels, exits: Sequence[str]) -> VisionEncoder:
    """The model behind its head, or heads; `exits` are those of the built-in model."""
    built_in = args.model is None
    asked = {
        "pooling": args.pooling or ("mean" if built_in else None),
        "head": args.head,
        "projection_dim": args.projection_dim,
        "exits": args.exits or (exits if built_in else None),
    }
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    options |= {"image_mean": pixels.mean, "image_std": pixels.std, "freeze_backbone": args.freeze_backbone}
    if args.model is None or args.from_scratch:
        encoder = VisionEncoder(fresh_backbone(args.model, pixels.size), **options)
    else:
        encoder = VisionEncoder.from_pretrained(args.model, **options)
    return encoder
