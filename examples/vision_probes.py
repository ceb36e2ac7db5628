"""How good the features of `vision_train.py` are, beside raw pixels: what a model has to beat.

Judged are features of clean images: nearest neighbours and a linear probe on what the backbone gives, on the
projections that the loss sees, and on the pixels themselves.

Shape letters: N images, F features.
"""

from collections import defaultdict
from collections.abc import Callable
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gc_accel import CachedContrastiveTrainer
from gc_accel.data import ViewsCollator
from gc_accel.distributed import RankedBatch
from gc_accel.evaluation import knn_accuracy, linear_probe_accuracy

Features = dict[str, Tensor]  # "backbone", "projection" and "raw", `(N, F)` each, and "labels"
NEIGHBOURS = {20: 0.07, 200: 0.1}  # k of kNN, and its temperature
RAW_SIZE = 32  # pixels per side


def raw_pixels(images: Dataset) -> Tensor:
    """Raw pixels `(N, F)` of clean images, shrunk to `RAW_SIZE` if they are larger."""
    parts = []
    for chunk in DataLoader(images, batch_size=256, collate_fn=ViewsCollator()):
        if chunk is not None:
            pixels = chunk["pixel_values"][:, 0].float()
            side = min(RAW_SIZE, pixels.shape[-1])
            parts.append(F.interpolate(pixels, (side, side), mode="area").flatten(1))
    return torch.cat(parts)


def represent(trainer: CachedContrastiveTrainer, images: Dataset) -> Features:
    """Features and projections of clean images, and their labels if they have some, equal on every rank."""
    own: list[Tensor] = []
    # By the model's one forward, as only that runs under every backend: features are what its last head takes in.
    head = trainer.encoder.heads[-1]
    watch = head.register_forward_hook(lambda _module, inputs, _output: own.append(inputs[0].float()))
    reps = trainer.encode(images)
    watch.remove()
    features = torch.cat(own)
    found = {
        "backbone": RankedBatch(len(features), features.device).gather(features),
        "projection": reps["views"][:, -1],
    }
    return found | {name: value for name, value in reps.items() if name == "labels"}


class Judge:
    """Judges features by labels, beside raw pixels, which are read and judged once.

    Args:
        train, test: clean images.
    """

    def __init__(self, train: Dataset, test: Dataset) -> None:
        self.images = (train, test)
        self.raw: list[Tensor] = []
        self.baseline: dict[str, float] = {}

    def features(self, trainer: CachedContrastiveTrainer) -> list[Features]:
        """Of the training and of the test images, with raw pixels if there are labels."""
        found = [represent(trainer, images) for images in self.images]
        if "labels" not in found[0]:
            return found
        self.raw = self.raw or [raw_pixels(images) for images in self.images]
        return [features | {"raw": raw} for features, raw in zip(found, self.raw, strict=True)]

    def scores(self, trainer: CachedContrastiveTrainer) -> dict[str, float]:
        """Accuracies by name; nothing if there are no labels."""
        train, test = self.features(trainer)
        if "labels" not in test:
            return {}
        if not self.baseline:
            found = accuracies(train, test, "raw")
            self.baseline = {f"raw_{name}": value for name, value in found.items()}
        kinds = ("backbone", "projection")
        found = {f"{name}_{kind}": v for kind in kinds for name, v in accuracies(train, test, kind).items()}
        return found | self.baseline


def accuracies(train: Features, test: Features, kind: str) -> dict[str, float]:
    """Of nearest neighbours and of a linear probe (SGD: at its end, and at its best epoch) on one kind of features."""
    sets = (train[kind], train["labels"], test[kind], test["labels"])
    found = {
        f"knn{k}": knn_accuracy(*sets, k=k, temperature=temperature)
        for k, temperature in NEIGHBOURS.items()
        if k <= len(train[kind])
    }
    probe = linear_probe_accuracy(*sets, solver="sgd")
    return found | {"probe_last": probe.last, "probe_best": probe.best}


def with_few_labels(train: Features, test: Features, per_class: int, draws: int) -> dict[str, float]:
    """Accuracy of probes that know a few labels, on features and on raw pixels, over the same draws of them."""
    labels, found = train["labels"].cpu(), defaultdict[str, list[float]](list)
    for seed in range(draws):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([order[labels[order] == label][:per_class] for label in labels.unique()])
        for kind in ("backbone", "raw"):
            known, unknown = train[kind].cpu()[rows], test[kind].cpu()
            found[kind].append(linear_probe_accuracy(known, labels[rows], unknown, test["labels"].cpu()).last)
    statistics: dict[str, Callable[[list[float]], float]] = {"mean": mean, "lowest": min, "highest": max}
    return {f"few_labels_{n}_{kind}": of(found[kind]) for kind in found for n, of in statistics.items()}


def table(scores: dict[str, float]) -> str:
    """Accuracies on features and projections beside those on raw pixels."""
    kinds = {"backbone": "eval_{}_backbone", "projection": "eval_{}_projection", "raw pixels": "eval_raw_{}"}
    names = [key.removeprefix("eval_raw_") for key in scores if key.startswith("eval_raw_")]
    if not names:
        return "The images have no labels to judge features by."
    lines = ["accuracy    " + "".join(f"{kind:>12}" for kind in kinds)]
    for name in names:
        lines.append(f"{name:<12}" + "".join(f"{scores[key.format(name)]:12.4f}" for key in kinds.values()))
    for name in (name for name in names if name.startswith("knn")):
        error, raw = 1 - scores[f"eval_{name}_backbone"], 1 - scores[f"eval_raw_{name}"]
        share = f", {error / raw:.2f} of that" if raw else ""
        lines.append(f"{name}: error {error:.2%}, of raw pixels {raw:.2%}{share}")
    for kind in ("backbone", "raw") if "eval_few_labels_mean_raw" in scores else ():
        middle, low, high = (
            scores[f"eval_few_labels_{name}_{kind}"] for name in ("mean", "lowest", "highest")
        )
        lines.append(f"probe with few labels, {kind}: mean {middle:.4f}, from {low:.4f} to {high:.4f}")
    return "\n".join(lines)
