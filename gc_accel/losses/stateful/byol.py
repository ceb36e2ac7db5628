"""BYOL, bootstrap your own latent (Grill et al. 2020, arXiv 2006.07733, equation 2)."""

import torch.nn.functional as F
from torch import Tensor

from gc_accel.distributed import RankedBatch
from gc_accel.losses.checks import check_views
from gc_accel.losses.stateful.accumulated import AccumulatedLoss, Reps, output_of


class BYOLLoss(AccumulatedLoss):
    """What is predicted from one view resembles what the momentum encoder makes of the other:

        L = 1/N sum_i [ |p1_i - z2'_i|² + |p2_i - z1'_i|² ],   |p - z'|² = 2 - 2 cos(p, z')

    p are `predictions` of the encoder (`VisionEncoder(predictor=...)`), z' `views` of the momentum encoder.
    Regime C: one forward of every sample through each.

    Args:
        teacher: the momentum encoder.
        process_group: ranks whose batches make up the global batch; None is the default group.
    """

    targets_from = "teacher"

    def targets(self, reps: Reps, batch: RankedBatch) -> Tensor:
        return reps["views"]

    def per_sample(self, reps: Reps, targets: Tensor, rows: slice) -> Tensor:
        predictions = output_of(reps, "predictions", "predictor")
        check_views(predictions, at_least=2, at_most=2)
        return (2 - 2 * F.cosine_similarity(predictions, targets[rows].flip(1), dim=2)).sum(1)
