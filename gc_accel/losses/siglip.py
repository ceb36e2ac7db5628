"""SigLIP's pairwise sigmoid loss (Zhai et al. 2023, arXiv 2303.15343, algorithm 1) over the global batch."""

import torch
import torch.distributed as dist
from torch import Tensor

from gc_accel.distributed import GlobalLoss, RankedBatch
from gc_accel.losses import statistics
from gc_accel.losses.inputs import check_pairs, full_precision
from gc_accel.losses.kernel.sigmoid import Positives, sigmoid_cross_entropy
from gc_accel.losses.kernel.tiling import Own
from gc_accel.losses.statistics import Similarities, similarities_within


class SigLIPLoss(GlobalLoss):
    """Each pair of the batch as a binary decision, of logits s = a·I·Tᵀ + b:

        L = -1/B sum_ij log sigmoid(y_ij s_ij),  y_ij = 1 for a pair that belongs together, -1 otherwise

    With `labels`, all samples that share a label belong together.

    Args:
        process_group: ranks whose batches make up the global batch; None is the default group.

    `statistics` is as in `CLIPLoss`.
    """

    def __init__(self, *, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.process_group = process_group
        self.statistics: dict[str, Tensor] = {}

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
        image, text, logit_scale, logit_bias = full_precision(image, text, logit_scale, logit_bias)
        batch = RankedBatch(len(image), image.device, self.process_group)
        texts, own = batch.gather(text), Own(image, batch.start)
        classes = torch.arange(batch.total, device=image.device) if labels is None else batch.gather(labels)
        positives = Positives(batch.start)
        if labels is not None:
            positives = Positives(batch.start, labels, classes)
        total = sigmoid_cross_entropy(image, texts, logit_scale, logit_bias, positives, own)
        similar = Similarities(own.logits / logit_scale, torch.ones_like(own.logits))
        if labels is not None:
            similar = similarities_within(image.detach(), texts.detach(), classes, batch)
        hits = classes[own.nearest] == classes[batch.own]
        self.statistics = statistics.of_pairs(batch, image, texts, hits, similar, similar)
        return batch.sum(total / batch.total)
