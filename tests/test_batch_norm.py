"""BatchNorm under the cache, by policy; heads that see the whole batch; NaN that is named."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from gc_accel.encoders import FullBatchHead
from gc_accel.inputs.nested import split
from gc_accel.losses import NTXentLoss, dense
from tests.comparing import assert_equal, gradients
from tests.ranks import run_on_ranks

SIZE = 11


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)).double().train()


def images(size=SIZE):
    return torch.randn(size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 0.5


def spread(reps):
    return torch.logsumexp(reps @ reps.T, 1).mean()


def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def chunked_reference(model, chunks):
    """The same chunks in one graph."""
    loss = spread(torch.cat([model(chunk) for chunk in chunks]))
    loss.backward()
    return loss.detach(), gradients(model), buffers(model)


@pytest.mark.parametrize("retain", [0, 1, "all"])
@pytest.mark.parametrize("chunk_size", [2, 4, 64])
class TestGhost:
    def test_equals_the_chunked_reference_running_statistics_included(self, chunk_size, retain):
        model = network()
        reference = copy.deepcopy(model)
        chunks = list(split(images()[:10], chunk_size))  # in the running statistics their order counts
        expected_loss, expected, statistics = chunked_reference(reference, chunks)
        cache = GradientCache(model, spread, chunk_size, retain=retain, batch_norm="ghost")
        torch.testing.assert_close(cache.forward_backward(images()[:10]), expected_loss, rtol=1e-12, atol=0)
        assert_equal(gradients(model), expected)
        assert expected["1.weight"].norm() > 1e-4
        torch.testing.assert_close(buffers(model), statistics, rtol=1e-12, atol=1e-15)
        assert model[1].num_batches_tracked == len(chunks)
        assert model[1].track_running_stats
        assert model[1].training


def test_ghost_is_not_the_full_batch():
    model, whole = network(), network()
    _, expected, _ = chunked_reference(whole, [images()])
    GradientCache(model, spread, 4, batch_norm="ghost").forward_backward(images())
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(gradients(model), expected)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_frozen_equals_the_full_batch_at_the_running_statistics(chunk_size):
    model = network()
    model(images(32) * 2)  # running statistics that are not those of a new layer
    before = buffers(model)
    reference = copy.deepcopy(model).eval()
    _, expected, _ = chunked_reference(reference, [images()])
    GradientCache(model, spread, chunk_size, batch_norm="frozen").forward_backward(images())
    assert_equal(gradients(model), expected)
    assert expected["1.weight"].norm() > 1e-4, "scale and shift train"
    torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)


def test_frozen_needs_running_statistics():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(ValueError, match="BatchNorm"):
        GradientCache(model, spread, 2, batch_norm="frozen").forward_backward(torch.randn(4, 6))


def test_policies_are_named():
    with pytest.raises(ValueError, match=r"'error', 'frozen', 'ghost'.*got 'sync'"):
        GradientCache(network(), spread, 2, batch_norm="sync")


class Views(nn.Module):
    """Features of views, `(C, V, F)`, and a scale that is a global of its own."""

    streams: ClassVar = {"views": ("pixels",)}
    global_names = ("scale",)
    frozen_streams = ()

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, views):
        return {"views": self.body(views["pixels"]).tanh(), "scale": self.scale.exp()}


def behind_head():
    torch.manual_seed(5)
    head = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    return FullBatchHead(Views(), {"views": head}).double().train()


def scaled_loss(loss_fn):
    class Scaled(type(loss_fn)):
        def forward(self, views, scale):
            return super().forward(views * scale)

    loss_fn.__class__ = Scaled
    return loss_fn


def view_batch():
    return {"pixels": images(2 * SIZE).reshape(SIZE, 2, 6)}


def full_batch_step():
    """The oracle: head and loss as one plain network over the whole batch."""
    model = behind_head()
    features = model.encoder.body(view_batch()["pixels"]).tanh()
    reps = model.heads["views"](features.flatten(0, 1)).unflatten(0, (SIZE, 2))
    loss = dense.nt_xent_loss(reps * model.encoder.scale.exp())
    loss.backward()
    return loss.detach(), gradients(model), buffers(model)


@pytest.mark.parametrize("retain", [0, 1, "all"])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_a_head_behind_the_cut_sees_the_whole_batch(chunk_size, retain):
    model = behind_head()
    expected_loss, expected, statistics = full_batch_step()
    loss_fn = model.loss(scaled_loss(NTXentLoss()))
    loss = GradientCache(model, loss_fn, chunk_size, retain=retain).forward_backward(view_batch())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_equal(gradients(model), expected)
    assert (
        min(float(value.norm()) for value in expected.values()) > 1e-8
        or expected["heads.views.0.bias"].norm() < 1e-8
    )
    torch.testing.assert_close(buffers(model), statistics, rtol=1e-12, atol=0)
    assert model.heads["views"][1].num_batches_tracked == 1


def test_in_eval_mode_the_head_is_part_of_the_forward_pass():
    model = behind_head().eval()
    reps = model(views=view_batch())
    assert reps.keys() == {"views", "scale"}
    expected = model.heads["views"](model.encoder(view_batch())["views"].flatten(0, 1)).unflatten(
        0, (SIZE, 2)
    )
    torch.testing.assert_close(reps["views"], expected)
    value = model.loss(scaled_loss(NTXentLoss()))(**reps)
    torch.testing.assert_close(value, dense.nt_xent_loss(expected * reps["scale"]))


def ddp_step(rank):
    start, stop = ((0, 4), (4, SIZE))[rank]
    own = {"pixels": view_batch()["pixels"][start:stop]}
    model = DistributedDataParallel(behind_head(), find_unused_parameters=True, broadcast_buffers=False)
    cache = GradientCache(model, model.module.loss(scaled_loss(NTXentLoss())), chunk_size=3)
    loss = cache.forward_backward(own)
    return own["pixels"], loss, gradients(model.module), buffers(model.module)


def test_on_two_ranks_the_head_sees_the_global_batch(tmp_path):
    expected_loss, expected, statistics = full_batch_step()
    results = run_on_ranks(ddp_step, 2, tmp_path)
    assert len(results) == 2
    assert not torch.equal(results[0][0][:1], results[1][0][:1])
    for _, loss, grads, found in results:
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
        assert_equal(grads, expected)
        torch.testing.assert_close(found, statistics, rtol=1e-12, atol=0)


class TestNotANumber:
    def test_is_named_by_the_index_of_its_sample(self):
        model, batch = network().eval(), images()
        batch[7, 2] = torch.nan
        for chunk_size, retain in ((1, 0), (3, 1), (4, "all")):
            with pytest.raises(ValueError, match=r"infinity or NaN for samples \[7\] of the batch"):
                GradientCache(model, spread, chunk_size, retain=retain).forward_backward(batch)
        assert all(p.grad is None for p in model.parameters())

    def test_by_stream_where_there_are_some(self):
        model, batch = behind_head(), view_batch()
        batch["pixels"][[2, 5], 1, 0] = torch.inf
        batch["pixels"][5, 0, 0] = -torch.inf
        model.encoder.body.weight.data.abs_()
        model.encoder.forward = lambda views: {
            "views": model.encoder.body(views["pixels"]),
            "scale": model.encoder.scale.exp(),
        }
        with pytest.raises(ValueError, match=r"finite 'views', got infinity or NaN for samples \[2, 5\]"):
            GradientCache(model, model.loss(scaled_loss(NTXentLoss())), 3).forward_backward(batch)

    def test_of_the_loss_alone_is_said_to_be_the_loss(self):
        with pytest.raises(ValueError, match="expected a finite loss, got inf"):
            GradientCache(
                network().eval(), lambda reps: (reps * torch.inf).square().sum(), 3
            ).forward_backward(images())
