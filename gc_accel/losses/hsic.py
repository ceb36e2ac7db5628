"""SSL-HSIC (Li et al. 2021, arXiv 2106.08320, section 3.3): statistical dependence, by random features."""

import math

import torch
from torch import Tensor

from gc_accel.losses.base import BatchLoss, Group, open_views
from gc_accel.losses.moments import squared_cross_moment


class HSICLoss(BatchLoss):
    """Representations that depend on which sample they are of, and on little else:

        L = γ √HSIC(Z, Z) - HSIC(Z, Y)

        HSIC(Z, Y) = 1/(B V (V-1)) sum_i ||sum_v r(z_iv)||²  -  ||mean r||²
        HSIC(Z, Z) = ||1/(B V) sum_iv (r(z_iv) - mean r)(r'(z_iv) - mean r')ᵀ||²

    for the kernel k(x, y) = c/√(c² + ||x - y||²). It is approximated by r(x).r(y), with F random features

        r(x) = √(2/F) cos(W x + b),  a row of W a Gaussian vector times a Gaussian number, over c,

    because k is a mixture of Gaussian kernels, the squared Gaussian number over c² their precision. r' is a
    second, independent draw, which makes HSIC(Z, Z) unbiased in the features.

    The features come from one seed, equal on all ranks. They stay the same from call to call, so that the loss
    is a function of its inputs; the authors draw anew at every step, and adapt c, which is a constant here.

    Args:
        gamma: γ.
        features: F.
        scale: c, above 0.
        seed: of the random features.
        redraw: draw new features at every call in training mode, the same sequence on all ranks.
        process_group: ranks whose batches make up the global batch; None is the default group.
    """

    draws: Tensor

    def __init__(
        self,
        gamma: float = 3.0,
        *,
        features: int = 512,
        scale: float = 1.0,
        seed: int = 0,
        redraw: bool = False,
        process_group: Group = None,
    ) -> None:
        super().__init__(process_group=process_group)
        if features < 1 or scale <= 0:
            raise ValueError(
                f"expected features of at least 1 and a scale above 0, got {features} and {scale}"
            )
        self.gamma, self.features, self.scale = gamma, features, scale
        self.seed, self.redraw = seed, redraw
        # A count beside the seed, in checkpoints, so that a resumed run draws on where it stood.
        self.register_buffer("draws", torch.zeros((), dtype=torch.long), persistent=redraw)

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            views: `(B, V, D)`, L2-normalised, V at least 2, of this rank.
            labels: not looked at, so that a labelled data set can be used as it is.

        Raises:
            ValueError: for another shape, and for a global batch of a single sample.
        """
        views, batch = open_views(self, views)
        generator = torch.Generator().manual_seed(self.seed + (int(self.draws) if self.redraw else 0))
        first, second = (random_features(views, generator, self.features, self.scale) for _ in range(2))
        if self.redraw and self.training:
            self.draws += 1
        count, rows = views.shape[1], batch.total * views.shape[1]
        mean = batch.sum(first.sum((0, 1))) / rows
        together = batch.sum(first.sum(1).square().sum()) / (rows * (count - 1))
        second_mean = batch.sum(second.detach().sum((0, 1))) / rows
        spread = squared_cross_moment(first - mean.detach(), second - second_mean, batch)
        # Of representations that are all the same the root has no derivative.
        spread = (spread / rows**2).clamp(min=torch.finfo(spread.dtype).tiny)
        return self.gamma * spread.sqrt() - (together - mean.square().sum())


def random_features(rows: Tensor, generator: torch.Generator, count: int, scale: float) -> Tensor:
    """r of every row, `(..., D)` to `(..., count)`, drawn on the host, so that all devices have the same."""
    options: dict = {"generator": generator, "dtype": torch.float64}
    directions = torch.randn(count, rows.shape[-1], **options)
    lengths = torch.randn(count, 1, **options) / scale
    phases = 2 * math.pi * torch.rand(count, **options)
    with torch.autocast(rows.device.type, enabled=False):
        angles = rows @ (directions * lengths).T.to(rows) + phases.to(rows)
    return angles.cos() * math.sqrt(2 / count)
