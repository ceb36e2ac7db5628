"""Distillation of a similarity matrix: the student's softmax over the batch follows that of a teacher.

Of the divergences of all rows and columns, with the student's logits s and the teacher's t,

    sum_i KL(q_i. || p_i.) = sum_ij q_ij (t_ij - s_ij) - sum_i LSE_j t_ij + sum_i LSE_j s_ij

the log-sum-exps are the streaming ones. The remaining sum has weights that do not depend on the student, so a
tile of the teacher's logits, from which the weights follow, feeds the value and both gradients at once.

Shape letters: B pairs of this rank, N pairs of all ranks, D dim of the student, E dim of the teacher.
"""

from typing import Any

import torch
from torch import Tensor

from gc_accel.losses.base import Group, TiledLoss, open_batch
from gc_accel.losses.checks import check_pairs
from gc_accel.losses.kernel.eager import Gradient, with_gradients
from gc_accel.losses.kernel.streaming import logsumexp_both_ways
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET, Gradients, exact_sum, logits_of, tiles

Factors = tuple[Tensor, Tensor, Tensor]  # rows (B, D), columns (N, D) and scale (1,) of logits


class DistillationLoss(TiledLoss):
    """Mean divergence of the student's rows and columns from those of a teacher:

        L = 1/2B sum_i [ KL(q_i. || p_i.) + KL(q_.i || p_.i) ],  p ~ exp(a·I·Tᵀ), q likewise of the teacher

    The teacher's matrix is given by its representations, of any dimension, and never exists as a whole. Add
    the loss to a `CLIPLoss` to learn from the pairs, too. CLIP-KD (Yang et al. 2024, arXiv 2307.12732,
    section 3.2) calls it contrastive relational distillation.

    Args:
        teacher_scale: the teacher's logit scale.
        process_group: ranks whose batches make up the global batch; None is the default group.
        tile_budget: bytes of logits kept for the backward pass instead of computed twice.
    """

    def __init__(
        self,
        teacher_scale: float = 100.0,
        *,
        process_group: Group = None,
        tile_budget: int = DEFAULT_TILE_BUDGET,
    ) -> None:
        super().__init__(process_group=process_group, tile_budget=tile_budget)
        self.teacher_scale = teacher_scale

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        teacher_image: Tensor,
        teacher_text: Tensor,
    ) -> Tensor:
        """The loss of the global batch, 0-d.

        Args:
            image: `(B, D)`, L2-normalised, of this rank.
            text: `(B, D)`, likewise, row i belongs to image i.
            logit_scale: `(1,)`, a multiplicative scale (the exponential of CLIP's parameter).
            logit_bias: `(1,)`; softmax does not change with it, so its gradient is zero.
            teacher_image: `(B, E)`, of the same images, L2-normalised; no gradient goes there.
            teacher_text: `(B, E)`, of the same texts.

        Raises:
            ValueError: if shapes do not pair up.
        """
        _check(image, text, teacher_image, teacher_text)
        image, text, logit_scale, batch = open_batch(self, image, text, logit_scale)
        teacher_image, teacher_text = teacher_image.detach().to(image), teacher_text.detach().to(image)
        texts, teacher_texts = batch.gather(text), batch.gather(teacher_text)
        scale = image.new_full((1,), self.teacher_scale)
        student = logsumexp_both_ways(
            image, texts, logit_scale, start=batch.start, tile_budget=self.tile_budget
        )
        with torch.no_grad():
            teacher = logsumexp_both_ways(teacher_image, teacher_texts, scale, start=batch.start)
            teacher_by_text = batch.logsumexp(teacher.by_column)
        by_text = (batch.logsumexp(student.by_column) - teacher_by_text)[batch.own]
        factors = (image, texts, logit_scale), (teacher_image, teacher_texts, scale)
        weighted = _weighted_difference(*factors, (teacher.by_row, teacher_by_text))
        loss = weighted + (student.by_row - teacher.by_row).sum() + by_text.sum()
        loss = batch.sum(loss / (2 * batch.total))
        return loss if logit_bias is None else loss + 0 * logit_bias.sum()


def _check(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> None:
    """Raise ValueError for other shapes than `DistillationLoss.forward` takes."""
    check_pairs(image, text)
    check_pairs(teacher_image, teacher_text)
    if len(image) != len(teacher_image):
        raise ValueError(
            f"expected the teacher's representations of the same {len(image)} pairs, got {len(teacher_image)}"
        )


def _weighted_difference(student: Factors, teacher: Factors, totals: tuple[Tensor, Tensor]) -> Tensor:
    """sum_ij w_ij (t_ij - s_ij), w = softmax of t by row plus softmax of t by column, 0-d.

    Args:
        student: the factors of the logits s.
        teacher: those of t.
        totals: log-sum-exp of t by row `(B,)` and by column `(N,)`.
    """
    by_row, by_column = totals

    def compute(inputs: tuple[Any, ...], needed: tuple[bool, ...]) -> tuple[Tensor, tuple[Gradient, ...]]:
        rows, columns, scale = inputs
        # sum_ij w_ij s_ij follows from its own derivative by the scale, to which it is proportional.
        gradients = Gradients(rows, columns, -scale, (needed[0], needed[1], True, False))
        total = exact_sum(rows.new_zeros(0))
        for at in tiles(len(rows), len(columns)):
            logits = logits_of(*teacher, at)
            weights = (logits - by_row[at[0], None]).exp_()
            weights += (logits - by_column[at[1]]).exp_()
            total += (weights * logits).sum()
            gradients.add(at, weights)
        row_grad, column_grad, weighted, _ = gradients.finish()
        assert weighted is not None
        total -= (scale * weighted).sum()
        return total.to(rows.dtype), (row_grad, column_grad, -weighted if needed[2] else None)

    return with_gradients(compute, *student)
