"""Heads between the features of a backbone and the loss: projections, and what methods want beside them.

None has BatchNorm, which under a cache would see the statistics of a chunk. Where papers have it in a hidden layer
(BYOL, SimSiam, NNCLR, MoCo v3), there is LayerNorm, which sees one sample.

Shape letters: D dim of the representations, K prototypes, ... any dimensions of samples and views.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Head = Literal["mlp", "norm_mlp", "linear", "none"]


def projection_head(kind: Head, features: int, hidden_dim: int | None, projection_dim: int) -> nn.Module:
    """A head from `(C, features)` to `(C, projection_dim)`; "none" leaves the features as they are.

    "mlp" is Linear, ReLU, Linear (SimCLR, arXiv 2002.05709, section 4.2). Its hidden layer is as wide as the
    features unless `hidden_dim` says otherwise. "norm_mlp" has LayerNorm before the ReLU, where BYOL's projector
    has BatchNorm (arXiv 2006.07733, section 3.3).

    Raises:
        ValueError: for another kind.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(features, projection_dim)
    if kind not in ("mlp", "norm_mlp"):
        raise ValueError(f"expected head 'mlp', 'norm_mlp', 'linear' or 'none', got {kind!r}")
    hidden = features if hidden_dim is None else hidden_dim
    norm = [nn.LayerNorm(hidden)] if kind == "norm_mlp" else []
    return nn.Sequential(nn.Linear(features, hidden), *norm, nn.ReLU(), nn.Linear(hidden, projection_dim))


def further_heads(projection_dim: int, predictor: int | None, prototypes: int | None) -> nn.ModuleDict:
    """What takes in projections `(..., D)`, by the name of its output.

    Args:
        projection_dim: D.
        predictor: its hidden width; "predictions" `(..., D)`, by Linear, LayerNorm, ReLU, Linear.
        prototypes: K; "scores" `(..., K)`.
    """
    heads = nn.ModuleDict()
    if predictor is not None:
        heads["predictions"] = projection_head("norm_mlp", projection_dim, predictor, projection_dim)
    if prototypes is not None:
        heads["scores"] = Prototypes(projection_dim, prototypes)
    return heads


class Prototypes(nn.Module):
    """Cosines `(..., K)` of representations `(..., D)` with K prototypes (SwAV, arXiv 2006.09882, section 3.1).

    Their length has no say, and none to learn: the paper's code sets it back to 1 after every step instead.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))

    def forward(self, reps: Tensor) -> Tensor:
        return F.linear(F.normalize(reps, dim=-1), F.normalize(self.weight, dim=1))
