"""SigLIP's pairwise sigmoid loss (Zhai et al. 2023, arXiv 2303.15343, algorithm 1) over the global batch."""

import torch
from torch import Tensor

from gc_accel.losses import statistics
from gc_accel.losses.base import BatchLoss, gather_labels, open_batch
from gc_accel.losses.checks import check_pairs
from gc_accel.losses.kernel.sigmoid import Positives, sigmoid_cross_entropy
from gc_accel.losses.kernel.tiling import RowStats
from gc_accel.losses.statistics import Similarities, similarities_within


class SigLIPLoss(BatchLoss):
    """Each pair of the batch as a binary decision, of logits s = a·I·Tᵀ + b:

        L = -1/B sum_ij log sigmoid(y_ij s_ij),  y_ij = 1 for a pair that belongs together, -1 otherwise

    With `labels`, all samples that share a label belong together.

    Args:
        process_group: ranks whose batches make up the global batch; None is the default group.

    `statistics` is as in `CLIPLoss`.
    """

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of the global batch, 0-d; arguments and errors as in `CLIPLoss.forward`."""
        check_pairs(image, text, labels)
        image, text, logit_scale, logit_bias, batch = open_batch(self, image, text, logit_scale, logit_bias)
        texts, stats = batch.gather(text), RowStats(image, batch.start)
        classes = gather_labels(labels, batch, image.device)
        positives = Positives(batch.start, labels, classes)
        total = sigmoid_cross_entropy(image, texts, logit_scale, logit_bias, positives, stats)
        similarities = Similarities(stats.diagonal / logit_scale, torch.ones_like(stats.diagonal))
        if labels is not None:
            similarities = similarities_within(image.detach(), texts.detach(), classes, batch)
        hits = classes[stats.nearest] == classes[batch.own]
        self.statistics = statistics.of_pairs(batch, image, texts, hits, similarities, similarities)
        return batch.sum(total / batch.total)
