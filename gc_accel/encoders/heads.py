"""Projection heads, between the features of a backbone and the space of the loss."""

from typing import Literal

from torch import nn

Head = Literal["mlp", "linear", "none"]


def projection_head(kind: Head, features: int, hidden_dim: int | None, projection_dim: int) -> nn.Module:
    """A head from `(C, features)` to `(C, projection_dim)`; "none" leaves the features as they are.

    "mlp" is Linear, ReLU, Linear (SimCLR, arXiv 2002.05709, section 4.2), without the BatchNorm of some
    implementations, which would see the statistics of a chunk. Its hidden layer is as wide as the features
    unless `hidden_dim` says otherwise.

    Raises:
        ValueError: for another kind.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(features, projection_dim)
    if kind == "mlp":
        hidden = features if hidden_dim is None else hidden_dim
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, projection_dim))
    raise ValueError(f"expected head 'mlp', 'linear' or 'none', got {kind!r}")
