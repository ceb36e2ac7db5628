"""`chunk_size="auto"`: the largest chunk within a bound, measured, agreed on, and without a trace."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from gc_accel.distributed import Replicas
from gc_accel.engine import joining
from gc_accel.losses import CLIPLoss, dense
from gc_accel.memory import budget
from gc_accel.memory.fitting import fit_chunk_size
from gc_accel.memory.meters import LiveBytes
from tests.comparing import assert_equal, gradients
from tests.models import dual_encoder, image_text_batch
from tests.ranks import run_on_ranks
from tests.test_gradient_cache import full_batch, take_gradients


def trained_bytes(encoder):
    return sum(each.nbytes for each in encoder.parameters() if each.requires_grad)


def takes(encoder, inputs):
    """The oracle: the activations of a chunk, measured from outside, beside weights, their gradients and inputs."""
    given = [inputs] if isinstance(inputs, torch.Tensor) else next(iter(inputs.values())).values()
    for each in encoder.parameters():
        each.grad = torch.zeros_like(each) if each.requires_grad else None
    grads = [each.grad for each in encoder.parameters() if each.requires_grad]
    with LiveBytes([*encoder.parameters(), *encoder.buffers(), *grads, *given]) as live:
        outputs = encoder(inputs) if isinstance(inputs, torch.Tensor) else encoder(**inputs)
        reps = outputs if isinstance(outputs, torch.Tensor) else outputs[next(iter(inputs))]
        reps.backward(torch.ones_like(reps))
    encoder.zero_grad(set_to_none=True)
    return live.peak


def peak_of(encoder, stream, samples):
    batch = image_text_batch(samples)
    return takes(encoder, {stream: {key: batch[key] for key in encoder.streams[stream] if key in batch}})


@pytest.mark.parametrize("fitting", [9, 40])
def test_the_largest_chunk_within_the_bound(fitting):
    encoder = dual_encoder("clip")
    peaks = {
        count: max(peak_of(encoder, name, count) for name in encoder.streams)
        for count in (fitting, fitting + 2)
    }
    bound = (peaks[fitting] + peaks[fitting + 2]) / 2
    found = fit_chunk_size(image_text_batch(16), Replicas(encoder, None), bound, most=1000)
    assert abs(found - fitting) <= 1


def wide():
    """Of which few samples take less than the gradient of one weight, which a backward pass makes anew."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(128, 128), nn.GELU())))


@pytest.mark.parametrize("size", [17, 150, 700])
def test_weights_do_not_hide_what_samples_take(size):
    encoder = wide()
    bound = takes(encoder, torch.randn(size, 128))
    assert takes(encoder, torch.randn(4, 128)) > 4 * bound / size, "the weights matter"
    found = fit_chunk_size(torch.randn(5, 128), Replicas(encoder, None), bound, most=4000)
    assert takes(encoder, torch.randn(found, 128)) <= bound
    assert takes(encoder, torch.randn(int(1.1 * found) + 1, 128)) > bound


def test_no_chunk_is_larger_than_asked_for():
    sample, replicas = torch.randn(5, 128), Replicas(wide(), None)
    assert fit_chunk_size(sample, replicas, 2**40) == 5
    assert fit_chunk_size(sample, replicas, 2**40, most=43) == 43
    assert fit_chunk_size(sample[:1], replicas, 2**40, most=1) == 1


class Small(nn.Linear):
    """Has memory for so many samples and no more."""

    def __init__(self, room, error=torch.OutOfMemoryError):
        super().__init__(6, 4)
        self.room, self.error, self.tried = room, error, []

    def forward(self, x):
        self.tried.append(len(x))
        if len(x) > self.room:
            raise self.error("injected")
        return super().forward(nn.functional.dropout(x))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("room", [1, 3, 8, 19])
def test_running_out_of_memory_says_that_so_many_do_not_fit(room, error):
    encoder = Small(room, error)
    encoder(torch.randn(1, 6)).sum().backward()
    sample = torch.randn(64, 6)
    grads, state = gradients(encoder), torch.get_rng_state()
    assert fit_chunk_size(sample, Replicas(encoder, None), 2**30) == room
    assert max(encoder.tried) > room
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(grad, grads[name]) for name, grad in gradients(encoder).items())
    assert GradientCache(encoder, lambda x: x.square().sum(), "auto").forward_backward(sample) > 0


def test_an_error_in_the_encoder_leaves_no_trace():
    class Broken(nn.Linear):
        def forward(self, x):
            super().forward(nn.functional.dropout(x)).sum().backward()
            raise TypeError("broken")

    encoder, sample = Broken(6, 4), torch.randn(4, 6)
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match="broken"):
        fit_chunk_size(sample, Replicas(encoder, None), 2**30)
    assert torch.equal(state, torch.get_rng_state())
    assert all(each.grad is None for each in encoder.parameters())


