"""CLIP's symmetric cross-entropy (Radford et al. 2021, section 2.3) over the whole global batch."""

import torch.distributed as dist
from torch import Tensor

from gc_accel.distributed import GlobalLoss, RankedBatch
from gc_accel.losses.classes import class_sums
from gc_accel.losses.inputs import check_pairs, full_precision
from gc_accel.losses.streaming import DEFAULT_TILE_BUDGET, logsumexp_both_ways


class CLIPLoss(GlobalLoss):
    """Mean of the two cross-entropies, image to text and text to image, of a·I·Tᵀ + b.

        L = 1/(2B) sum_i [ LSE_j s_ij - s_ii ] + [ LSE_j s_ji - s_ii ]

    With `labels`, samples that share a label are positives of one another, the term s_ii becomes the mean of
    s_ij over them (UniCL, Yang et al. 2022, arXiv 2204.03610, equation 3).

    On several ranks each takes its own images against all texts: one gather of the texts, one
    reduce-scatter of their gradients, and B numbers per rank for the text direction.

    Args:
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.
    """

    def __init__(
        self, *, process_group: dist.ProcessGroup | None = None, tile_budget: int = DEFAULT_TILE_BUDGET
    ) -> None:
        super().__init__()
        self.process_group = process_group
        self.tile_budget = tile_budget

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            image: `(B, D)`, L2-normalised, of this rank.
            text: `(B, D)`, likewise, row i belongs to image i.
            logit_scale: `(1,)`, a multiplicative scale (the exponential of CLIP's parameter).
            logit_bias: `(1,)`; softmax does not change with it, so its gradient is zero.
            labels: `(B,)` integers.

        Raises:
            ValueError: if shapes do not pair up.
        """
        check_pairs(image, text, labels)
        image, text, logit_scale, logit_bias = full_precision(image, text, logit_scale, logit_bias)
        batch = RankedBatch(len(image), image.device, self.process_group)
        texts = batch.gather(text)
        by_image, by_text = logsumexp_both_ways(
            image, texts, logit_scale, logit_bias, tile_budget=self.tile_budget
        )
        by_text = batch.logsumexp(by_text)[batch.own]
        matching = text
        if labels is not None:
            sums, counts, which = class_sums(texts, batch.gather(labels))
            which = which[batch.own]
            matching = sums.index_select(0, which) / counts[which, None]
        positive = logit_scale * (image * matching).sum(1)
        if logit_bias is not None:
            positive = positive + logit_bias
        # Over the batch, the means over each text's images sum to the same as those over each image's texts.
        return batch.sum((by_image + by_text - 2 * positive).sum() / (2 * batch.total))
