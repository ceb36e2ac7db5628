"""The losses in place of `grad_cache_con_learning.losses`: the published values, but never NaN."""

import pytest
import torch
import torch.nn.functional as F
from grad_cache_con_learning import losses as published_losses

from gc_accel.compat.grad_cache_con_learning.losses import ConLoss, SupConLoss
from tests.comparing import assert_equal

SIZE = 7


def labels():
    return torch.tensor([0, 1, 0, 2, 1, 0, 3])


def features(size=SIZE, number=3):
    generator = torch.Generator().manual_seed(3)
    views = torch.randn(size, number, 2, 3, dtype=torch.float64, generator=generator)
    return F.normalize(views.flatten(2), dim=2).view_as(views).requires_grad_()


def assert_same(got, expected, views, *args, **kwargs):
    values = [loss(views, *args, **kwargs) for loss in (got, expected)]
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
    grads = [{"views": torch.autograd.grad(value, views)[0]} for value in values]
    assert_equal(*grads)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("positives", ["none", "labels", "column of labels", "mask"])
@pytest.mark.parametrize("name", ["SupConLoss", "ConLoss"])
def test_published_values_and_gradients(name, positives, mode):
    mask = (labels()[:, None] == labels()).float()
    mask[0, 2], mask[1, 5] = 0, 1  # asymmetric
    kwargs = {
        "none": {},
        "labels": {"labels": labels()},
        "column of labels": {"labels": labels()[:, None]},
        "mask": {"mask": mask},
    }[positives]
    options = {"temperature": 0.2, "contrast_mode": mode, "base_temperature": 0.1}
    theirs = getattr(published_losses, name)(**options)
    ours = {"SupConLoss": SupConLoss, "ConLoss": ConLoss}[name](**options)
    assert_same(ours, theirs, features(), **kwargs)


@pytest.mark.parametrize("flag", ["selfcon_s_FG", "selfcon_m_FG"])
@pytest.mark.parametrize("positives", ["none", "labels", "mask"])
def test_flags_of_selfcon(positives, flag):
    mask = (labels()[:, None] == labels()).float()
    kwargs = {"none": {}, "labels": {"labels": labels()}, "mask": {"mask": mask}}[positives]
    views = features(2 * SIZE if flag == "selfcon_m_FG" else SIZE)
    assert_same(ConLoss(), published_losses.ConLoss(), views, **kwargs, **{flag: True})


def test_single_views_without_orphans():
    assert_same(ConLoss(), published_losses.ConLoss(), features(number=1), labels=labels(), supcon_s=True)
    mask = (labels()[:, None] == labels()).float()
    assert_same(ConLoss(), published_losses.ConLoss(), features(number=1), mask=mask, supcon_s=True)


def test_anchors_without_a_positive_are_zero_not_nan():
    views, mask = features(number=1), (labels()[:, None] == labels()).float()
    assert published_losses.ConLoss()(views, labels()).isnan()
    assert_same(ConLoss(), published_losses.SupConLoss(), views, labels())
    assert_same(SupConLoss(), published_losses.SupConLoss(), views, labels())
    assert_same(SupConLoss(), published_losses.SupConLoss(), views, mask=mask)


def test_refused():
    views, mask = features(), torch.eye(SIZE)
    with pytest.raises(ValueError, match="labels or a mask, got both"):
        SupConLoss()(views, labels(), mask)
    with pytest.raises(ValueError, match="contrast_mode"):
        ConLoss(contrast_mode="some")
    with pytest.raises(ValueError, match="got both"):
        ConLoss()(views, selfcon_s_FG=True, selfcon_m_FG=True)
    with pytest.raises(ValueError, match=r"\(B, V, ...\)"):
        SupConLoss()(views[:, 0, 0])
    with pytest.raises(ValueError, match="a label per sample, 7, got 6"):
        SupConLoss()(views, labels()[:6])
    with pytest.raises(ValueError, match="a mask of shape"):
        SupConLoss()(views, mask=mask[:6])
    with pytest.raises(ValueError, match="two crops"):
        ConLoss()(views, selfcon_m_FG=True)
