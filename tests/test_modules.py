"""A function around a model is treated as the model: its weights, its BatchNorm layers, its device, its way back."""

from functools import partial, wraps
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from gc_accel.state.modules import Modes, first_called, in_mode, meeting
from gc_accel.state.snapshot import Snapshot
from tests.comparing import assert_equal
from tests.test_gradient_cache import pair_loss, take_gradients

SIZE = 11
HELD = {}


def by_global_name(x):
    return HELD["model"](x)


class Holder:
    def __init__(self, model):
        self.model, self.other = model, nn.Linear(1, 1)

    def encode(self, x):
        return self.model(x)

    def __call__(self, x):
        return self.encode(x)


class Slotted:
    __slots__ = ("model",)

    def __init__(self, model):
        self.model = model

    def encode(self, x):
        return self.model(x)


def decorated(fn):
    @wraps(fn)
    def wrapper(*args):
        return fn(*args)

    return wrapper


def named_globally(model):
    HELD["model"] = model
    return by_global_name


FUNCTIONS = {
    "closure": lambda model: lambda x: model(x),
    "global": named_globally,
    "default": lambda model: lambda x, model=model: model(x),
    "container": lambda model: lambda x, towers=((model,), None): towers[0][0](x),
    "partial": lambda model: partial(lambda model, x: model(x), model),
    "decorator": lambda model: decorated(lambda x: model(x)),
    "attribute": lambda model: (lambda holder: lambda x: holder.model(x))(Holder(model)),
    "bound method": lambda model: Holder(model).encode,
    "method of a module": lambda model: model.forward,
    "slots": lambda model: Slotted(model).encode,
    "callable object": Holder,
}


