"""The streaming losses equal their dense twins, whatever the tiles, and hold no B x B matrix."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenSigLipLoss

from benchmarks.loss import measure_apart
from gc_accel.losses import CLIPLoss, SigLIPLoss, dense
from gc_accel.losses.kernel import tiling
from tests.comparing import assert_equal

LOSSES = {"clip": (CLIPLoss, dense.clip_loss), "siglip": (SigLIPLoss, dense.siglip_loss)}


def make_inputs(size, *, dim=8, bias=True, labels=False, dtype=torch.float64):
    inputs = {
        "image": F.normalize(torch.randn(size, dim, dtype=dtype), dim=1),
        "text": F.normalize(torch.randn(size, dim, dtype=dtype), dim=1),
        "logit_scale": torch.tensor([14.3], dtype=dtype),
    }
    if bias:
        inputs["logit_bias"] = torch.tensor([-1.7], dtype=dtype)
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    if labels:
        inputs["labels"] = torch.randint(0, max(1, size // 2), (size,))
    return inputs


def value_and_gradients(loss_fn, inputs):
    leaves = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    loss = loss_fn(**leaves)
    loss.backward()
    return {"loss": loss.detach(), **{k: v.grad for k, v in leaves.items() if v.requires_grad}}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", 3)
    monkeypatch.setattr(tiling, "TILE_COLUMNS", 5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [2, 7, 16, 31])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_dense_twin(name, size, bias, labels):
    streaming_loss, dense_loss = LOSSES[name]
    inputs = make_inputs(size, bias=bias, labels=labels)
    expected = value_and_gradients(dense_loss, inputs)
    assert_equal(value_and_gradients(streaming_loss(), inputs), expected)
    assert all(float(expected[key].norm()) > 0 for key in ("image", "text", "logit_scale"))


@pytest.mark.parametrize("name", LOSSES)
def test_batch_of_one(name):
    streaming_loss, dense_loss = LOSSES[name]
    inputs = make_inputs(1)
    found, expected = value_and_gradients(streaming_loss(), inputs), value_and_gradients(dense_loss, inputs)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-14)


@pytest.mark.usefixtures("small_tiles")
def test_tile_budget_never_changes_the_result():
    inputs = make_inputs(31)
    unlimited = value_and_gradients(CLIPLoss(), inputs)
    for budget in (0, 200, 1000):
        found = value_and_gradients(CLIPLoss(tile_budget=budget), inputs)
        assert all(torch.equal(found[name], unlimited[name]) for name in unlimited)


@pytest.mark.parametrize(("ours", "theirs"), [(CLIPLoss(), OpenClipLoss()), (SigLIPLoss(), OpenSigLipLoss())])
def test_equals_that_of_open_clip(ours, theirs):
    inputs = make_inputs(9, bias=isinstance(ours, SigLIPLoss))

    def open_clip_call(image, text, **scale_and_bias):
        return theirs(image, text, **scale_and_bias)

    assert_equal(value_and_gradients(ours, inputs), value_and_gradients(open_clip_call, inputs))


def test_duplicate_captions_count_as_positives():
    """With all pairs alike and labelled alike, labels make the loss lower than taking them as negatives."""
    row = F.normalize(torch.randn(1, 8, dtype=torch.float64), dim=1)
    rows, scale = row.expand(4, 8), torch.tensor([20.0], dtype=torch.float64)
    same = torch.zeros(4, dtype=torch.long)
    assert float(SigLIPLoss()(rows, rows, scale, labels=same)) < 1e-7
    assert float(SigLIPLoss()(rows, rows, scale)) > 10


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_lifted_to_float32(name):
    inputs = make_inputs(33, dtype=torch.float32)
    half = {key: value.detach().bfloat16() for key, value in inputs.items()}
    lifted = {key: value.float() for key, value in half.items()}
    loss = LOSSES[name][0]()
    assert loss(**half).dtype == torch.float32
    torch.testing.assert_close(loss(**half), loss(**lifted))


@pytest.mark.parametrize("loss", [CLIPLoss(), CLIPLoss(tile_budget=0), SigLIPLoss()])
@pytest.mark.parametrize("labels", [False, True])
def test_autocast_around_a_loss_changes_nothing(loss, labels):
    inputs = make_inputs(33, labels=labels, dtype=torch.float32)
    expected = value_and_gradients(loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(loss, inputs)
    assert_equal(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name):
    rows = F.normalize(torch.randn(6, 8), dim=1).repeat(2, 1)
    inputs = {"image": rows, "text": -rows, "logit_scale": torch.tensor([100.0])}
    inputs = {key: value.requires_grad_() for key, value in inputs.items()}
    expected = {k: v.double().detach().requires_grad_() for k, v in inputs.items()}
    found, oracle = (
        value_and_gradients(LOSSES[name][0](), inputs),
        value_and_gradients(LOSSES[name][1], expected),
    )
    assert all(value.isfinite().all() for value in found.values())
    torch.testing.assert_close(found["loss"].double(), oracle["loss"], rtol=1e-5, atol=0)


def test_evaluation_saves_nothing_for_backward(monkeypatch):
    inputs = make_inputs(9)
    monkeypatch.setattr(tiling.Gradients, "add", None)  # a call would raise
    with torch.no_grad():
        assert SigLIPLoss()(**inputs).isfinite()
        assert CLIPLoss()(**inputs).isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_frozen_side_gets_no_gradient(name):
    inputs = make_inputs(9)
    inputs["text"] = inputs["text"].detach()
    found, expected = (value_and_gradients(fn, inputs) for fn in (LOSSES[name][0](), LOSSES[name][1]))
    assert "text" not in found
    assert_equal(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_unpaired_inputs_are_refused(name):
    loss = LOSSES[name][0]()
    inputs = make_inputs(4)
    with pytest.raises(ValueError, match=r"one shape \(B, D\).*\(4, 8\).*\(3, 8\)"):
        loss(inputs["image"], inputs["text"][:3], inputs["logit_scale"])
    with pytest.raises(ValueError, match="a label per pair"):
        loss(inputs["image"], inputs["text"], inputs["logit_scale"], labels=torch.zeros(3))


@pytest.mark.parametrize("loss", [CLIPLoss(), CLIPLoss(tile_budget=0), SigLIPLoss()])
def test_a_second_backward_pass_adds_the_same_gradient(loss):
    inputs = make_inputs(9)
    expected = value_and_gradients(loss, inputs)
    leaves = {key: value.detach().clone().requires_grad_() for key, value in inputs.items()}
    value = loss(**leaves)
    (2 * value).backward(retain_graph=True)
    value.backward()
    assert_equal({key: leaf.grad / 3 for key, leaf in leaves.items()}, {k: expected[k] for k in leaves})


@pytest.mark.slow
@pytest.mark.parametrize("size", [1024, 4096, 16384])
@pytest.mark.parametrize(
    ("name", "budget"),
    [("clip", 0), ("clip", 64 * 2**20), ("siglip", 0), ("simclr", 0), ("simclr", 64 * 2**20), ("supcon", 0)],
)
def test_memory_beyond_representations_gradients_and_budget_is_flat(name, budget, size):
    """At B = 16,384 one B x B matrix has 1,024 MiB."""
    assert measure_apart(name, budget, size) < budget / 2**20 + 16


@pytest.mark.slow
def test_the_dense_twin_fails_that_bound():
    assert measure_apart("dense", 0, 4096) > 100
