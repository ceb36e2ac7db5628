"""Train or fine-tune a vision model at any batch size, with SimCLR, SupCon or SelfCon.

    accelerate launch examples/vision_train.py                 # the built-in handwritten digits, without labels
    accelerate launch examples/vision_train.py --loss supcon   # with labels
    accelerate launch examples/vision_train.py config.yaml     # all arguments from one YAML or JSON file
    accelerate launch examples/vision_train.py \\
        --model facebook/dinov2-small --dataset path/or/hub-name --loss supcon \\
        --per_device_train_batch_size 4096 --chunk_size 64 --bf16

Evaluated are clean images, if they have labels: nearest neighbours and a linear probe on the backbone's features,
on the projections that the loss sees, and on raw pixels, which is what a model has to beat.

Written to the output folder: the backbone in its own format with its head beside it, checkpoints and the
trainer's state, the metrics (all_results.json), training_curve.png, and embedding_map.png: the test images in
two dimensions.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import timm
import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    HfArgumentParser,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    set_seed,
)
from vision_probes import Judge, table, with_few_labels

from gc_accel import CachedContrastiveArguments, CachedContrastiveTrainer, VisionEncoder
from gc_accel.data import (
    HandwrittenDigits,
    ImageTextDataset,
    MultiViewDataset,
    ViewsCollator,
    load_image_text,
    simclr_transform,
    supcon_transform,
)
from gc_accel.data.transforms import MultiView
from gc_accel.losses import LOSSES
from gc_accel.pictures import embedding_map, training_curve

BUILT_IN, BUILT_IN_SIZE = "digits", 16
TIMM = "timm/"
NO_CAPTION = "no caption"
FROM_SCRATCH, FINE_TUNING = 1e-3, 3e-5  # peak learning rates
MAP_SIZE = 2000  # images on the map


class Recipe(NamedTuple):
    """What goes with a loss."""

    transform: Callable[..., MultiView]
    views: int
    needs_labels: bool = False
    exits: tuple[str, ...] = ()  # of the built-in model


class Pixels(NamedTuple):
    """How a model wants its images."""

    size: int  # per side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    processor: Any  # to save with the model; timm has none


RECIPES = {  # by the names of gc_accel.losses.LOSSES
    "simclr": Recipe(simclr_transform, views=2),
    "supcon": Recipe(supcon_transform, views=2, needs_labels=True),
    "selfcon": Recipe(supcon_transform, views=1, needs_labels=True, exits=("layers.1",)),
}
# A scan of a digit has no colours, and a mirrored or tightly cropped one is another digit.
GENTLE = {"crop_scale": (0.7, 1.0), "jitter": 0.0, "flip": 0.0, "grayscale": 0.0, "blur": 0.0}


def option(default: Any, text: str, **extra: Any) -> Any:
    """A field of an argument dataclass with its help."""
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class ModelArguments:
    """Which model, what of it trains, and for which loss."""

    model: str | None = option(
        None,
        "Vision model of transformers (hub name or folder, one of this example's included) or 'timm/<name>'. By "
        "default a small ViT, from scratch, for the built-in data.",
    )
    from_scratch: bool = option(False, "Take the architecture of the model alone.")
    loss: str = option("simclr", "The loss.", choices=list(RECIPES))
    temperature: float = option(0.1, "Of the loss.")
    exits: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules of the model whose outputs, pooled, are views too: what SelfCon contrasts."
        },
    )
    pooling: str | None = option(
        None, "From tokens to features; by default the model's own.", choices=["cls", "mean", "pooler"]
    )
    head: str | None = option(
        None, "Between features and loss; by default 'mlp'.", choices=["mlp", "linear", "none"]
    )
    projection_dim: int | None = option(None, "Numbers that the loss sees of each view; by default 128.")
    freeze_backbone: bool = option(False, "Train the head alone.")
    freeze_batch_norm: bool = option(False, "Keep BatchNorm as it is, which a model that has it needs.")


@dataclass
class DataArguments:
    """Which data, and which columns of it."""

    dataset: str = option(
        BUILT_IN,
        "'digits' (built in), a folder of images, with one subfolder per class if they have labels, a csv, jsonl or "
        "parquet file, or a data set of the hub.",
    )
    dataset_config: str | None = option(None, "Configuration, for a data set that has several.")
    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option(
        None, "Split to evaluate on; by default part of the training split is held out."
    )
    eval_size: int = option(1000, "Images to evaluate on.")
    image_column: str = option("image", "Column with images, their bytes or their paths.")
    label_column: str | None = option(None, "Column of classes; by default 'label', if there is one.")
    on_bad_image: str = option("error", "What to do with unreadable images.", choices=["error", "skip"])
    split_seed: int = option(0, "Which images are held out, of the built-in ones too.")
    image_size: int | None = option(
        None, "Pixels per side of a view; by default what the model was made for."
    )


@dataclass
class ViewArguments:
    """Random views, by default those of the loss's paper, and gentle ones for the built-in scans."""

    views: int | None = option(None, "Views of each image; by default 2, and 1 for SelfCon.")
    min_crop: float | None = option(None, "Smallest part of an image's area in a view.")
    jitter: float | None = option(None, "Strength of the colour jitter.")
    flip: float | None = option(None, "Probability of a horizontal flip.")
    grayscale: float | None = option(None, "Probability of losing the colours.")
    blur: float | None = option(None, "Probability of a Gaussian blur.")


