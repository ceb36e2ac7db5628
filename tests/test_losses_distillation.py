"""Distillation of a similarity matrix equals the divergences of its rows and columns, whatever the tiles."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from gc_accel.losses import CLIPLoss, DistillationLoss, dense
from gc_accel.losses.kernel import tiling
from tests.comparing import assert_equal
from tests.test_losses import make_inputs, value_and_gradients


def with_teacher(size, *, dim=5, **options):
    teacher = {
        name: F.normalize(torch.randn(size, dim, dtype=torch.float64), dim=1)
        for name in ("teacher_image", "teacher_text")
    }
    return {**make_inputs(size, **options), **teacher}


@pytest.mark.parametrize("tile", [(3, 5), (512, 1024)])
@pytest.mark.parametrize("budget", [0, tiling.DEFAULT_TILE_BUDGET])
@pytest.mark.parametrize("teacher_scale", [10.0, 100.0, 2000.0])
@pytest.mark.parametrize("size", [2, 7, 16])
def test_equals_dense_twin(size, teacher_scale, budget, tile, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", tile[0])
    monkeypatch.setattr(tiling, "TILE_COLUMNS", tile[1])
    inputs = with_teacher(size)
    expected = value_and_gradients(partial(dense.distillation_loss, teacher_scale=teacher_scale), inputs)
    assert_equal(value_and_gradients(DistillationLoss(teacher_scale, tile_budget=budget), inputs), expected)
    assert all(float(expected[key].norm()) > 1e-3 for key in ("image", "text", "logit_scale"))


def test_a_student_like_its_teacher_has_nothing_to_learn():
    inputs = make_inputs(9, bias=False)
    found = value_and_gradients(
        DistillationLoss(14.3),
        {**inputs, "teacher_image": inputs["image"].detach(), "teacher_text": inputs["text"].detach()},
    )
    assert all(float(value.norm()) < 1e-12 for value in found.values())


def test_a_certain_teacher_makes_it_the_loss_of_clip():
    """A teacher whose softmax is the identity has no entropy, and its targets are the pairs."""
    inputs = make_inputs(6)
    teacher = torch.eye(6, dtype=torch.float64)
    found = value_and_gradients(
        DistillationLoss(200.0), {**inputs, "teacher_image": teacher, "teacher_text": teacher}
    )
    assert_equal(found, value_and_gradients(CLIPLoss(), inputs))


def test_the_direction_of_the_divergence_is_from_the_teacher():
    inputs = with_teacher(4, bias=False)
    student = inputs["logit_scale"] * inputs["image"] @ inputs["text"].T
    teacher = 10 * inputs["teacher_image"] @ inputs["teacher_text"].T
    total = 0.0
    for s, t in ((student, teacher), (student.T, teacher.T)):
        p, q = s.softmax(1), t.softmax(1)
        total += (q * (q / p).log()).sum() / 8
    torch.testing.assert_close(DistillationLoss(10.0)(**inputs), total, rtol=1e-12, atol=0)


def test_evaluation_a_second_backward_pass_and_autocast_change_nothing():
    inputs, loss = with_teacher(7), DistillationLoss(10.0)
    expected = value_and_gradients(loss, inputs)
    with torch.no_grad():
        torch.testing.assert_close(loss(**inputs), expected["loss"], rtol=1e-12, atol=0)
    leaves = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    value = loss(**leaves)
    value.backward(retain_graph=True)
    value.backward()
    assert_equal(
        {k: v.grad / 2 for k, v in leaves.items() if v.requires_grad},
        {k: v for k, v in expected.items() if k != "loss"},
    )
    single = {k: v.detach().float().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    plain = value_and_gradients(loss, single)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(loss, single)
    assert_equal(found, plain)


def test_a_frozen_text_tower_gets_no_gradient():
    inputs = with_teacher(7)
    inputs["text"] = inputs["text"].detach()
    twin = partial(dense.distillation_loss, teacher_scale=10.0)
    found = value_and_gradients(DistillationLoss(10.0), inputs)
    assert "text" not in found
    assert_equal(found, value_and_gradients(twin, inputs))


def test_inputs_that_do_not_pair_up_are_refused():
    inputs = with_teacher(4)
    with pytest.raises(ValueError, match="one shape"):
        DistillationLoss()(**{**inputs, "teacher_text": inputs["teacher_text"][:3]})
    shorter = {name: inputs[name][:3] for name in ("teacher_image", "teacher_text")}
    with pytest.raises(ValueError, match="of the same 4 pairs, got 3"):
        DistillationLoss()(**{**inputs, **shorter})
