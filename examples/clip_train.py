"""Train or fine-tune an image-text model at any batch size.

    accelerate launch examples/clip_train.py                 # the built-in handwritten numbers, from scratch
    accelerate launch examples/clip_train.py config.yaml     # all arguments from one YAML or JSON file
    accelerate launch examples/clip_train.py --plan          # memory, FLOPs and communication of a step, and stop
    accelerate launch examples/clip_train.py \\
        --model openai/clip-vit-base-patch32 --dataset path/or/hub-name \\
        --per_device_train_batch_size 4096 --chunk_size 64 --bf16

Written to the output folder: the model in its own format, checkpoints and the trainer's state, the metrics
(all_results.json), training_curve.png, and retrieval_sheet.png: test images with the captions found for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import open_clip
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModel, AutoProcessor, CLIPModel, set_seed

from gc_accel import CachedContrastiveArguments, CachedContrastiveTrainer, DualEncoder
from gc_accel.data import (
    HandwrittenNumbers,
    ImageTextCollator,
    ImageTextDataset,
    OpenClipCollator,
    all_captions,
    image_statistics,
    numbers_config,
    numbers_processor,
)
from gc_accel.evaluation import zero_shot_accuracy, zero_shot_classifier
from gc_accel.pictures import retrieval_sheet, training_curve
from gc_accel.programs.command_line import option, parse, run
from gc_accel.programs.cores import use_all_cores
from gc_accel.programs.planning import PlanArguments, print_plan
from gc_accel.programs.splits import SplitArguments, check_streaming, load_splits
from gc_accel.training import retrieval_of_pairs

BUILT_IN = "numbers"
OPEN_CLIP = "open_clip:"
FROM_SCRATCH, FINE_TUNING = 4e-3, 1e-5  # peak learning rates


@dataclass
class ModelArguments:
    """Which model, and what of it trains."""

    model: str | None = option(
        None,
        "CLIP, SigLIP or VisionTextDualEncoder: hub name or folder; or 'open_clip:ViT-B-32' for open_clip's. By "
        "default a CLIP of two small layers per tower, from scratch, for the built-in data.",
    )
    pretrained: str | None = option(None, "Weights of an open_clip model: a tag of its list, or a file.")
    freeze: str | None = option(None, "Tower that does not train.", choices=["image", "text"])
    loss: str | None = option(None, "'clip' or 'siglip'; by default the one that the model was made for.")


@dataclass
class DataArguments(SplitArguments):
    """Which data, and which columns of it."""

    dataset: str = option(
        BUILT_IN,
        "'numbers' (built in), a folder of images with metadata.csv or metadata.jsonl or of webdataset shards, a csv, "
        "jsonl, parquet or tar file (or several: 'shards/*.tar'), or a data set of the hub.",
    )
    caption_column: str = option("text", "Column with captions, or with lists of which each epoch draws one.")
    label_column: str | None = option(None, "Column of integers: equal ones are positives of one another.")
    zero_shot_folder: str | None = option(
        None, "Folder with one subfolder of images per class, to be classified by 'a photo of a <class>.'"
    )
    train_size: int = option(60_000, "Images of the built-in training set.")
    digits: int = option(4, "Digits of the built-in numbers.", choices=[3, 4])


@dataclass
class TrainArguments(CachedContrastiveArguments):
    """The trainer's arguments, with defaults for the built-in data: about six minutes on two cores."""

    output_dir: str = option("outputs/clip", "Folder for everything that is written.")
    per_device_train_batch_size: int = option(1024, "Contrastive batch of one device.")
    per_device_eval_batch_size: int = option(250, "Samples encoded at once in evaluation.")
    chunk_size: str = option(
        "128", "Samples that the encoder sees at once, or 'auto'. Memory and speed, never the result."
    )
    num_train_epochs: float = option(6.0, "Epochs.")
    learning_rate: float | None = option(
        None, "Peak; by default 1e-5 to fine-tune a model, 4e-3 from scratch."
    )
    weight_decay: float = option(0.1, "Of matrices; scales, biases and norms have none.")
    adam_beta2: float = option(0.98, "Of AdamW; 0.98 suits large batches.")
    lr_scheduler_type: str = option("cosine", "Schedule after the warm-up.")
    warmup_steps: float = option(0.15, "Steps of warm-up, or a fraction of all steps.")
    eval_strategy: str = option("epoch", "When to evaluate: 'no', 'steps' or 'epoch'.")
    save_strategy: str = option("epoch", "When to write a checkpoint: 'no', 'steps', 'epoch' or 'best'.")
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    report_to: str = option("none", "Tracker: 'tensorboard', 'wandb', ... or 'none'.")


def load_model(args: ModelArguments) -> tuple[DualEncoder, Any, Any]:
    """The encoder, the collator that feeds it, and the processor to save with it (open_clip has none)."""
    freeze: Any = () if args.freeze is None else (args.freeze,)
    if args.model is not None and args.model.startswith(OPEN_CLIP):
        name = args.model.removeprefix(OPEN_CLIP)
        model = open_clip.create_model(name, pretrained=args.pretrained)
        pixels = model.visual.preprocess_cfg
        collator = OpenClipCollator(pixels, open_clip.get_tokenizer(name))
        config = open_clip.get_model_config(name)
        statistics = {"image_mean": pixels["mean"], "image_std": pixels["std"]}
        return DualEncoder(model, **statistics, freeze=freeze, model_config=config), collator, None
    if args.model is None:
        processor, model = numbers_processor(), CLIPModel(numbers_config())
    else:
        processor, model = AutoProcessor.from_pretrained(args.model), AutoModel.from_pretrained(args.model)
    mean, std = image_statistics(processor)
    encoder = DualEncoder(model, image_mean=mean, image_std=std, freeze=freeze)
    return encoder, ImageTextCollator(processor), processor


