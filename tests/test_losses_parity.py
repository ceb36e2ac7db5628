"""Other libraries compute the same, where they are right; where not, the difference is shown and named."""

from pathlib import Path

import pytest
import pytorch_metric_learning.losses as metric_learning
import torch
import torch.nn.functional as F
from lightly import loss as lightly
from lightly.loss.hypersphere_loss import HypersphereLoss

from gc_accel.losses import (
    AlignUniformLoss,
    BarlowTwinsLoss,
    DCLLoss,
    DCLWLoss,
    NTXentLoss,
    SupConLoss,
    VICRegLoss,
)
from tests.comparing import assert_equal, errors
from tests.ranks import run_on_ranks

SIZE, LABELS = 9, torch.tensor([0, 1, 2, 0, 1, 3, 0, 2, 3])
PAIRED = {  # ours and lightly's, on two views of unit rows
    "nt_xent": (NTXentLoss(0.2), lightly.NTXentLoss(0.2)),
    "dcl": (DCLLoss(0.2), lightly.DCLLoss(0.2)),
    "dclw": (DCLWLoss(0.2, 0.4, detach_weight=True), lightly.DCLWLoss(0.2, 0.4)),
    "align_uniform": (AlignUniformLoss(t=1.0), HypersphereLoss()),
    "barlow": (BarlowTwinsLoss(), lightly.BarlowTwinsLoss()),
    "vicreg": (VICRegLoss(), lightly.VICRegLoss()),
}
# torch.tensor(a tensor), which also cuts the gradient off
copies = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


def make_views(count=2, *, dim=6, unit=True):
    views = torch.randn(SIZE, count, dim, dtype=torch.float64)
    return F.normalize(views, dim=2) if unit else views * torch.linspace(0.3, 1.7, dim)


def value_and_gradient(loss_fn, views):
    """With respect to what comes before normalisation, so that libraries may normalise once more."""
    views = views.detach().clone().requires_grad_()
    loss = loss_fn(views)
    loss.backward()
    return {"loss": loss.detach(), "views": views.grad}


def normalised(loss_fn):
    return lambda views: loss_fn(F.normalize(views, dim=2))


@copies
@pytest.mark.parametrize("name", PAIRED)
def test_agrees_with_lightly(name):
    ours, theirs = PAIRED[name]
    unit = name not in ("barlow", "vicreg")
    views = make_views(unit=unit, dim=6)
    found = value_and_gradient(normalised(ours) if unit else ours, views)
    expected = value_and_gradient(lambda rows: theirs(*rows.unbind(1)), views)
    assert_equal(found, expected)
    assert expected["views"].norm() > 1e-3


@pytest.mark.parametrize("dim", [6, 40])  # by moments and by tiles
@pytest.mark.parametrize("name", ["barlow", "vicreg"])
def test_moment_losses_agree_with_lightly_in_any_dimension(name, dim):
    ours, theirs = PAIRED[name]
    views = make_views(dim=dim, unit=False)
    assert_equal(
        value_and_gradient(ours, views), value_and_gradient(lambda rows: theirs(*rows.unbind(1)), views)
    )


def test_the_uniformity_of_lightly_is_wider_by_default():
    """t = 1, where the paper and its code have 2."""
    views = make_views()
    theirs = HypersphereLoss()(*views.unbind(1))
    assert (AlignUniformLoss()(views) - theirs).abs() > 0.1
    torch.testing.assert_close(AlignUniformLoss()(views), HypersphereLoss(t=2.0)(*views.unbind(1)))


@copies
def test_dclw_of_lightly_has_no_gradient_through_its_weights():
    views = make_views()
    ours = value_and_gradient(normalised(DCLWLoss(0.2, 0.4)), views)
    theirs = value_and_gradient(lambda rows: lightly.DCLWLoss(0.2, 0.4)(*rows.unbind(1)), views)
    torch.testing.assert_close(ours["loss"], theirs["loss"])
    assert errors(theirs, ours)["views"] > 0.05