@dataclass
class ProbeArguments:
    """How features are judged by labels."""

    probe_size: int = option(10_000, "Training images, at most, that neighbours and probe know.")
    probe_labels_per_class: int | None = option(
        None,
        "Compare also, at the end, probes of features and raw pixels that know so many labels per class.",
    )
    probe_draws: int = option(5, "Draws of those labels.")


@dataclass
class TrainArguments(CachedContrastiveArguments):
    """The trainer's arguments, with defaults for the built-in data: minutes on two cores."""

    output_dir: str = option("outputs/vision", "Folder for everything that is written.")
    per_device_train_batch_size: int = option(128, "Contrastive batch of one device, in images.")
    per_device_eval_batch_size: int = option(256, "Images encoded at once in evaluation.")
    chunk_size: int = option(
        64, "Images whose views the encoder sees at once. Memory and speed, never the result."
    )
    num_train_epochs: float = option(100.0, "Epochs.")
    learning_rate: float | None = option(
        None, "Peak; by default 3e-5 to fine-tune a model, 1e-3 from scratch or for the head alone."
    )
    weight_decay: float = option(0.05, "Of matrices; biases and norms have none.")
    lr_scheduler_type: str = option("cosine", "Schedule after the warm-up.")
    warmup_steps: float = option(0.1, "Steps of warm-up, or a fraction of all steps.")
    eval_strategy: str = option("steps", "When to evaluate: 'no', 'steps' or 'epoch'.")
    eval_steps: float = option(0.1, "Steps between evaluations, or a fraction of all steps.")
    save_strategy: str = option("steps", "When to write a checkpoint: 'no', 'steps', 'epoch' or 'best'.")
    save_steps: float = option(0.1, "Steps between checkpoints, or a fraction of all steps.")
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    report_to: str = option("none", "Tracker: 'tensorboard', 'wandb', ... or 'none'.")


Arguments = tuple[ModelArguments, DataArguments, ViewArguments, ProbeArguments, TrainArguments]


