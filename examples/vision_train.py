"""Train or fine-tune a vision model at any batch size, by any of the methods in `vision_recipes.py`.

    accelerate launch examples/vision_train.py                 # the built-in handwritten digits, without labels
    accelerate launch examples/vision_train.py --loss supcon   # with labels
    accelerate launch examples/vision_train.py --loss byol     # without negatives
    accelerate launch examples/vision_train.py config.yaml     # all arguments from one YAML or JSON file
    accelerate launch examples/vision_train.py --plan          # memory and FLOPs of a step, and stop
    accelerate launch examples/vision_train.py \\
        --model facebook/dinov2-small --dataset path/or/hub-name --loss supcon \\
        --per_device_train_batch_size 4096 --chunk_size 64 --bf16

Evaluated are clean images, if they have labels: nearest neighbours and a linear probe on the backbone's features,
on the projections that the loss sees, and on raw pixels, which is what a model has to beat.

Written to the output folder: the backbone in its own format with its head beside it, checkpoints and the
trainer's state, the metrics (all_results.json), training_curve.png, and embedding_map.png: the test images in
two dimensions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2
from transformers import set_seed
from vision_models import ModelArguments, load_encoder, pixels_of
from vision_probes import Judge, table, with_few_labels
from vision_recipes import RECIPES, LossArguments, Recipe, make_loss

from gc_accel import CachedContrastiveArguments, CachedContrastiveTrainer
from gc_accel.data import (
    HandwrittenDigits,
    ImageTextDataset,
    MultiViewDataset,
    ViewsCollator,
    handwriting_transform,
)
from gc_accel.data.sources.image_text import HFDataset, features_of
from gc_accel.data.transforms import MultiView
from gc_accel.pictures import embedding_map, training_curve
from gc_accel.programs.command_line import option, parse, run
from gc_accel.programs.planning import PlanArguments, print_plan
from gc_accel.programs.splits import SplitArguments, check_streaming, load_splits

BUILT_IN = "digits"
FROM_SCRATCH, FINE_TUNING = 2e-3, 3e-5  # peak learning rates
MAP_SIZE = 2000  # images on the map


@dataclass
class DataArguments(SplitArguments):
    """Which data, and which columns of it."""

    dataset: str = option(
        BUILT_IN,
        "'digits' (built in), a folder of images, with one subfolder per class if they have labels, or of webdataset "
        "shards, a csv, jsonl, parquet or tar file (or several: 'shards/*.tar'), or a data set of the hub.",
    )
    label_column: str | None = option(None, "Column of classes; by default 'label', if there is one.")
    split_seed: int = option(0, "Which images are held out, of the built-in ones too.")
    image_size: int | None = option(
        None, "Pixels per side of a view; by default what the model was made for."
    )


@dataclass
class ViewArguments:
    """Random views: by default those of the loss's paper, and bent handwriting for the built-in scans."""

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
    chunk_size: str = option(
        "64", "Images whose views the encoder sees at once, or 'auto'. Memory and speed, never the result."
    )
    num_train_epochs: float = option(40.0, "Epochs.")
    learning_rate: float | None = option(
        None, "Peak; by default 3e-5 to fine-tune a model, 2e-3 from scratch or for the head alone."
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


def with_integer_labels(
    rows: list[HFDataset], column: str | None, features: datasets.Features
) -> list[HFDataset]:
    """Classes that are words as numbers, the same in every split; a stream would have to be read for them."""
    streamed = isinstance(rows[0], datasets.IterableDataset)
    if streamed or column not in features or features[column].dtype != "string":
        return rows
    names = {name for part in rows for name in part[column]}
    return [part.cast_column(column, datasets.ClassLabel(names=sorted(names))) for part in rows]


def load_data(args: DataArguments, image_size: int, loss: str) -> tuple[Dataset, Dataset]:
    """Training and evaluation images, with labels where the data has some.

    Raises:
        ValueError: the loss needs labels and there are none.
    """
    if args.dataset == BUILT_IN:
        options: dict[str, Any] = {"seed": args.split_seed, "image_size": image_size}
        return HandwrittenDigits("train", **options), HandwrittenDigits("test", **options)
    rows = list(load_splits(args))
    columns = features_of(rows[0])
    label_column = args.label_column or ("label" if "label" in columns else None)
    if RECIPES[loss].needs_labels and label_column is None:
        raise ValueError(
            f"expected labels for --loss {loss}, got a data set with {list(columns)}: name a --label_column, sort the "
            "images into one subfolder per class, or train with --loss simclr"
        )
    options = {
        "image_column": args.image_column,
        "caption_column": None,
        "label_column": label_column,
        "on_bad_image": args.on_bad_image,
    }
    parts = with_integer_labels(rows, label_column, columns)
    train, test = (ImageTextDataset(part, **options) for part in parts)
    return train, test


def draw_views(args: ViewArguments, recipe: Recipe, image_size: int, built_in: bool) -> MultiView:
    """The transform from an image to its views."""
    crop_scale = None if args.min_crop is None else (args.min_crop, 1.0)
    names = ("jitter", "flip", "grayscale", "blur")
    options = {"crop_scale": crop_scale} | {name: getattr(args, name) for name in names}
    asked = {name: value for name, value in options.items() if value is not None}
    transform = handwriting_transform if built_in and not asked else recipe.transform
    return transform(image_size, views=args.views or recipe.views, **asked)


def clean(images: Dataset, image_size: int) -> MultiViewDataset:
    """Whole images as their only view."""
    view = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
    return MultiViewDataset(images, MultiView([view]))


def some(images: Any, count: int, seed: int) -> Dataset:
    """At most so many of a data set, drawn at random, as it may be sorted by class; those of a stream in memory."""
    if isinstance(images, ImageTextDataset) and images.stream is not None:
        return images.take(count, seed=seed)
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


def train(
    trainer: CachedContrastiveTrainer, judge: Judge, args: ProbeArguments, finetuned_from: str | None
) -> None:
    """Train, evaluate, write."""
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)

    output = Path(trainer.args.output_dir)
    scores = evaluate(trainer, judge, args, output)
    trainer.log_metrics("eval", scores)
    trainer.save_metrics("eval", scores)
    if trainer.is_world_process_zero():
        training_curve(trainer.state.log_history, output / "training_curve.png")
        trainer.create_model_card(
            finetuned_from=finetuned_from,
            tasks="image-feature-extraction",
            tags=["gc-accel", "contrastive-learning"],
        )
        print(table(scores))
        print(f"Written to {output}: the model, all_results.json, training_curve.png, embedding_map.png")


