"""SimSiam (Chen and He 2021, arXiv 2011.10566, equation 2)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gc_accel.losses.checks import check_views
from gc_accel.losses.stateful.accumulated import AccumulatedLoss, Reps, output_of


class SimSiamLoss(AccumulatedLoss):
    """What is predicted from one view resembles the other, whose gradient is stopped:

        L = 1/N sum_i [ -1/2 cos(p1_i, stop(z2_i)) - 1/2 cos(p2_i, stop(z1_i)) ]

    z are `views`, p `predictions` of the encoder (`VisionEncoder(predictor=...)`). Regime C: one forward of
    every sample. That nothing keeps representations apart is the point of the method and its risk: -1 at once
    means that they have collapsed.
    """

    def per_sample(self, reps: Reps, targets: Any, rows: slice) -> Tensor:
        predictions = output_of(reps, "predictions", "predictor")
        check_views(predictions, at_least=2, at_most=2)
        return -F.cosine_similarity(predictions, reps["views"].detach().flip(1), dim=2).mean(1)