def test_a_call_of_several_chunks_has_to_fit_too(monkeypatch):
    """As on an accelerator: eight layers that are checkpointed keep less of a chunk than four chunks take to pass."""
    bound, sizes = takes(wide(), torch.randn(64, 128)), {}
    for calls in (1, 40):
        monkeypatch.setattr(joining, "samples_of_a_call", lambda size, given, calls=calls, **_: calls * size)
        sizes[calls] = fit_chunk_size(torch.randn(4, 128), Replicas(wide(), None), bound, most=2000)
    assert sizes[40] < sizes[1] / 2
    monkeypatch.undo()
    one = fit_chunk_size(torch.randn(4, 128), Replicas(wide(), None), bound, most=2000, forward_chunk_size=1)
    assert one == sizes[1]


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_chunks_that_are_checkpointed_share_no_call(kind):
    encoder, gpu = dual_encoder(kind), torch.device("cuda")
    assert joining.JoinedCalls(encoder, None, gpu).samples(3) == 3 * joining.CHUNKS
    assert joining.JoinedCalls(encoder, None, torch.device("cpu")).samples(3) == 3
    encoder.activation_checkpointing_enable()
    assert joining.JoinedCalls(encoder, None, gpu).samples(3) == 3
    assert joining.JoinedCalls(lambda x: x, None, gpu).samples(3) == 3 * joining.CHUNKS


@pytest.mark.parametrize("size", [2.5, None, float("nan"), "8", True, 0, -1])
def test_sizes_are_whole_numbers(size):
    encoder = dual_encoder("clip")
    with pytest.raises(ValueError, match="expected chunk"):
        GradientCache(encoder, CLIPLoss(), size)
    with pytest.raises(ValueError, match=r"expected chunks of .* a whole number of samples"):
        GradientCache(encoder, CLIPLoss(), {"image": 4, "text": size})
    if size is not None:
        with pytest.raises(ValueError, match=r"expected chunks of .* a whole number of samples"):
            GradientCache(encoder, CLIPLoss(), 4, forward_chunk_size=size)
        with pytest.raises(ValueError, match=r"expected chunks of .* a whole number of samples"):
            GradientCache(encoder, CLIPLoss(), "auto", forward_chunk_size=size)


@pytest.mark.parametrize("memory", [0, -1, 0.5])
def test_memory_on_the_cpu_is_bytes(memory):
    with pytest.raises(ValueError, match=f"expected a memory_budget .* got (the fraction )?{memory}"):
        fit_chunk_size(torch.randn(4, 128), Replicas(wide(), None), memory)


def test_processes_of_a_host_share_its_memory(monkeypatch):
    encoder = wide()
    others = (1 + budget.OPTIMIZER_COPIES) * trained_bytes(encoder)
    free = (takes(encoder, torch.randn(600, 128)) + others) / budget.FILL
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    alone = fit_chunk_size(torch.randn(4, 128), Replicas(encoder, None), most=2000)
    assert alone == pytest.approx(600, rel=0.06), "room is left for gradients and for Adam"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert 0 < fit_chunk_size(torch.randn(4, 128), Replicas(encoder, None), most=2000) < alone / 1.5


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


def on_rank(rank, sizes):
    encoder = dual_encoder("clip")
    model = DistributedDataParallel(encoder, find_unused_parameters=True)
    bound = max(peak_of(encoder, name, sizes[rank]) for name in encoder.streams)
    return fit_chunk_size(image_text_batch(16), Replicas(model, None), bound, most=64)


def test_ranks_take_what_fits_on_all_of_them(tmp_path):
    first, second = run_on_ranks(on_rank, 2, tmp_path, (9, 17))
    assert first == second
    assert abs(first - 9) <= 1


def without_memory(rank):
    """Buffers, which the wrapper broadcasts, and a rank that gets no sample through."""
    encoder = nn.Sequential(nn.BatchNorm1d(6).eval(), Small((5, 0)[rank]))
    replicas = Replicas(DistributedDataParallel(encoder), None)
    with pytest.raises(ValueError, match="one sample on every rank"):
        fit_chunk_size(torch.randn(16, 6), replicas, 2**30)
    encoder[1].room = (9, 3)[rank]
    return fit_chunk_size(torch.randn(16, 6), replicas, 2**30)


def test_ranks_give_up_together(tmp_path):
    assert run_on_ranks(without_memory, 2, tmp_path) == [3, 3]
