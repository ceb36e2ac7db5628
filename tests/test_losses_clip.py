"""CLIP with duplicates that attract or are masked, with hard negatives, and the statistics of a batch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from gc_accel.losses import CLIPLoss, SigLIPLoss, dense
from gc_accel.losses.kernel import tiling
from tests.comparing import assert_equal
from tests.test_losses import make_inputs, value_and_gradients


@pytest.fixture(params=[(3, 5), (512, 1024)])
def tile_sizes(request, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", request.param[0])
    monkeypatch.setattr(tiling, "TILE_COLUMNS", request.param[1])


def with_negatives(inputs, count):
    negatives = F.normalize(torch.randn(count, 8, dtype=torch.float64), dim=1)
    return {**inputs, "negatives": negatives.requires_grad_()} if count else inputs


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("budget", [0, tiling.DEFAULT_TILE_BUDGET])
@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("duplicates", ["attract", "mask"])
@pytest.mark.parametrize("size", [2, 7, 16])
def test_equals_dense_twin(size, duplicates, labels, count, budget):
    inputs = with_negatives(make_inputs(size, labels=labels), count)
    expected = value_and_gradients(partial(dense.clip_loss, duplicates=duplicates), inputs)
    found = value_and_gradients(CLIPLoss(duplicates=duplicates, tile_budget=budget), inputs)
    if float(expected["image"].norm()) > 1e-9:
        assert_equal(found, expected)
    else:  # two pairs of one label, masked: nothing is left to contrast
        assert (size, duplicates, labels, count) == (2, "mask", True, 0)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=0, atol=1e-12)


def one_by_one(image, text, scale, labels, negatives, duplicates):
    """The objective by its definition, one row and one column at a time."""
    total = 0.0
    for rows, columns, others in ((image, text, negatives), (text, image, negatives[:0])):
        for i, row in enumerate(rows):
            same = [j for j in range(len(rows)) if labels[j] == labels[i]]
            kept = [j for j in range(len(rows)) if duplicates == "attract" or j == i or j not in same]
            logits = scale * torch.cat((columns[kept], others)) @ row
            positives = same if duplicates == "attract" else [i]
            total += logits.logsumexp(0) - torch.stack([scale * columns[j] @ row for j in positives]).mean()
    return total / (2 * len(image))


@pytest.mark.parametrize("duplicates", ["attract", "mask"])
def test_equals_its_definition(duplicates):
    inputs = with_negatives(make_inputs(7, bias=False), 3)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    found = CLIPLoss(duplicates=duplicates)(**inputs, labels=labels)
    arguments = (inputs["image"], inputs["text"], inputs["logit_scale"][0], labels, inputs["negatives"])
    torch.testing.assert_close(found, one_by_one(*arguments, duplicates), rtol=1e-12, atol=0)


def test_the_two_treatments_of_duplicates_differ_and_agree_without_any():
    inputs = make_inputs(9)
    attract, mask = CLIPLoss(), CLIPLoss(duplicates="mask")
    plain, distinct, doubled = attract(**inputs), torch.arange(9) + 40, torch.arange(9) // 2
    for loss in (attract, mask):
        torch.testing.assert_close(loss(**inputs, labels=distinct), plain, rtol=1e-12, atol=0)
    attracting, masked = (loss(**inputs, labels=doubled) for loss in (attract, mask))
    assert (attracting - masked).abs() > 1e-2
    assert masked < plain - 1e-2  # fewer candidates


def test_hard_negatives_raise_the_loss_of_images_alone():
    inputs = make_inputs(5, bias=False)
    inputs["negatives"] = inputs["text"].detach()[[0]].clone().requires_grad_()  # text 0 once more
    found = value_and_gradients(CLIPLoss(), inputs)
    without = value_and_gradients(CLIPLoss(), {k: v for k, v in inputs.items() if k != "negatives"})
    assert found["loss"] > without["loss"]
    assert found["negatives"].norm() > 1e-3
    empty = CLIPLoss()(**{**inputs, "negatives": inputs["negatives"][:0]})
    torch.testing.assert_close(empty.detach(), without["loss"])


def statistics_by_hand(inputs, labels, duplicates):
    similarity = (inputs["image"] @ inputs["text"].T).detach()
    size = len(similarity)
    own = torch.eye(size, dtype=torch.bool)
    alike = own if labels is None else labels[:, None] == labels
    candidates = inputs["text"]
    if "negatives" in inputs:
        candidates = torch.cat((candidates, inputs["negatives"]))
    ranking = (inputs["image"] @ candidates.T).detach()
    if duplicates == "mask":
        ranking[:, :size].masked_fill_(alike & ~own, -torch.inf)
    hits = [j < size and bool(alike[i, j]) for i, j in enumerate(ranking.argmax(1).tolist())]
    positives = own if duplicates == "mask" else alike
    return {
        "in_batch_r1": torch.tensor(hits).double().mean(),
        "positive_similarity": similarity[positives].mean(),
        "negative_similarity": similarity[~alike].mean(),
    }


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("duplicates", ["attract", "mask"])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("count", [0, 20])
def test_statistics_are_those_of_the_whole_matrix(count, labels, duplicates):
    inputs = with_negatives(make_inputs(16, labels=labels), count)
    with torch.no_grad():  # so that some are nearest, and not all
        nudged = F.normalize(inputs["text"] + 0.5 * inputs["image"], dim=1)
    inputs["text"] = nudged.requires_grad_()
    loss = CLIPLoss(duplicates=duplicates)
    loss(**inputs)
    expected = statistics_by_hand(inputs, inputs.get("labels"), duplicates)
    assert 0 < float(expected["in_batch_r1"]) < 1
    assert loss.statistics.keys() == expected.keys()
    for name, value in loss.statistics.items():
        assert value.shape == ()
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("labels", [False, True])
def test_statistics_of_siglip_are_the_same(labels):
    inputs = make_inputs(16, labels=labels)
    clip, siglip = CLIPLoss(), SigLIPLoss()
    clip(**inputs), siglip(**inputs)
    for name, value in siglip.statistics.items():
        torch.testing.assert_close(value, clip.statistics[name], rtol=1e-12, atol=1e-12)
        assert not value.requires_grad
    assert siglip.statistics.keys() == clip.statistics.keys()


def test_hard_negatives_count_in_the_ranking():
    inputs = make_inputs(6)
    loss = CLIPLoss()
    perfect = {**inputs, "text": inputs["image"]}
    loss(**perfect)
    assert float(loss.statistics["in_batch_r1"]) == 1
    loss(**{**perfect, "negatives": 2 * inputs["image"].detach()})
    assert float(loss.statistics["in_batch_r1"]) == 0


def test_a_mean_over_no_pair_is_not_a_number():
    loss = CLIPLoss()
    loss(**make_inputs(1))
    assert loss.statistics["negative_similarity"].isnan()
    assert loss.statistics["positive_similarity"].isfinite()


def test_statistics_of_evaluation_and_under_autocast_are_the_same():
    inputs, loss = make_inputs(33, dtype=torch.float32), CLIPLoss()
    loss(**inputs)
    expected = loss.statistics
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss(**inputs)
    assert loss.statistics is not expected
    assert all(torch.equal(loss.statistics[name], value) for name, value in expected.items())


def test_inputs_and_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"expected negatives of shape \(H, 8\), got \(3, 5\)"):
        CLIPLoss()(**make_inputs(4), negatives=torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"expected duplicates to be one of .*'mask'.*got 'drop'"):
        CLIPLoss(duplicates="drop")
