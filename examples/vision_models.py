"""The models that `vision_train.py` trains: of transformers or timm, or a small CNN, behind a projection head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, ViTImageProcessor

from gc_accel import VisionEncoder
from gc_accel.programs.command_line import option

BUILT_IN_SIZE = 16  # pixels per side
TIMM = "timm/"


@dataclass
class ModelArguments:
    """Which model, and what of it trains."""

    model: str | None = option(
        None,
        "Vision model of transformers (hub name or folder, one of this example's included) or 'timm/<name>'. By "
        "default five convolutions, from scratch, for the built-in data.",
    )
    from_scratch: bool = option(False, "Take the architecture of the model alone.")
    exits: list[str] | None = option(
        None, "Modules of the model whose outputs, pooled, are views too: what SelfCon contrasts."
    )
    pooling: str | None = option(
        None, "From tokens to features; by default the model's own.", choices=["cls", "mean", "pooler"]
    )
    head: str | None = option(
        None,
        "Between features and loss; by default the recipe's.",
        choices=["mlp", "norm_mlp", "linear", "none"],
    )
    predictor: int | None = option(None, "Hidden width of the predictor of NNCLR, MoCo v3, BYOL and SimSiam.")
    prototypes: int | None = option(None, "How many SwAV has.")
    projection_dim: int | None = option(None, "Numbers that the loss sees of each view; by default 128.")
    freeze_backbone: bool = option(False, "Train the head alone.")


class Pixels(NamedTuple):
    """How a model wants its images."""

    size: int  # per side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    processor: Any  # to save with the model; timm has none


def small_cnn(width: int = 32) -> nn.Sequential:
    """Five convolutions, 0.2 M parameters: with a thousand scans, they learn what a ViT would need many more for.

    GroupNorm, as it does not see how images are grouped.
    """
    widths, strides = [3, width, width, 2 * width, 2 * width, 4 * width], [1, 2, 1, 2, 1]
    blocks = [
        nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(8, after), nn.ReLU())
        for before, after, stride in zip(widths, widths[1:], strides, strict=False)
    ]
    return nn.Sequential(*blocks)


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


def fresh_backbone(model: str | None) -> nn.Module:
    """A model with new weights."""
    if model is None:
        return small_cnn()
    if model.startswith(TIMM):
        return timm.create_model(model.removeprefix(TIMM), num_classes=0)
    return AutoModel.from_config(AutoConfig.from_pretrained(model))


def load_encoder(
    args: ModelArguments, pixels: Pixels, exits: Sequence[str], wanted: Mapping[str, Any]
) -> VisionEncoder:
    """The model behind its heads; `exits` are those of the built-in model, `wanted` the options of a recipe.

    Raises:
        ValueError: a predictor or prototypes are asked for, and the recipe has none.
    """
    built_in = args.model is None
    for name in ("predictor", "prototypes"):
        if getattr(args, name) is not None and name not in wanted:
            raise ValueError(
                f"expected no --{name} for a --loss that has none, got {getattr(args, name)}: leave it out"
            )
    # Said outright, because the folder of a run by another method brings options of its own.
    unless_wanted = {"predictor": None, "prototypes": None, "normalize": True} | (
        {} if exits else {"exits": ()}
    )
    asked = {
        "pooling": args.pooling,
        "head": args.head,
        "projection_dim": args.projection_dim,
        "predictor": args.predictor,
        "prototypes": args.prototypes,
        "exits": args.exits or (exits if built_in else None),
    }
    options: dict[str, Any] = unless_wanted | dict(wanted)
    options |= {name: value for name, value in asked.items() if value is not None}
    options |= {"image_mean": pixels.mean, "image_std": pixels.std, "freeze_backbone": args.freeze_backbone}
    if args.model is None or args.from_scratch:
        encoder = VisionEncoder(fresh_backbone(args.model), **options)
    else:
        encoder = VisionEncoder.from_pretrained(args.model, **options)
    return encoder