def test_agrees_with_pytorch_metric_learning():
    views = make_views()
    rows = LABELS.repeat_interleave(2)

    def flat(loss_fn, labels):
        return lambda views: loss_fn(views.flatten(0, 1), labels)

    of_samples = torch.arange(SIZE).repeat_interleave(2)
    cases = (
        (NTXentLoss(0.2), flat(metric_learning.NTXentLoss(0.2), of_samples)),
        (lambda views: SupConLoss(0.2)(views, LABELS), flat(metric_learning.SupConLoss(0.2), rows)),
        (lambda views: SupConLoss(0.2)(views), flat(metric_learning.SupConLoss(0.2), of_samples)),
    )
    for ours, theirs in cases:
        assert_equal(value_and_gradient(normalised(ours), views), value_and_gradient(theirs, views))
    projections = make_views(unit=False)
    theirs = metric_learning.VICRegLoss()
    assert_equal(
        value_and_gradient(VICRegLoss(), projections),
        value_and_gradient(lambda views: theirs(views[:, 0], ref_emb=views[:, 1]), projections),
    )


def test_pytorch_metric_learning_leaves_out_anchors_without_a_positive():
    views, labels = make_views(1), torch.tensor([0, 1, 2, 0, 1, 5, 0, 2, 4])  # 5 and 4 occur once
    theirs = metric_learning.SupConLoss(0.2)(views[:, 0], labels)
    torch.testing.assert_close(SupConLoss(0.2, orphans="exclude")(views, labels), theirs)
    torch.testing.assert_close(SupConLoss(0.2)(views, labels), theirs * 7 / 9)


def test_pytorch_metric_learning_has_one_positive_at_a_time_in_the_denominator():
    """So that its NT-Xent of three views is lower than that of SimCLR's formula."""
    views, samples = make_views(3), torch.arange(SIZE).repeat_interleave(3)
    assert metric_learning.NTXentLoss(0.2)(views.flatten(0, 1), samples) < NTXentLoss(0.2)(views) - 1e-3


def of_lightly_and_ours(rank: int) -> dict[str, tuple[float, float]]:
    """Lightly's loss with its gathering switched on, averaged over ranks as DDP does, and ours."""
    torch.manual_seed(0)
    views = make_views(unit=False)[:8]
    own = views[rank * 4 : rank * 4 + 4]
    pairs = {
        "barlow": (lightly.BarlowTwinsLoss(gather_distributed=True), BarlowTwinsLoss()),
        "dclw": (lightly.DCLWLoss(gather_distributed=True), normalised(DCLWLoss())),
        "dcl": (lightly.DCLLoss(gather_distributed=True), normalised(DCLLoss())),
    }
    return {name: (float(a(*own.unbind(1))), float(b(own))) for name, (a, b) in pairs.items()}


@copies
@pytest.mark.slow
def test_lightly_depends_on_the_number_of_ranks_where_ours_does_not(tmp_path: Path):
    """Its Barlow Twins averages correlations of differently standardised ranks, its DCLW weighs by rank."""
    results = run_on_ranks(of_lightly_and_ours, 2, tmp_path, timeout=240)
    torch.manual_seed(0)
    views = make_views(unit=False)[:8]
    whole = {
        "barlow": lightly.BarlowTwinsLoss()(*views.unbind(1)),
        "dclw": lightly.DCLWLoss()(*views.unbind(1)),
        "dcl": lightly.DCLLoss()(*views.unbind(1)),
    }
    for name, expected in whole.items():
        theirs, ours = (sum(result[name][which] for result in results) / 2 for which in (0, 1))
        assert ours == pytest.approx(float(expected), rel=1e-9), name
        if name == "dcl":
            assert theirs == pytest.approx(float(expected), rel=1e-9)
        else:
            assert abs(theirs - float(expected)) > 1e-3 * abs(float(expected)), name
