"""A map of embeddings in two dimensions, coloured by label."""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from gc_accel.pictures.png import save_png


def embedding_map(
    features: Tensor,
    labels: Tensor,
    path: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    title: str | None = None,
    seed: int = 0,
) -> None:
    """Draws a t-SNE map of the features, one colour per label, as a PNG.

    PCA to at most 50 dimensions comes first, as van der Maaten and Hinton (2008, JMLR 9) do. t-SNE keeps
    neighbours together; distances between clusters mean nothing. A few thousand rows take up to
    a minute.

    Args:
        features: `(N, D)`, N of 5 at least.
        labels: `(N,)` integers.
        path: of the file; its folder is made.
        label_names: the name of label i at position i; the numbers themselves when not given.
        title: above the map.
        seed: of t-SNE.

    Raises:
        ValueError: if the shapes do not fit, there are fewer than 5 rows, the features hold a value that is
            not finite, or a label has no name.
    """
    _check(features, labels, label_names)
    points = _two_dimensions(features.detach().cpu().double().numpy(), seed)
    ids = labels.cpu().numpy()
    classes = np.unique(ids)
    names = [str(label) if label_names is None else label_names[label] for label in classes]
    columns = math.ceil(len(classes) / 24)
    # The legend's share of the width, in inches at its font size, so that the map stays square.
    legend_width = columns * (0.5 + 0.09 * max(map(len, names)))
    figure = Figure(figsize=(6 + legend_width, 6), layout="constrained")
    axes = figure.add_subplot()
    size = float(np.clip(12_000 / len(ids), 4, 30))
    for i, (label, name) in enumerate(zip(classes, names, strict=True)):
        x, y = points[ids == label].T
        colour = _colour(i, len(classes))
        axes.scatter(x, y, s=size, color=colour, linewidths=0, alpha=0.8, label=name)
    # t-SNE coordinates have no unit and no direction.
    axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2", title=title or "")
    scale = (40 / size) ** 0.5
    figure.legend(
        loc="outside right upper", ncols=columns, markerscale=scale, frameon=False, fontsize="small"
    )
    save_png(figure, path)


def _two_dimensions(features: np.ndarray, seed: int) -> np.ndarray:
    # PCA by hand: scikit-learn's divides by a variance that is zero for a collapsed encoder.
    left, singular, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    reduced = left[:, :50] * singular[:50]
    # The usual 30 neighbours, fewer when there are few rows: t-SNE needs more rows than its perplexity.
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="random", random_state=seed).fit_transform(reduced)


def _colour(index: int, count: int) -> tuple[float, float, float, float]:
    """Of one of `count` labels: a qualitative palette as far as it goes, then hues of equal distance."""
    if count <= 10:
        return colormaps["tab10"](index)
    return colormaps["tab20"](index) if count <= 20 else colormaps["gist_rainbow"](index / (count - 1))


def _check(features: Tensor, labels: Tensor, label_names: Sequence[str] | None) -> None:
    if features.ndim != 2 or len(features) < 5 or labels.shape != (len(features),):
        raise ValueError(
            f"expected features (N, D) with N of 5 at least and labels (N,), got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}: pass one label per row"
        )
    if not torch.isfinite(features).all():
        raise ValueError(
            "expected finite features, got NaN or infinity: look at the training before mapping it"
        )
    if label_names is not None and not 0 <= int(labels.min()) <= int(labels.max()) < len(label_names):
        raise ValueError(
            f"expected a name for each label from {int(labels.min())} to {int(labels.max())}, got "
            f"{len(label_names)} names: labels count from 0"
        )