def parse() -> Arguments:
    """Arguments from the command line, or from one YAML or JSON file."""
    parser = HfArgumentParser((ModelArguments, DataArguments, ViewArguments, ProbeArguments, TrainArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


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


def load_encoder(args: ModelArguments, pixels: Pixels) -> VisionEncoder:
    """The model behind its head."""
    built_in = args.model is None
    asked = {
        "pooling": args.pooling or ("mean" if built_in else None),
        "head": args.head,
        "projection_dim": args.projection_dim,
        "exits": args.exits or (RECIPES[args.loss].exits if built_in else None),
    }
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    options |= {"image_mean": pixels.mean, "image_std": pixels.std, "freeze_backbone": args.freeze_backbone}
    if args.model is None or args.from_scratch:
        encoder = VisionEncoder(fresh_backbone(args.model, pixels.size), **options)
    else:
        encoder = VisionEncoder.from_pretrained(args.model, **options)
    if RECIPES[args.loss].exits and len(encoder.heads) == 1:
        raise ValueError(
            f"expected exits for --loss {args.loss}, got none: name blocks of the model by --exits"
        )
    for module in encoder.modules():
        if args.freeze_batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)  # which leaves it in eval mode, too
    return encoder


def load_rows(args: DataArguments) -> dict[str, datasets.Dataset]:
    """Training and evaluation rows of a data set that is not built in."""
    options: dict[str, Any] = {"name": args.dataset_config, "image_column": args.image_column}
    rows = load_image_text(args.dataset, args.train_split, **options)
    if args.eval_split is not None:
        held_out = load_image_text(args.dataset, args.eval_split, **options).shuffle(args.split_seed)
        return {"train": rows, "test": held_out.select(range(min(args.eval_size, len(held_out))))}
    if args.eval_size >= len(rows):
        raise ValueError(
            f"expected more than eval_size = {args.eval_size} rows in split {args.train_split!r}, got {len(rows)}: "
            "lower eval_size, or name an eval_split"
        )
    return rows.train_test_split(test_size=args.eval_size, seed=args.split_seed)


def with_integer_labels(rows: dict[str, datasets.Dataset], column: str | None) -> dict[str, datasets.Dataset]:
    """Classes that are words as numbers, the same in every split."""
    if column not in rows["train"].column_names or rows["train"].features[column].dtype != "string":
        return rows
    names = {name for part in rows.values() for name in part[column]}
    return {
        split: part.cast_column(column, datasets.ClassLabel(names=sorted(names)))
        for split, part in rows.items()
    }


def load_data(args: DataArguments, image_size: int, loss: str) -> tuple[Dataset, Dataset]:
    """Training and evaluation images, with labels where the data has some.

    Raises:
        ValueError: the loss needs labels and there are none.
    """
    if args.dataset == BUILT_IN:
        options: dict[str, Any] = {"seed": args.split_seed, "image_size": image_size}
        return HandwrittenDigits("train", **options), HandwrittenDigits("test", **options)
    rows = load_rows(args)
    columns = rows["train"].column_names
    label_column = args.label_column or ("label" if "label" in columns else None)
    if RECIPES[loss].needs_labels and label_column is None:
        raise ValueError(
            f"expected labels for --loss {loss}, got a data set with {columns}: name a --label_column, sort the "
            "images into one subfolder per class, or train with --loss simclr"
        )
    rows = with_integer_labels(rows, label_column)
    options = {
        "image_column": args.image_column,
        "caption_column": NO_CAPTION,
        "label_column": label_column,
        "on_bad_image": args.on_bad_image,
    }
    without = {split: part.add_column(NO_CAPTION, [""] * len(part)) for split, part in rows.items()}
    return ImageTextDataset(without["train"], **options), ImageTextDataset(without["test"], **options)


def draw_views(args: ViewArguments, loss: str, image_size: int, built_in: bool) -> MultiView:
    """The transform from an image to its views."""
    recipe = RECIPES[loss]
    crop_scale = None if args.min_crop is None else (args.min_crop, 1.0)
    names = ("jitter", "flip", "grayscale", "blur")
    asked = {"crop_scale": crop_scale} | {name: getattr(args, name) for name in names}
    strengths = (GENTLE if built_in else {}) | {k: v for k, v in asked.items() if v is not None}
    return recipe.transform(image_size, views=args.views or recipe.views, **strengths)


def clean(images: Dataset, image_size: int) -> MultiViewDataset:
    """Whole images as their only view."""
    view = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
    return MultiViewDataset(images, MultiView([view]))


def some(images: Any, count: int, seed: int) -> Dataset:
    """At most so many of a data set, drawn at random, as it may be sorted by class."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return images if count >= len(images) else Subset(images, chosen.tolist())


def evaluate(
    trainer: CachedContrastiveTrainer, judge: Judge, args: ProbeArguments, output: Path
) -> dict[str, float]:
    """The final scores, and a map of the test images."""
    scores = trainer.evaluate()
    train, test = judge.features(trainer)
    if "labels" in test and args.probe_labels_per_class is not None:
        few = with_few_labels(train, test, args.probe_labels_per_class, args.probe_draws)
        scores |= {f"eval_{name}": value for name, value in few.items()}
    if trainer.is_world_process_zero():
        features = test["backbone"][:MAP_SIZE].cpu()
        labels = test.get("labels", torch.zeros(len(features), dtype=torch.long))[:MAP_SIZE].cpu()
        title = "Test images by the features of the backbone"
        embedding_map(features, labels, output / "embedding_map.png", title=title)
    return scores


def main() -> None:
    """Build, train, evaluate, write."""
    model_args, data_args, view_args, probe_args, args = parse()
    if args.learning_rate is None:
        new = model_args.model is None or model_args.from_scratch or model_args.freeze_backbone
        args.learning_rate = FROM_SCRATCH if new else FINE_TUNING
    set_seed(args.seed)
    pixels = pixels_of(model_args.model, data_args.image_size)
    encoder = load_encoder(model_args, pixels)
    with args.main_process_first(desc="loading data"):
        train_set, test_set = load_data(data_args, pixels.size, model_args.loss)
    known = some(train_set, probe_args.probe_size, args.seed)
    judge = Judge(clean(known, pixels.size), clean(test_set, pixels.size))
    transform = draw_views(view_args, model_args.loss, pixels.size, data_args.dataset == BUILT_IN)

    trainer = CachedContrastiveTrainer(
        encoder,
        args,
        loss=LOSSES[model_args.loss](model_args.temperature),
        train_dataset=MultiViewDataset(train_set, transform, seed=args.data_seed or args.seed),
        eval_dataset=MultiViewDataset(test_set, transform),
        processing_class=pixels.processor,
        data_collator=ViewsCollator(),
        compute_metrics=lambda _reps: judge.scores(trainer),
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)

    output = Path(args.output_dir)
    scores = evaluate(trainer, judge, probe_args, output)
    trainer.log_metrics("eval", scores)
    trainer.save_metrics("eval", scores)
    if trainer.is_world_process_zero():
        training_curve(trainer.state.log_history, output / "training_curve.png")
        trainer.create_model_card(
            finetuned_from=None if model_args.from_scratch else model_args.model,
            tasks="image-feature-extraction",
            tags=["gc-accel", "contrastive-learning"],
        )
        print(table(scores))
        print(f"Written to {output}: the model, all_results.json, training_curve.png, embedding_map.png")


if __name__ == "__main__":
    main()