class Counting(nn.Module):
    """Counts its calls in a buffer that it writes to, and in one that it binds anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self.register_buffer("bound", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.written += 1
        self.bound = self.bound + 1
        return x


def batch_and_model(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 4)).double()
    return torch.randn(SIZE, 6, dtype=torch.float64), model


def loss_of_chunks(encoder, batch, chunk_size):
    """The same chunks in one graph."""
    return pair_loss(torch.cat([encoder(chunk) for chunk in batch.split(chunk_size)]))


def in_chunks(model, batch, chunk_size):
    """Gradients of the same chunks in one graph; running statistics move once."""
    loss_of_chunks(model, batch, chunk_size).backward()
    return take_gradients(model)


@pytest.mark.parametrize("kind", FUNCTIONS)
class TestFunctions:
    """Whatever a function reaches its modules by, they are met when it calls them."""

    def test_batch_norm_is_refused_before_anything_has_changed(self, kind):
        batch, model = batch_and_model(nn.BatchNorm1d(6))
        with pytest.raises(ValueError, match=r"expected no BatchNorm in training mode.*each chunk"):
            GradientCache(FUNCTIONS[kind](model), pair_loss, 4).forward_backward(batch)
        assert model[1].num_batches_tracked == 0
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_equals_the_full_batch_in_eval_mode(self, kind):
        batch, model = batch_and_model(nn.BatchNorm1d(6))
        expected = in_chunks(model.eval(), batch, SIZE)
        GradientCache(FUNCTIONS[kind](model), pair_loss, 4).forward_backward(batch)
        assert_equal(take_gradients(model), expected)

    def test_batch_norm_is_frozen(self, kind):
        batch, model = batch_and_model(nn.BatchNorm1d(6))
        model(3 * batch + 1)  # running statistics that are not those of a new layer
        with in_mode(model, training=False):
            expected = in_chunks(model, batch, SIZE)
        GradientCache(FUNCTIONS[kind](model), pair_loss, 4, batch_norm="frozen").forward_backward(batch)
        assert_equal(take_gradients(model), expected)
        assert model[1].num_batches_tracked == 1

    @pytest.mark.parametrize("retain", [0, 1])
    def test_ghost_batch_norm_moves_its_statistics_once(self, kind, retain):
        batch, model = batch_and_model(nn.BatchNorm1d(6))
        _, reference = batch_and_model(nn.BatchNorm1d(6))
        expected = in_chunks(reference, batch, 4)
        cache = GradientCache(FUNCTIONS[kind](model), pair_loss, 4, retain=retain, batch_norm="ghost")
        cache.forward_backward(batch)
        assert_equal(take_gradients(model), expected)
        torch.testing.assert_close(model[1].running_var, reference[1].running_var, rtol=1e-12, atol=0)
        assert model[1].num_batches_tracked == 3
        assert model[1].track_running_stats


def failing(model, call):
    """A function whose `call`-th call runs out of memory after the model has computed."""
    calls = []

    def encoder(x):
        calls.append(len(x))
        output = model(x)
        if len(calls) == call:
            raise torch.OutOfMemoryError("injected")
        return output

    return encoder, calls


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_step_that_runs_out_of_memory_is_taken_back_and_made_again(call):
    """In the first pass (of chunks of 4, 4 and 3) or in the second, where gradients have gone into weights already."""
    batch, model = batch_and_model(nn.Dropout(0.5), Counting())
    results = []
    for encoder, chunk_size in ((failing(model, call)[0], 4), (lambda x: model(x), 2)):
        torch.manual_seed(5)
        model[2].written.zero_()
        model[2].bound.zero_()
        model[0].weight.grad = torch.ones_like(model[0].weight)
        cache = GradientCache(encoder, pair_loss, chunk_size)
        loss = cache.forward_backward(batch)
        assert set(cache.chunk_sizes.values()) == {2}
        counts = model[2].written.clone(), model[2].bound.clone()
        results.append((loss, take_gradients(model), counts, torch.get_rng_state()))
    (loss, grads, counts, rng), (expected_loss, expected, expected_counts, expected_rng) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_equal(grads, expected)
    assert (grads["0.weight"] - 1).norm() > 1e-3
    assert counts == expected_counts
    assert torch.equal(rng, expected_rng)
    dropped = in_chunks(model, batch, 2)
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(grads, dropped)


@pytest.mark.parametrize("call", [1, 3, 4, 5])
def test_ghost_batch_norm_of_a_step_that_is_made_again_moves_its_statistics_once(call):
    batch, model = batch_and_model(nn.BatchNorm1d(6))
    _, reference = batch_and_model(nn.BatchNorm1d(6))
    expected = in_chunks(reference, batch[:10], 2)
    encoder, calls = failing(model, call)
    GradientCache(encoder, pair_loss, 4, batch_norm="ghost").forward_backward(batch[:10])
    assert len(calls) == call + 5 + 4, "one graph was kept"
    assert_equal(take_gradients(model), expected)
    assert model[1].num_batches_tracked == 5
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean, rtol=1e-12, atol=1e-15)


def test_a_step_that_is_given_up_leaves_everything_as_it_was():
    batch, model = batch_and_model(nn.Dropout(0.5), Counting())
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad, rng = kept, torch.get_rng_state()
    encoder, calls = failing(model, 12)  # the first of the second pass, of chunks of one sample
    with pytest.raises(RuntimeError, match="with chunks of one sample"):
        GradientCache(encoder, pair_loss, 1).forward_backward(batch)
    assert len(calls) == 12
    assert model[0].weight.grad is kept
    assert (kept == 1).all()
    assert model[2].written == model[2].bound == 0
    assert model[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_behind_a_function_is_refused():
    batch, model = batch_and_model()
    wrapped = DistributedDataParallel(model)
    for encoder in (lambda x: wrapped(x), Holder(wrapped).encode):
        with pytest.raises(ValueError, match="expected DistributedDataParallel as the encoder, got a func"):
            GradientCache(encoder, pair_loss, 4).forward_backward(batch)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def another_device_in_use(monkeypatch):
    """A device whose generator cannot be told from none, as if an accelerator were in use that the model is not on."""
    generator = SimpleNamespace(get_rng_state=lambda _: torch.zeros(1), set_rng_state=lambda *_: None)
    monkeypatch.setattr(torch, "meta", generator, raising=False)
    for module in ("distributed.replicas", "engine.encoder_modules"):
        monkeypatch.setattr(f"gc_accel.{module}.device_in_use", lambda: torch.device("meta"))


@pytest.mark.usefixtures("another_device_in_use")
def test_the_device_of_a_function_is_that_of_the_first_module_with_weights_that_it_calls():
    batch, model = batch_and_model(nn.Dropout(0.5))
    noise, calls, samples = nn.Dropout(0.5), [], []
    model.register_forward_pre_hook(lambda _, args: samples.append(len(args[0])))

    def encoder(x):
        calls.append(len(x))
        return model(noise(x))

    def seeded(step):
        torch.manual_seed(3)
        step()
        return take_gradients(model)

    expected = seeded(lambda: loss_of_chunks(encoder, batch, 4).backward())
    cache, position = GradientCache(encoder, pair_loss, 4, retain=0), torch.get_rng_state()
    assert cache.replicas.device == torch.device("meta")
    calls.clear()
    samples.clear()
    assert_equal(seeded(lambda: cache.forward_backward(batch)), expected)
    assert torch.equal(torch.get_rng_state(), position), "a look at the function draws nothing"
    assert cache.replicas.device == torch.device("cpu")
    assert len(calls) == len(samples) + 1, "the look does not get as far as the module"
    calls.clear()
    samples.clear()
    assert_equal(seeded(lambda: cache.forward_backward(batch)), expected)
    assert len(calls) == len(samples) == 6, "it is asked once, and not in every step"


class TestMeeting:
    def test_every_module_is_met_before_it_computes_and_only_inside_of_the_block(self):
        model, events = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), []
        model[0].register_forward_hook(lambda *_: events.append("computed"))
        with meeting(events.append):
            model(torch.zeros(1, 2))
        assert events == [model, model[0], "computed", model[1]]
        model(torch.zeros(1, 2))
        assert len(events) == 5
        with pytest.raises(KeyError), meeting(events.append):
            raise KeyError
        model(torch.zeros(1, 2))
        assert events.count(model) == 1

    def test_a_function_is_left_at_the_first_module_with_weights(self):
        one, two, computed = nn.Linear(2, 2), nn.Linear(2, 2), []
        one.register_forward_hook(lambda *_: computed.append(one))
        assert first_called(lambda: two(one(torch.zeros(1, 2).relu()))) is one
        assert first_called(lambda: one(nn.Dropout(0.1)(torch.zeros(1, 2)))) is one
        assert first_called(lambda: torch.zeros(1)) is None
        assert computed == []


def test_a_snapshot_puts_back_what_was_written_to_and_what_was_bound_anew():
    model, cpu = nn.Sequential(nn.Linear(2, 2), Counting(), nn.Linear(2, 2)), torch.device("cpu")
    model.register_buffer("expanded", torch.zeros(1).expand(3))  # which cannot be written to
    grad = model[0].weight.grad = torch.ones(2, 2)
    bound, snapshot, rng = model[1].bound, Snapshot(cpu), torch.get_rng_state()
    snapshot.note(model[1])
    snapshot.note(model)
    for _ in range(2):
        model(torch.rand(3, 2)).sum().backward()
        assert model[1].written == model[1].bound == 1
        assert not torch.equal(grad, torch.ones(2, 2))
        snapshot.restore()
        assert model[1].bound is bound
        assert model[1].written == bound == 0
        assert model[0].weight.grad is grad
        assert torch.equal(grad, torch.ones(2, 2))
        assert model[2].weight.grad is None
        assert torch.equal(torch.get_rng_state(), rng)


class TestModes:
    def test_a_block_in_one_mode(self):
        model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
        model[1][0].eval()
        with in_mode(model, training=False):
            assert not any(module.training for module in model.modules())
        assert [module.training for module in model.modules()] == [True, True, True, False]

    def test_a_block_in_the_modes_from_before(self):
        model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        modes = Modes(model.modules())
        model.eval()
        with modes.restored():
            assert [module.training for module in model.modules()] == [True, True, False]
        assert not any(module.training for module in model.modules())
