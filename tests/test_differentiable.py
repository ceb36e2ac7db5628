"""`cache(batch)`: a loss whose backward pass is that of the full batch in one graph, in anybody's loop."""

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.amp import GradScaler

from gc_accel import GradientCache
from gc_accel.contracts import AccumulatedLoss, StatefulLoss
from gc_accel.losses import CLIPLoss, SigLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import dual_encoder, image_text_batch
from tests.topologies import ONE_PROCESS, forget_accelerators, prepare

SIZE, CHUNK = 11, 3
RETAIN = (0, 1, "all")
retained = pytest.mark.parametrize("retain", RETAIN)


def batch_loss(first, second=None, *, labels=None):
    """A loss in which every sample meets every other."""
    logits = 2 * first @ (first if second is None else second).T
    labels = torch.arange(len(first)) if labels is None else labels
    return nn.functional.cross_entropy(logits, labels) + logits.logsumexp(0).mean()


class Tower(nn.Module):
    """Two layers with dropout between, behind one input or two."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout))
        self.a, self.b = nn.Linear(8, 5), nn.Linear(8, 5)
        self.double()

    def forward(self, x, y=None, *, scale=1.0):
        return self.a(self.body(x)) if y is None else (self.a(self.body(x)) * scale, self.b(self.body(y)))


def samples(*shape, seed=4):
    return torch.randn(*shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def taken(*modules):
    """Gradients, of which there are some, and no longer there."""
    found = {f"{i}.{name}": grad for i, m in enumerate(modules) for name, grad in gradients(m).items()}
    for module in modules:
        module.zero_grad(set_to_none=True)
    assert any(float(grad.norm()) > 1e-3 for grad in found.values() if grad is not None)
    return found


def expected_of(loss, *modules, times=1):
    (times * loss).backward()
    return taken(*modules)


def full_batch(encoder, batch):
    """The oracle: one forward of everything, a dense loss, with a graph."""
    streams = {name: {k: batch[k] for k in keys if k in batch} for name, keys in encoder.streams.items()}
    extras = {key: batch[key] for key in ("labels",) if key in batch}
    return dense_loss(encoder)(**encoder(**streams), **extras)


def dense_loss(encoder):
    return dense.siglip_loss if "logit_bias" in encoder.global_names else dense.clip_loss


def streaming_loss(encoder):
    return SigLIPLoss() if "logit_bias" in encoder.global_names else CLIPLoss()


x, y = samples(2, SIZE)
STRUCTURES = {
    "tensor": (x, lambda model: model(x)),
    "list": ([x, y], lambda model: model(x, y)),
    "mapping": ({"x": x, "y": y}, lambda model: model(x, y)),
    "list and mapping": (([x], {"y": y, "scale": 2.0}), lambda model: model(x, y, scale=2.0)),
}


@retained
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("is_function", [False, True])
def test_equals_the_full_batch(structure, is_function, retain):
    model, (batch, forward) = Tower(), STRUCTURES[structure]
    outputs = forward(model)
    exact = batch_loss(*outputs) if isinstance(outputs, tuple) else batch_loss(outputs)
    expected = expected_of(exact, model)
    encoder = (lambda *args, **kwargs: model(*args, **kwargs)) if is_function else model
    loss = GradientCache(encoder, batch_loss, CHUNK, retain=retain)(batch)
    assert loss.ndim == 0
    assert loss.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing before backward"
    torch.testing.assert_close(loss.detach(), exact.detach(), rtol=1e-12, atol=0)
    loss.backward()
    assert_equal(taken(model), expected)


@retained
@pytest.mark.parametrize("freeze", [(), ("image",), ("text",)])
@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
def test_equals_the_full_batch_of_two_towers(kind, freeze, retain):
    encoder = dual_encoder(kind, freeze=freeze)
    batch = image_text_batch(SIZE) | {"labels": torch.arange(SIZE) % 8}
    exact = full_batch(encoder, batch)
    expected = expected_of(exact, encoder)
    loss = GradientCache(encoder, streaming_loss(encoder), CHUNK, retain=retain)(batch)
    torch.testing.assert_close(loss.detach(), exact.detach(), rtol=1e-12, atol=0)
    loss.backward()
    found = taken(encoder)
    assert_equal(found, expected)
    assert any(grad is None for grad in found.values()) == any(grad is None for grad in expected.values())
    for name in encoder.global_names:
        assert float(expected[f"0.model.{name}"].abs()) > 1e-6


@retained
def test_labels_by_keyword(retain):
    model, labels = Tower(), torch.randperm(SIZE)
    expected = expected_of(batch_loss(model(x), labels=labels), model)
    GradientCache(model, batch_loss, CHUNK, retain=retain)(x, labels=labels).backward()
    assert_equal(taken(model), expected)
    assert worst(expected, expected_of(batch_loss(model(x)), model)) > 1e-3, "labels do not matter"


def worst(got, expected):
    return max(float((got[name] - expected[name]).abs().max()) for name in got if got[name] is not None)


class Learned(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, reps):
        return batch_loss(self.scale * reps)


@retained
@pytest.mark.parametrize("is_function", [False, True])
def test_a_parameter_of_the_loss_has_its_gradient(is_function, retain):
    model, learned = Tower(), Learned()
    expected = expected_of(learned(model(x)), model, learned)
    encoder = (lambda x: model(x)) if is_function else model
    GradientCache(encoder, learned, CHUNK, retain=retain)(x).backward()
    assert_equal(taken(model, learned), expected)
    assert float(expected["1.scale"].abs()) > 1e-3


@retained
@pytest.mark.parametrize("is_function", [False, True])
def test_dropout_draws_the_same_masks(is_function, retain):
    """The reference: the chunks of the first pass from the same random state, in one graph."""
    model = Tower(dropout=0.5)
    torch.manual_seed(6)
    expected = expected_of(batch_loss(torch.cat([model(chunk) for chunk in x.split(CHUNK)])), model)
    end = torch.get_rng_state()
    torch.manual_seed(6)
    encoder = (lambda x: model(x)) if is_function else model
    loss = GradientCache(encoder, batch_loss, CHUNK, retain=retain)(x)
    torch.rand(3)  # whatever happens in between
    model.eval()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(before, torch.get_rng_state()), "the second pass moves no generator"
    assert not model.training
    assert not model.body[2].training, "the mode is the caller's again"
    assert_equal(taken(model), expected)
    torch.manual_seed(6)
    batch_loss(torch.cat([model.train()(chunk) for chunk in x.split(CHUNK)]))
    assert torch.equal(end, torch.get_rng_state())
    assert worst(expected, expected_of(batch_loss(model.eval()(x)), model)) > 1e-3, "dropout was not active"


@retained
@pytest.mark.parametrize("leaves_before_backward", [True, False])
def test_the_second_pass_autocasts_as_the_first_did(retain, leaves_before_backward):
    model, dtypes = Tower().float(), []
    model.body.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    exact = expected_of(batch_loss(model(x.float())), model)
    dtypes.clear()
    cache = GradientCache(model, batch_loss, CHUNK, retain=retain)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cache(x.float())
        if not leaves_before_backward:
            loss.backward()
    if leaves_before_backward:
        loss.backward()
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 4 + {0: 4, 1: 3, "all": 0}[retain]
    found = taken(model)
    for name, grad in exact.items():
        if grad is not None:
            assert 1e-5 < float((found[name] - grad).norm() / grad.norm()) < 0.05, (
                "bf16, and no more than that"
            )


@retained
def test_every_factor_goes_into_the_gradient(retain):
    """An fp16 scaler, three accumulated batches and a weight, all at once."""
    model, scaler = Tower(), GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = [samples(SIZE, seed=seed) for seed in range(3)]
    expected = expected_of(sum(batch_loss(model(batch)) for batch in batches), model, times=0.5 / 3)
    cache = GradientCache(model, batch_loss, CHUNK, retain=retain)
    for batch in batches:
        scaler.scale(0.5 * cache(batch) / 3).backward()
    raw = gradients(model)["a.weight"]
    scaler.unscale_(optimizer)
    torch.testing.assert_close(raw, 1024 * model.a.weight.grad)
    assert_equal(taken(model), expected)


@pytest.fixture
def accelerators():
    yield
    forget_accelerators()


@retained
def test_every_factor_of_an_accelerator_goes_into_the_gradient(retain, accelerators):
    batches = [samples(SIZE, seed=seed) for seed in range(3)]
    model = Tower()
    expected = expected_of(sum(batch_loss(model(batch)) for batch in batches), model, times=0.5 / 3)
    scaler = GradScaler("cpu", init_scale=1024.0)
    prepared = prepare(ONE_PROCESS, model, scaler=scaler, gradient_accumulation_steps=3)
    cache = GradientCache(prepared.encoder, batch_loss, CHUNK, prepared.accelerator, retain)
    for batch in batches:
        with prepared.accelerator.accumulate(prepared.encoder):
            prepared.accelerator.backward(0.5 * cache(batch))
    scaler.unscale_(prepared.optimizer.optimizer)
    assert_equal(taken(model), expected)


def without_graph(kind):
    return {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[kind]()


@retained
@pytest.mark.parametrize("kind", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("loss_fn", [CLIPLoss(), dense.clip_loss])
def test_without_grad_mode_it_is_the_loss_alone(kind, retain, loss_fn):
    encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
    exact, counts, graphs = full_batch(encoder, batch).detach(), {"image": 0, "text": 0}, []

    def count(_, args, kwargs, outputs):
        for name, inputs in kwargs.items():
            counts[name] += len(next(iter(inputs.values())))
            graphs.append(outputs[name].requires_grad)

    encoder.register_forward_hook(count, with_kwargs=True)
    with without_graph(kind):
        loss = GradientCache(encoder, loss_fn, CHUNK, retain=retain)(batch)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0, check_layout=False)
    assert not loss.requires_grad
    assert counts == {"image": SIZE, "text": SIZE}
    assert not any(graphs)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_an_evaluation_between_forward_and_backward_changes_nothing():
    model = Tower(dropout=0.5)
    cache = GradientCache(model, batch_loss, CHUNK)
    torch.manual_seed(6)
    expected = expected_of(cache(x), model)
    torch.manual_seed(6)
    loss = cache(x)
    model.eval()
    with torch.no_grad():
        cache(y)
    model.train()
    assert_equal(expected_of(loss, model), expected)


@pytest.mark.parametrize("first", [{}, {"retain_graph": True}])
def test_a_second_backward_pass_is_refused(first):
    model = Tower()
    loss = GradientCache(model, batch_loss, CHUNK)(x)
    loss.backward(**first)
    before = gradients(model)
    with pytest.raises(ValueError, match=r"expected one backward pass .* Call cache\(batch\) again"):
        loss.backward()
    assert_equal(gradients(model), before)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_graph_of_the_gradient_is_refused():
    model = Tower()
    with pytest.raises(ValueError, match="without create_graph"):
        GradientCache(model, batch_loss, CHUNK)(x).backward(create_graph=True)
    with pytest.raises(ValueError, match="without create_graph"):
        torch.autograd.grad(GradientCache(model, batch_loss, CHUNK)(x), model.a.weight, create_graph=True)


def test_weights_that_have_changed_are_refused():
    model = Tower()
    cache, optimizer = GradientCache(model, batch_loss, CHUNK), torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = cache(x), cache(y)
    first.backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"before they change, as in optimizer\.step"):
        second.backward()


@retained
@pytest.mark.parametrize("together", [True, False])
def test_two_pending_losses(together, retain):
    model = Tower()
    expected = expected_of(batch_loss(model(x)) + 3 * batch_loss(model(y)), model)
    cache = GradientCache(model, batch_loss, CHUNK, retain=retain)
    first, second = cache(x), cache(y)
    for loss in [first + 3 * second] if together else [3 * second, first]:
        loss.backward()
    assert_equal(taken(model), expected)


@retained
@pytest.mark.parametrize("cached_first", [True, False])
def test_adds_up_with_any_other_loss(cached_first, retain):
    model = Tower()
    expected = expected_of(batch_loss(model(x)) + model(y).square().mean(), model)
    cache = GradientCache(model, batch_loss, CHUNK, retain=retain)
    terms = [lambda: cache(x), lambda: model(y).square().mean()]
    sum(term() for term in (terms if cached_first else terms[::-1])).backward()
    assert_equal(taken(model), expected)


def test_gradients_can_be_asked_for():
    model = Tower()
    expected = expected_of(batch_loss(model(x)), model)
    names, weights = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(GradientCache(model, batch_loss, CHUNK)(x), weights, allow_unused=True)
    assert_equal({f"0.{name}": grad for name, grad in zip(names, grads, strict=True)}, expected)


class Sum(nn.Module):
    """Weights that autograd hands one and the same tensor as their gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = (nn.Parameter(torch.randn(5, 6, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return x @ (self.a + self.b).T


@retained
def test_weights_that_share_a_gradient(retain):
    model = Sum()
    expected = expected_of(batch_loss(model(x)), model)
    GradientCache(model, batch_loss, CHUNK, retain=retain)(x).backward()
    assert_equal(taken(model), expected)


@retained
def test_hooks_of_a_weight_see_the_whole_gradient_once(retain):
    model, seen, after = Tower(), [], []
    expected = expected_of(batch_loss(model(x)), model)["0.a.weight"]
    handle = model.a.weight.register_hook(lambda grad: seen.append(grad) or 0.1 * grad)
    model.a.weight.register_post_accumulate_grad_hook(lambda weight: after.append(weight.grad.clone()))
    cache = GradientCache(model, batch_loss, CHUNK, retain=retain)
    cache(x).backward()
    assert len(seen) == len(after) == 1
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(after[0], 0.1 * expected)
    handle.remove()
    model.zero_grad()
    cache(x).backward()
    torch.testing.assert_close(model.a.weight.grad, expected)


def test_weights_outside_of_modules_are_refused():
    model, scale = Tower(), nn.Parameter(torch.ones(5, dtype=torch.float64))
    loss = GradientCache(lambda x: model(x) * scale, batch_loss, CHUNK)(x)
    with pytest.raises(ValueError, match=r"weights belong to modules .* of shapes \[\(5,\)\]"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_of_another_module_are_refused():
    """One that the encoder calls and does not hold."""
    model, other = Tower(), nn.Linear(6, 6).double()
    model.body.insert(0, nn.Tanh())
    model.body[0].forward = lambda x: other(x)
    loss = GradientCache(model, batch_loss, CHUNK)(x)
    with pytest.raises(ValueError, match="weights belong to modules"):
        loss.backward()


def test_inputs_with_a_graph_are_refused():
    model, below = Tower(), nn.Linear(6, 6).double()
    with pytest.raises(ValueError, match="expected inputs without a graph"):
        GradientCache(model, batch_loss, CHUNK)(below(x))


def test_a_loss_that_ignores_a_representation_is_refused():
    loss = GradientCache(Tower(), lambda first, second: batch_loss(first), CHUNK)([x, y])
    with pytest.raises(ValueError, match="a loss of every representation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*torch.utils.checkpoint:UserWarning")
@retained
def test_activations_may_be_checkpointed(retain):
    class Checkpointed(Tower):
        def forward(self, x):
            return self.a(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))

    model = Checkpointed(dropout=0.5)
    torch.manual_seed(6)
    expected = expected_of(batch_loss(torch.cat([model(chunk) for chunk in x.split(CHUNK)])), model)
    torch.manual_seed(6)
    GradientCache(model, batch_loss, CHUNK, retain=retain)(x).backward()
    assert_equal(taken(model), expected)


def test_weights_that_came_after_the_cache_train():
    """As adapters do, or weights that a trainer has moved."""
    model = Tower()
    cache = GradientCache(model, batch_loss, CHUNK)
    model.a, model.b = copy.deepcopy(model.b), model.a
    expected = expected_of(batch_loss(model(x)), model)
    cache(x).backward()
    assert_equal(taken(model), expected)


def test_goes_where_a_trainer_has_moved_the_weights():
    with torch.device("meta"):
        model = nn.Linear(6, 5, dtype=torch.float64)
    cache = GradientCache(model, batch_loss, CHUNK)
    nn.init.eye_(model.to_empty(device="cpu").weight)
    nn.init.zeros_(model.bias)
    expected = expected_of(batch_loss(model(x)), model)
    cache(x).backward()
    assert_equal(taken(model), expected)


class Failing(nn.Module):
    """A tower that runs out of memory once, in the calls that make a graph or in the others."""

    def __init__(self, with_graph, above=2):
        super().__init__()
        self.tower, self.with_graph, self.above, self.raised = Tower(), with_graph, above, 0

    def forward(self, x):
        if torch.is_grad_enabled() == self.with_graph and len(x) > self.above:
            self.raised += 1
            raise torch.OutOfMemoryError("injected")
        return self.tower(x)


def test_out_of_memory_in_the_first_pass_halves_the_chunk():
    model = Failing(with_graph=False)
    expected = expected_of(batch_loss(model.tower(x)), model)
    cache = GradientCache(model, batch_loss, 4, retain=0)
    cache(x).backward()
    assert model.raised == 1
    assert set(cache.chunk_sizes.values()) == {2}
    assert_equal(taken(model), expected)


def test_out_of_memory_in_the_loss_halves_the_chunk():
    model, failures = Tower(), iter([True])
    expected = expected_of(batch_loss(model(x)), model)

    def loss(reps):
        if next(failures, False):
            raise torch.OutOfMemoryError("injected")
        return batch_loss(reps)

    cache = GradientCache(model, loss, 4)
    cache(x).backward()
    assert set(cache.chunk_sizes.values()) == {2}
    assert_equal(taken(model), expected)


def test_out_of_memory_in_the_second_pass_says_what_to_set():
    model = Failing(with_graph=True)
    cache = GradientCache(model, batch_loss, 4, retain=0)
    loss = cache(x)
    with pytest.raises(RuntimeError, match=r"in the backward pass of cache\(batch\).*smaller chunk_size"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    model.above = SIZE
    expected = expected_of(batch_loss(model.tower(x)), model)
    cache(x).backward()
    assert_equal(taken(model), expected)


class Queue(StatefulLoss):
    """As NNCLR: each sample's positive is the nearest row of a queue, which moves once per batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.register_buffer("rows", torch.randn(7, 5, dtype=torch.float64))
        self.moved = 0

    def forward(self, reps):
        nearest = self.rows[(reps.detach() @ self.rows.T).argmax(1)]
        return batch_loss(reps, nearest)

    def update(self, reps):
        self.moved += 1
        self.rows = torch.cat([self.everywhere(reps[None])[:3], self.rows])[:7]


@retained
def test_the_state_of_a_loss_moves_once_after_backward(retain):
    model, loss_fn = Tower(), Queue()
    cache = GradientCache(model, loss_fn, CHUNK, retain=retain)
    for batch in (x, y):
        expected = expected_of(loss_fn(model(batch)), model)
        before = loss_fn.rows.clone()
        with torch.no_grad():
            cache(batch)
        loss = cache(batch)
        assert torch.equal(loss_fn.rows, before)
        loss.backward()
        assert_equal(taken(model), expected)
        torch.testing.assert_close(loss_fn.rows, torch.cat([model(batch)[:3].detach(), before])[:7])
    assert loss_fn.moved == 2


class Terms(AccumulatedLoss):
    """A loss without pairs."""

    def targets(self, reps, batch):
        return None

    def per_sample(self, reps, targets, rows):
        return next(iter(reps.values())).square().sum(1)


def test_an_accumulated_loss_is_refused():
    with pytest.raises(ValueError, match=r"got Terms: call forward_backward\(batch\)"):
        GradientCache(Tower(), Terms(), CHUNK)(x)


def test_a_loss_that_is_kept_keeps_no_representations():
    model = Tower()
    cache = GradientCache(model, batch_loss, CHUNK, retain="all")
    loss = cache(x)
    second_pass = cache.cached_loss.pending()
    assert second_pass.encoded
    loss.backward()
    assert not second_pass.encoded
    assert not second_pass.leaves
    del loss, second_pass
    assert cache.cached_loss.pending() is None


@pytest.mark.parametrize("retain", ["auto", 2])
def test_graphs_that_are_kept_by_a_budget(retain):
    model = Tower()
    expected = expected_of(batch_loss(model(x)), model)
    cache = GradientCache(model, batch_loss, CHUNK, retain=retain, memory_budget=1e6)
    for _ in range(3):
        cache(x).backward()
        assert_equal(taken(model), expected)
    assert retain != "auto" or cache.retention.automatic


def test_batch_norm_moves_its_statistics_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
    reference = copy.deepcopy(model)
    batch_loss(torch.cat([reference(chunk) for chunk in x[:9].split(CHUNK)])).backward()
    cache = GradientCache(model, batch_loss, CHUNK, batch_norm="ghost", retain=1)
    loss = cache(x[:9])
    model.eval()
    with torch.no_grad():
        cache(y[:9])
    loss.backward()
    assert_equal(gradients(model), gradients(reference))
    assert int(model[1].num_batches_tracked) == 3
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean)


def test_an_accelerators_own_loop(accelerators):
    """`accelerator.backward` alone, where the cache was not told of the accelerator."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Tower()
    expected = expected_of(batch_loss(model(x)) + batch_loss(model(y)), model, times=0.5)
    encoder = accelerator.prepare(model)
    cache = GradientCache(encoder, partial(batch_loss), CHUNK)
    for batch in (x, y):
        with accelerator.accumulate(encoder):
            accelerator.backward(cache(batch))
    assert_equal(taken(model), expected)
