"""`chunk_size="auto"`: the largest chunk within a bound, measured, agreed on, and without a trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from gc_accel.chunk_size import fit_chunk_size
from gc_accel.distributed import Replicas
from gc_accel.losses import CLIPLoss, dense
from gc_accel.memory import LiveBytes
from tests.comparing import assert_equal, gradients
from tests.models import dual_encoder, image_text_batch
from tests.ranks import run_on_ranks
from tests.test_gradient_cache import full_batch, take_gradients


def peak_of(encoder, stream, samples):
    """The oracle: one chunk of that size, measured from outside."""
    batch = image_text_batch(samples)
    inputs = {key: batch[key] for key in encoder.streams[stream] if key in batch}
    with LiveBytes() as live:
        encoder(**{stream: inputs})[stream].sum().backward()
    encoder.zero_grad(set_to_none=True)
    return live.peak


@pytest.mark.parametrize("fitting", [9, 40])
def test_the_largest_chunk_within_the_bound(fitting):
    encoder = dual_encoder("clip")
    peaks = {
        count: max(peak_of(encoder, name, count) for name in encoder.streams)
        for count in (fitting, fitting + 2)
    }
    bound = (peaks[fitting] + peaks[fitting + 2]) / 2
    found = fit_chunk_size(image_text_batch(16), Replicas(encoder, None), bound)
    assert abs(found - fitting) <= 1


def test_measuring_leaves_no_trace():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))
    encoder(torch.randn(4, 6)).sum().backward()
    sample = torch.randn(16, 6)
    before, grads, state = copy.deepcopy(encoder.state_dict()), gradients(encoder), torch.get_rng_state()
    fit_chunk_size(sample, Replicas(encoder, None), 2**20)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, grad in gradients(encoder).items():
        assert torch.equal(grad, grads[name]), name


def test_the_cache_finds_its_chunk_with_its_first_batch():
    encoder, batch = dual_encoder("clip"), image_text_batch(24)
    _, expected = full_batch(encoder, dense.clip_loss, batch)
    bound = 1.05 * max(peak_of(encoder, name, 7) for name in encoder.streams)
    cache = GradientCache(encoder, CLIPLoss(), "auto", memory_budget=bound)
    cache.forward_backward(batch)
    assert_equal(take_gradients(encoder), expected)
    assert set(cache.chunk_sizes.values()) <= {6, 7, 8}


def test_says_so_if_one_sample_does_not_fit():
    encoder = dual_encoder("clip")
    with pytest.raises(ValueError, match="memory for a chunk of one sample"):
        fit_chunk_size(image_text_batch(16), Replicas(encoder, None), 1000)


def on_rank(rank):
    encoder = dual_encoder("clip")
    model = DistributedDataParallel(encoder, find_unused_parameters=True)
    bound = max(peak_of(encoder, name, (9, 17)[rank]) for name in encoder.streams)
    return fit_chunk_size(image_text_batch(16), Replicas(model, None), bound)


def test_ranks_take_what_fits_on_all_of_them(tmp_path):
    first, second = run_on_ranks(on_rank, 2, tmp_path)
    assert first == second
    assert abs(first - 9) <= 1
