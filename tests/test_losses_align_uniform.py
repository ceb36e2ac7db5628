"""Alignment and uniformity equal the paper's few lines over `pdist` and the dense twin."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from gc_accel.losses import AlignUniformLoss, dense
from gc_accel.losses.kernel import exponentials, tiling
from tests.comparing import assert_equal


def make_views(size, *, dim=6, length=1.0):
    return length * F.normalize(torch.randn(size, 2, dim, dtype=torch.float64), dim=2)


def value_and_gradient(loss_fn, views):
    views = views.detach().clone().requires_grad_()
    loss = loss_fn(views)
    loss.backward()
    return {"loss": loss.detach(), "views": views.grad}


def of_the_paper(views, alpha, t, uniformity):
    x, y = views.unbind(1)
    spread = [torch.pdist(z).pow(2).mul(-t).exp().mean().log() for z in (x, y)]
    return (x - y).norm(dim=1).pow(alpha).mean() + uniformity * sum(spread) / 2


@pytest.mark.parametrize("tile", [(3, 5), (512, 1024)])
@pytest.mark.parametrize("options", [(2.0, 2.0, 1.0), (1.5, 0.7, 3.0)])
@pytest.mark.parametrize("size", [2, 3, 7, 13])
def test_equals_the_formula_of_the_paper_and_the_dense_twin(size, options, tile, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", tile[0])
    monkeypatch.setattr(tiling, "TILE_COLUMNS", tile[1])
    names = dict(zip(("alpha", "t", "uniformity"), options, strict=True))
    views = make_views(size)
    found = value_and_gradient(AlignUniformLoss(**names), views)
    assert_equal(found, value_and_gradient(partial(of_the_paper, **names), views))
    assert_equal(found, value_and_gradient(partial(dense.align_uniform_loss, **names), views))


def test_rows_of_any_length_have_their_distances():
    views = make_views(9) * torch.linspace(0.5, 3, 9)[:, None, None]
    expected = value_and_gradient(dense.align_uniform_loss, views)
    assert_equal(value_and_gradient(AlignUniformLoss(), views), expected)


def test_rows_far_apart_do_not_underflow():
    """exp(-2 · 90²) is zero even in float64; its logarithm is a number."""
    views = make_views(6, length=90.0)
    found = value_and_gradient(AlignUniformLoss(), views)
    distances = torch.stack([torch.pdist(z).square() for z in views.unbind(1)])
    uniform = (-2 * distances).logsumexp(1).mean() - torch.log(torch.tensor(15.0))
    aligned = (views[:, 0] - views[:, 1]).square().sum(1).mean()
    torch.testing.assert_close(found["loss"], aligned + uniform)
    assert found["views"].isfinite().all()


def test_identical_views_have_a_gradient():
    views = make_views(5)
    views[:, 1] = views[:, 0]
    assert value_and_gradient(AlignUniformLoss(1.0), views)["views"].isfinite().all()


def test_gradient_is_the_derivative_of_the_value():
    assert torch.autograd.gradcheck(AlignUniformLoss(1.5), make_views(4, dim=3).requires_grad_())


def test_half_precision_is_lifted_to_float32():
    views = make_views(8).bfloat16()
    assert torch.equal(AlignUniformLoss()(views), AlignUniformLoss()(views.float()))


def test_one_shift_serves_unit_rows(monkeypatch):
    monkeypatch.setattr(exponentials.RunningMaxima, "add", None)  # a call would raise
    assert AlignUniformLoss()(make_views(5).float()).isfinite()


def test_inputs_and_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least 2 samples in the global batch"):
        AlignUniformLoss()(make_views(1))
    with pytest.raises(ValueError, match="V of at least 2"):
        AlignUniformLoss()(make_views(4)[:, :1])
    with pytest.raises(ValueError, match="expected 2 views"):
        AlignUniformLoss()(torch.randn(4, 3, 6))
    with pytest.raises(ValueError, match="alpha and t above 0"):
        AlignUniformLoss(t=0)