def load_data(args: DataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and evaluation set."""
    if args.dataset == BUILT_IN:
        sizes: dict[Any, int] = {"train": args.train_size, "test": args.eval_size}
        train, test = (HandwrittenNumbers(s, size=n, digits=args.digits, seed=seed) for s, n in sizes.items())
        return train, test
    rows, held_out = load_splits(args)
    columns: dict[str, Any] = {
        "image_column": args.image_column,
        "caption_column": args.caption_column,
        "label_column": args.label_column,
        "on_bad_image": args.on_bad_image,
        "seed": seed,
    }
    return ImageTextDataset(rows, **columns), ImageTextDataset(held_out, **columns)


def text_encoder(trainer: CachedContrastiveTrainer) -> Callable[[list[str]], Tensor]:
    """A function from texts to their embeddings `(N, D)`, by the model in training."""

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        chunks = [trainer.data_collator.tokenize(texts[i : i + 250]) for i in range(0, len(texts), 250)]
        trainer.model.eval()
        parts = [trainer.model(text=send_to_device(chunk, trainer.args.device))["text"] for chunk in chunks]
        return torch.cat(parts).float()

    return encode


def classify_folder(trainer: CachedContrastiveTrainer, folder: str) -> dict[str, float]:
    """Zero-shot accuracy on a folder of images with one subfolder per class."""
    rows = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
    names = rows.features["label"].names
    rows = rows.add_column("text", [names[label] for label in rows["label"]])
    reps = trainer.encode(ImageTextDataset(rows, label_column="label"))
    classes = zero_shot_classifier(text_encoder(trainer), [name.replace("_", " ") for name in names])
    return zero_shot_accuracy(reps["image"], classes, reps["labels"])


def draw_sheet(trainer: CachedContrastiveTrainer, eval_set: Any, path: Path, images: int = 12) -> None:
    """A picture of test images with the three captions that each retrieved."""
    reps = trainer.encode(eval_set)
    samples = [sample for sample in (eval_set[i] for i in range(len(eval_set))) if sample is not None]
    captions = [sample["text"] for sample in samples]
    best = (reps["image"][:images] @ reps["text"].T).topk(min(3, len(captions))).indices.tolist()
    pixels = list(trainer.data_collator(samples[:images])["pixel_values"])
    retrieved = [[captions[index] for index in row] for row in best]
    title = f"Captions retrieved among {len(captions):,} for test images"
    if trainer.is_world_process_zero():
        retrieval_sheet(pixels, captions[:images], retrieved, path, title=title)


def train(trainer: CachedContrastiveTrainer, eval_set: Any, zero_shot_folder: str | None) -> None:
    """Train, evaluate, write."""
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)

    scores = trainer.evaluate()
    if zero_shot_folder is not None:
        folder_scores = classify_folder(trainer, zero_shot_folder)
        scores |= {f"eval_folder_{name}": value for name, value in folder_scores.items()}
    trainer.log_metrics("eval", scores)
    trainer.save_metrics("eval", scores)
    output = Path(trainer.args.output_dir)
    draw_sheet(trainer, eval_set, output / "retrieval_sheet.png")
    if trainer.is_world_process_zero():
        training_curve(trainer.state.log_history, output / "training_curve.png")
        trainer.create_model_card(
            tasks="zero-shot-image-classification", tags=["gc-accel", "contrastive-learning"]
        )
        print(f"Written to {output}: the model, all_results.json, training_curve.png, retrieval_sheet.png")


def main() -> None:
    """Build, train, evaluate, write; or plan."""
    kinds = (ModelArguments, DataArguments, PlanArguments, TrainArguments)
    model_args, data_args, plan_args, args = parse(*kinds)
    check_streaming(data_args, args.max_steps, built_in=BUILT_IN)
    if args.learning_rate is None:
        args.learning_rate = FROM_SCRATCH if model_args.model is None else FINE_TUNING
    use_all_cores()
    set_seed(args.seed)
    encoder, collator, processor = load_model(model_args)
    with args.main_process_first(desc="loading data"):
        train_set, eval_set = load_data(data_args, args.data_seed or 0)

    def metrics(reps: dict[str, Tensor]) -> dict[str, float]:
        scores = retrieval_of_pairs(reps)
        if data_args.dataset == BUILT_IN:  # zero-shot: which of all the numbers is it?
            numbers, captions = all_captions(data_args.digits)
            classes = text_encoder(trainer)(captions)
            scores |= zero_shot_accuracy(reps["image"], classes, reps["labels"] - numbers[0])
        return scores

    trainer = CachedContrastiveTrainer(
        encoder,
        args,
        loss=model_args.loss,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=processor,
        data_collator=collator,
        compute_metrics=metrics,
    )
    if plan_args.plan:
        print_plan(trainer)
    else:
        train(trainer, eval_set, data_args.zero_shot_folder)


if __name__ == "__main__":
    run(main)
