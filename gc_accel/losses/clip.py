"""CLIP's symmetric cross-entropy (Radford et al. 2021, section 2.3) over the whole global batch."""

from typing import Literal

import torch
from torch import Tensor

from gc_accel.losses import statistics
from gc_accel.losses.base import Group, TiledLoss, gather_labels, open_batch
from gc_accel.losses.checks import check_option, check_pairs
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.losses.kernel.streaming import logsumexp_both_ways
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET
from gc_accel.losses.statistics import Similarities, similarities_within

Duplicates = Literal["attract", "mask"]


class CLIPLoss(TiledLoss):
    """Mean of the two cross-entropies, image to text and text to image, of a·I·Tᵀ.

        L = 1/(2B) sum_i [ LSE_j s_ij - s_ii ] + [ LSE_j s_ji - s_ii ]

    With `labels`, samples that share a label are positives of one another, the term s_ii becomes the mean of
    s_ij over them (UniCL, Yang et al. 2022, arXiv 2204.03610, equation 3); or they are masked, left out of
    one another's LSE, where equal labels tell false negatives.

    With `negatives`, texts that belong to no image join the candidates of all images:
    LSE_j s_ij reaches over them too, while LSE_j s_ji has no images to add.

    On several ranks each takes its own images against all texts: one gather of the texts, one
    reduce-scatter of their gradients, and B numbers per rank for the text direction.

    Args:
        duplicates: what samples of one label are to one another: positives that "attract", or "mask".
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.

    `statistics` has `in_batch_r1` (images whose nearest candidate is a text of their own),
    `positive_similarity` and `negative_similarity` (means over pairs of the batch) of the latest call, 0-d.
    """

    def __init__(
        self,
        *,
        duplicates: Duplicates = "attract",
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(process_group=process_group, tile_budget=tile_budget)
        check_option("duplicates", duplicates, Duplicates)
        self.duplicates = duplicates

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        labels: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            image: `(B, D)`, L2-normalised, of this rank.
            text: `(B, D)`, likewise, row i belongs to image i.
            logit_scale: `(1,)`, a multiplicative scale (the exponential of CLIP's parameter).
            logit_bias: `(1,)`; softmax does not change with it, so its gradient is zero.
            labels: `(B,)` integers.
            negatives: `(H, D)`, L2-normalised texts of no image, of this rank; ranks may have different H.

        Raises:
            ValueError: if shapes do not pair up.
        """
        check_pairs(image, text, labels, negatives)
        image, text, logit_scale, batch = open_batch(self, image, text, logit_scale)
        texts, classes = batch.gather(text), gather_labels(labels, batch, image.device)
        candidates, candidate_classes = self._candidates(texts, classes, negatives)
        pairs = self._pairs(batch.own, classes, candidate_classes) if labels is not None else None
        sums = logsumexp_both_ways(
            image, candidates, logit_scale, start=batch.start, pairs=pairs, tile_budget=self.tile_budget
        )
        by_text = batch.logsumexp(sums.by_column[: batch.total])[batch.own]
        positive = sums.diagonal
        positives = same_class = Similarities(positive / logit_scale, torch.ones_like(positive))
        if labels is not None:
            same_class = similarities_within(image, texts, classes, batch)
            if self.duplicates == "attract":
                positive, positives = logit_scale * same_class.sums / same_class.counts, same_class
        # Over the batch, the means over each text's images sum to the same as those over each image's texts.
        loss = batch.sum((sums.by_row + by_text - 2 * positive).sum() / (2 * batch.total))
        hits = candidate_classes[sums.nearest] == classes[batch.own]
        self.statistics = statistics.of_pairs(batch, image, texts, hits, positives, same_class)
        return loss if logit_bias is None else loss + 0 * logit_bias.sum()

    def _candidates(self, texts: Tensor, classes: Tensor, negatives: Tensor | None) -> tuple[Tensor, Tensor]:
        """Texts `(N, D)` and classes `(N,)` of the global batch, with all ranks' negatives, a class of their own."""
        if negatives is None:
            return texts, classes
        negatives, batch = open_batch(self, negatives)
        others, other_class = batch.gather(negatives), (classes.max() + 1).expand(batch.total)
        return torch.cat((texts, others)), torch.cat((classes, other_class))

    def _pairs(self, local: slice, classes: Tensor, candidate_classes: Tensor) -> Pairs | None:
        """Pairs of this rank's images, at `local` in the global batch, and candidates, less duplicates to mask."""
        if self.duplicates != "mask":
            return None
        ids = torch.arange(len(candidate_classes), device=classes.device)
        return Pairs(ids[local], ids, classes[local], candidate_classes, classes="other", equal_ids="in")
