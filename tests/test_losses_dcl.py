"""DCL and DCLW equal their formula and their dense twins; what of them is weighted, masked and detached."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gc_accel.losses import DCLLoss, DCLWLoss, NTXentLoss, dense
from gc_accel.losses.kernel import tiling
from tests.comparing import assert_equal


def make_views(size, count=2, *, dim=6, dtype=torch.float64):
    return F.normalize(torch.randn(size, count, dim, dtype=dtype), dim=2)


def value_and_gradient(loss_fn, views):
    views = views.detach().clone().requires_grad_()
    loss = loss_fn(views)
    loss.backward()
    return {"loss": loss.detach(), "views": views.grad}


def loop(views, temperature, weights):
    """Equation 6 of the paper, as a mean: one anchor at a time."""
    terms = []
    for sample, view in np.ndindex(views.shape[:2]):
        anchor = views[sample, view]
        negatives = np.delete(views, sample, 0).reshape(-1, views.shape[2]) @ anchor / temperature
        positives = np.delete(views[sample], view, 0) @ anchor / temperature
        terms.append(np.logaddexp.reduce(negatives) - weights[sample] * positives.mean())
    return np.mean(terms)


@pytest.fixture(params=[(3, 5), (4, 4), (5, 3), (1, 7), (512, 1024)])
def tile_sizes(request, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", request.param[0])
    monkeypatch.setattr(tiling, "TILE_COLUMNS", request.param[1])


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("size", [2, 3, 7, 11])
def test_dcl_equals_its_formula_and_its_dense_twin(size, count):
    views = make_views(size, count)
    for budget in (0, tiling.DEFAULT_TILE_BUDGET):
        found = value_and_gradient(DCLLoss(0.2, tile_budget=budget), views)
        assert float(found["loss"]) == pytest.approx(loop(views.numpy(), 0.2, [1] * size), rel=1e-12)
        assert_equal(found, value_and_gradient(partial(dense.dcl_loss, temperature=0.2), views))


@pytest.mark.parametrize("detach_weight", [False, True])
@pytest.mark.parametrize("size", [2, 7])
def test_dclw_equals_its_formula_and_its_dense_twin(size, detach_weight):
    views = make_views(size)
    similarity = (views[:, 0] * views[:, 1]).sum(1).numpy() / 0.3
    weights = 2 - size * np.exp(similarity) / np.exp(similarity).sum()
    options = {"temperature": 0.2, "sigma": 0.3, "detach_weight": detach_weight}
    found = value_and_gradient(DCLWLoss(**options), views)
    assert float(found["loss"]) == pytest.approx(loop(views.numpy(), 0.2, weights), rel=1e-12)
    assert_equal(found, value_and_gradient(partial(dense.dclw_loss, **options), views))


def test_detaching_the_weight_changes_the_gradient_but_not_the_value():
    views = make_views(9)
    free, detached = (value_and_gradient(DCLWLoss(detach_weight=each), views) for each in (False, True))
    assert torch.equal(free["loss"], detached["loss"])
    assert float((free["views"] - detached["views"]).norm() / free["views"].norm()) > 0.05


def test_gradient_is_the_derivative_of_the_value():
    views = make_views(4, dim=3).requires_grad_()
    assert torch.autograd.gradcheck(DCLLoss(0.3), views)
    assert torch.autograd.gradcheck(DCLWLoss(0.3), views)


def test_the_positive_is_out_of_the_denominator():
    """So the loss goes below zero, where NT-Xent cannot."""
    views = F.normalize(torch.eye(4, dtype=torch.float64), dim=1)[:, None].expand(4, 2, 4)
    assert float(DCLLoss()(views)) < -5 < 0 < float(NTXentLoss(0.1)(views))


def test_labels_are_not_looked_at():
    views = make_views(5)
    assert torch.equal(DCLLoss()(views, labels=torch.zeros(5)), DCLLoss()(views))


def test_statistics_are_means_over_pairs():
    views = make_views(5, 3)
    loss = DCLLoss()
    loss(views)
    rows, samples = views.flatten(0, 1), torch.arange(15) // 3
    similarity, alike = rows @ rows.T, samples[:, None] == samples
    siblings = alike & ~torch.eye(15, dtype=torch.bool)
    torch.testing.assert_close(loss.statistics["positive_similarity"], similarity[siblings].mean())
    torch.testing.assert_close(loss.statistics["negative_similarity"], similarity[~alike].mean())


def test_inputs_and_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least 2 samples in the global batch of DCLWLoss, got 1"):
        DCLWLoss()(make_views(1))
    with pytest.raises(ValueError, match="V of at least 2"):
        DCLLoss()(make_views(4, 1))
    with pytest.raises(ValueError, match="expected 2 views of each sample, got 3"):
        DCLWLoss()(make_views(4, 3))
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        DCLLoss(0)
    with pytest.raises(ValueError, match="sigma above 0, got -1"):
        DCLWLoss(sigma=-1)
