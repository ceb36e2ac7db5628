"""Losses over moments equal their formulas, by D x D moments or by tiles of all pairs alike."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gc_accel.losses import BarlowTwinsLoss, HSICLoss, SpectralLoss, VICRegLoss, dense, moments
from gc_accel.losses.hsic import random_features
from gc_accel.losses.kernel import tiling
from tests.comparing import assert_equal

SHAPES = [(2, 3), (7, 3), (7, 7), (7, 11), (13, 40)]  # samples and dimensions: moments, moments, ..., tiles
LOSSES = {
    "spectral": (SpectralLoss, dense.spectral_loss, {"mu": 0.8}),
    "barlow": (BarlowTwinsLoss, dense.barlow_twins_loss, {"redundancy": 0.3, "eps": 1e-4}),
    "vicreg": (
        VICRegLoss,
        dense.vicreg_loss,
        {"invariance": 3.0, "variance": 7.0, "covariance": 2.0, "eps": 1e-3},
    ),
}


def make_views(size, dim, *, dtype=torch.float64):
    """Two views that agree in part, of uneven spread and far from the origin."""
    common, own = torch.randn(size, 1, dim), torch.randn(size, 2, dim)
    return ((common + 0.5 * own) * torch.linspace(0.1, 1.5, dim) + torch.linspace(-3, 5, dim)).to(dtype)


def value_and_gradient(loss_fn, views):
    views = views.detach().clone().requires_grad_()
    loss = loss_fn(views)
    loss.backward()
    return {"loss": loss.detach(), "views": views.grad}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", 3)
    monkeypatch.setattr(tiling, "TILE_COLUMNS", 5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("defaults", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_dense_twin(name, shape, defaults):
    loss, twin, options = LOSSES[name]
    options = {} if defaults else options
    views = make_views(*shape)
    assert_equal(
        value_and_gradient(loss(**options), views), value_and_gradient(partial(twin, **options), views)
    )


def test_the_shorter_way_is_taken(monkeypatch):
    calls = []
    in_tiles = moments._sum_of_products
    monkeypatch.setattr(moments, "_sum_of_products", lambda *args: (calls.append(1), in_tiles(*args))[1])
    for shape, expected in (((8, 8), 0), ((7, 8), 2)):  # moments where they are no larger
        calls.clear()
        VICRegLoss()(make_views(*shape))
        assert len(calls) == expected


def numpy_barlow(views, redundancy):
    first, second = ((v - v.mean(0)) / np.sqrt(v.var(0) + 1e-5) for v in views.transpose(1, 0, 2))
    loss = 0.0
    for k, m in np.ndindex(views.shape[2], views.shape[2]):
        correlation = np.mean(first[:, k] * second[:, m])
        loss += (1 - correlation) ** 2 if k == m else redundancy * correlation**2
    return loss


def numpy_vicreg(views):
    loss = 25 * np.mean((views[:, 0] - views[:, 1]) ** 2)
    for view in views.transpose(1, 0, 2):
        cov = np.cov(view.T)
        loss += 25 * np.mean(np.maximum(0, 1 - np.sqrt(view.var(0, ddof=1) + 1e-4))) / 2
        loss += (np.sum(cov**2) - np.sum(np.diag(cov) ** 2)) / len(cov)
    return loss


def numpy_spectral(views, mu):
    lengths = np.linalg.norm(views, axis=2, keepdims=True)
    views = views * np.minimum(1, np.sqrt(mu) / lengths)
    size, aligned, apart = len(views), 0.0, 0.0
    for i, j in np.ndindex(size, size):
        product = views[i, 0] @ views[j, 1]
        aligned, apart = (aligned + product, apart) if i == j else (aligned, apart + product**2)
    return (-2 * aligned / size + apart / (size * (size - 1))) / mu


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_formula_in_numpy(shape):
    views = make_views(*shape)
    assert float(BarlowTwinsLoss(0.2)(views)) == pytest.approx(numpy_barlow(views.numpy(), 0.2), rel=1e-10)
    assert float(VICRegLoss()(views)) == pytest.approx(numpy_vicreg(views.numpy()), rel=1e-10)
    short = views * 0.1  # some rows below the radius, some above
    assert float(SpectralLoss(0.5)(short)) == pytest.approx(numpy_spectral(short.numpy(), 0.5), rel=1e-10)


def test_spectral_clips_only_what_is_longer_than_the_radius():
    views = F.normalize(torch.randn(5, 2, 4, dtype=torch.float64), dim=2)
    assert torch.equal(SpectralLoss(4.0)(views * 2), SpectralLoss(4.0)(views * 7))
    assert abs(float(SpectralLoss(4.0)(views * 1.9) - SpectralLoss(4.0)(views))) > 1e-2
    assert value_and_gradient(SpectralLoss(), views * 0)["views"].isfinite().all()


@pytest.mark.parametrize("shape", [(4, 3), (3, 5)])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_derivative_of_the_value(name, shape):
    loss, _, options = LOSSES[name]
    assert torch.autograd.gradcheck(loss(**options), make_views(*shape).requires_grad_())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("features", [4, 64])  # moments, tiles
@pytest.mark.parametrize("count", [2, 3])
def test_hsic_equals_its_dense_twin_over_the_kernel_matrices(count, features):
    views = F.normalize(torch.randn(7, count, 5, dtype=torch.float64), dim=2)

    def twin(rows):
        generator = torch.Generator().manual_seed(3)
        return dense.hsic_loss(
            *(random_features(rows, generator, features, 0.7) for _ in range(2)), gamma=2.0
        )

    loss = HSICLoss(2.0, features=features, scale=0.7, seed=3)
    assert_equal(value_and_gradient(loss, views), value_and_gradient(twin, views))


def test_hsic_approaches_that_of_the_exact_kernel():
    """The inverse multiquadratic kernel c/√(c² + d²), in place of its random features."""
    views = F.normalize(torch.randn(12, 2, 5, dtype=torch.float64), dim=2)
    rows, count, c = views.flatten(0, 1), 24, 0.8
    kernel = c / (c**2 + torch.cdist(rows, rows).square()).sqrt()
    generator = torch.Generator().manual_seed(0)
    features = random_features(rows, generator, 200_000, c)
    torch.testing.assert_close(features @ features.T, kernel, rtol=0, atol=0.01)
    centre = torch.eye(count) - 1 / count
    spread = (kernel @ centre.double() @ kernel @ centre.double()).trace() / count**2
    which = torch.arange(count) // 2
    together = kernel[which[:, None] == which].sum() / count
    expected = 3 * spread.sqrt() - (together - kernel.mean())
    found = HSICLoss(features=20_000, scale=c)(views)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_hsic_features_stay_or_are_drawn_anew():
    views = F.normalize(torch.randn(7, 2, 5), dim=2)
    fixed, anew, again = HSICLoss(), HSICLoss(redraw=True), HSICLoss(redraw=True)
    assert torch.equal(fixed(views), fixed(views))
    assert torch.equal(HSICLoss(seed=0)(views), fixed(views))
    assert not torch.equal(HSICLoss(seed=1)(views), fixed(views))
    first, second = anew(views), anew(views)
    assert not torch.equal(first, second)
    again(views)
    assert torch.equal(again.eval()(views), second)
    assert torch.equal(again.train()(views), second), "evaluation draws nothing"
    resumed = HSICLoss(redraw=True)
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(resumed(views), anew(views))
    assert not fixed.state_dict()


def test_hsic_gradient_is_the_derivative_of_the_value():
    views = F.normalize(torch.randn(4, 2, 3, dtype=torch.float64), dim=2).requires_grad_()
    for features in (3, 16):
        assert torch.autograd.gradcheck(HSICLoss(features=features), views)


def test_hsic_of_identical_rows_has_a_gradient():
    found = value_and_gradient(HSICLoss(), torch.ones(4, 2, 3))
    assert all(value.isfinite().all() for value in found.values())


def every_loss():
    return [*(loss() for loss, _, _ in LOSSES.values()), HSICLoss(features=8), HSICLoss(features=64)]


@pytest.mark.parametrize("dim", [6, 40])
def test_autocast_around_a_loss_changes_nothing(dim):
    views = make_views(9, dim, dtype=torch.float32)
    for loss in every_loss():
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(views)
        assert torch.equal(found, loss(views))


def test_half_precision_is_lifted_to_float32():
    views = make_views(9, 6).bfloat16()
    for loss in every_loss():
        assert torch.equal(loss(views), loss(views.float()))


def test_inputs_and_options_that_make_no_sense_are_refused():
    for loss in every_loss():
        with pytest.raises(ValueError, match="at least 2 samples in the global batch"):
            loss(make_views(1, 4))
        with pytest.raises(ValueError, match="V of at least 2"):
            loss(make_views(4, 4)[:, :1])
    for loss, _, _ in LOSSES.values():
        with pytest.raises(ValueError, match="expected 2 views of each sample, got 3"):
            loss()(torch.randn(4, 3, 6))
    with pytest.raises(ValueError, match="mu above 0, got 0"):
        SpectralLoss(0)
    with pytest.raises(ValueError, match="features of at least 1 and a scale above 0, got 0"):
        HSICLoss(features=0)