def main() -> None:
    """Build, train, evaluate, write; or plan."""
    kinds: Any = (ModelArguments, LossArguments, DataArguments, ViewArguments, ProbeArguments)
    model_args, loss_args, data_args, view_args, probe_args, plan_args, args = parse(
        *kinds, PlanArguments, TrainArguments
    )
    check_streaming(data_args, args.max_steps, built_in=BUILT_IN)
    recipe = RECIPES[loss_args.loss]
    if args.learning_rate is None:
        new = model_args.model is None or model_args.from_scratch or model_args.freeze_backbone
        args.learning_rate = FROM_SCRATCH if new else FINE_TUNING
    set_seed(args.seed)
    pixels = pixels_of(model_args.model, data_args.image_size)
    encoder = load_encoder(model_args, pixels, recipe.exits, recipe.encoder)
    if recipe.exits and len(encoder.heads) == 1:
        raise ValueError(
            f"expected exits for --loss {loss_args.loss}, got none: name blocks of the model by --exits"
        )
    with args.main_process_first(desc="loading data"):
        train_set, test_set = load_data(data_args, pixels.size, loss_args.loss)
    known = some(train_set, probe_args.probe_size, args.seed)
    judge = Judge(clean(known, pixels.size), clean(test_set, pixels.size))
    transform = draw_views(view_args, recipe, pixels.size, data_args.dataset == BUILT_IN)

    trainer = CachedContrastiveTrainer(
        encoder,
        args,
        loss=make_loss(loss_args, encoder),
        train_dataset=MultiViewDataset(train_set, transform, seed=args.data_seed or args.seed),
        eval_dataset=MultiViewDataset(test_set, transform),
        processing_class=pixels.processor,
        data_collator=ViewsCollator(),
        compute_metrics=lambda _reps: judge.scores(trainer),
    )
    if plan_args.plan:
        print_plan(trainer)
    else:
        train(trainer, judge, probe_args, None if model_args.from_scratch else model_args.model)


if __name__ == "__main__":
    run(main)
