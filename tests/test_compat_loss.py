"""The losses in place of `grad_cache.loss`: the published values, tile by tile."""

import pytest
import torch
import torch.nn.functional as F

from gc_accel.compat.grad_cache.loss import (
    ContrastiveLossWithQueryClosure,
    DistributedContrastiveLoss,
    SimpleContrastiveLoss,
)
from gc_accel.losses.kernel.tiling import DEFAULT_TILE_BUDGET
from tests.comparing import assert_equal
from tests.compat_programs import published


def reps(queries=7, candidates=21, dim=5):
    generator = torch.Generator().manual_seed(1)
    pair = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (queries, candidates))
    return [each.requires_grad_() for each in pair]


def value_and_gradients(loss_fn, x, y, **kwargs):
    loss = loss_fn(x, y, **kwargs)
    grads = torch.autograd.grad(loss.square().sum(), (x, y))
    return loss.detach(), dict(zip("xy", grads, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [None, "given", "some ignored", "probabilities"])
def test_values_and_gradients_of_the_published_loss(target, reduction):
    x, y = reps()
    targets = {
        None: None,
        "given": torch.tensor([3, 3, 0, 20, 1, 2, 8]),
        "some ignored": torch.tensor([3, -100, 0, 20, -100, 2, 8]),
        "probabilities": torch.randn(7, 21, dtype=torch.float64).softmax(1),
    }
    options = {"target": targets[target], "reduction": reduction}
    loss, grads = value_and_gradients(SimpleContrastiveLoss(2), x, y, **options)
    expected_loss, expected = value_and_gradients(published().loss.SimpleContrastiveLoss(2), x, y, **options)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_equal(grads, expected)


def test_the_positive_stands_before_its_hard_negatives():
    x, y = reps()
    expected = F.cross_entropy(x @ y.T, torch.tensor([0, 3, 6, 9, 12, 15, 18]))
    torch.testing.assert_close(SimpleContrastiveLoss(n_hard_negatives=2)(x, y), expected)


def test_autograd_saves_a_budget_of_tiles_and_not_all_logits():
    size, saved = 8192, []
    x, y = reps(size, size)

    def save(tensor):
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        SimpleContrastiveLoss()(x, y).backward()
    assert x.nbytes <= sum(saved) <= DEFAULT_TILE_BUDGET + 20 * x.nbytes < 8 * size**2


def test_half_precision_is_summed_in_float32():
    x, y = (rep.detach().bfloat16() for rep in reps())
    loss = SimpleContrastiveLoss(2)(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SimpleContrastiveLoss(2)(x.float(), y.float()))


def test_queries_from_a_closure():
    x, y = reps()
    loss = ContrastiveLossWithQueryClosure(2)
    torch.testing.assert_close(loss(y, query_closure=lambda: x), loss(x, y))
    torch.testing.assert_close(loss(x, y), SimpleContrastiveLoss(2)(x, y))


class TestRefused:
    def test_lengths_that_do_not_fit(self):
        x, y = reps()
        with pytest.raises(
            ValueError, match="1 candidates for each of 7 queries, got 21: set n_hard_negatives"
        ):
            SimpleContrastiveLoss()(x, y)

    def test_another_reduction(self):
        with pytest.raises(ValueError, match="expected reduction"):
            SimpleContrastiveLoss(2)(*reps(), reduction="max")

    def test_a_closure_and_queries_or_neither(self):
        x, y = reps()
        with pytest.raises(ValueError, match="got 2 tensors and a closure"):
            ContrastiveLossWithQueryClosure(2)(x, y, query_closure=lambda: x)
        with pytest.raises(ValueError, match="got 1 tensors and no closure"):
            ContrastiveLossWithQueryClosure(2)(y)

    def test_no_process_group(self):
        with pytest.raises(ValueError, match="initialised process group"):
            DistributedContrastiveLoss()
