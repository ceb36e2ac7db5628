"""The decorators: loops that collect small batches give the gradient of the large one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gc_accel import functional
from gc_accel.compat.functional import cached, cat_input_tensor, gather_input_tensor
from gc_accel.compat.grad_cache import functional as published_names
from tests.comparing import assert_equal
from tests.compat_programs import PACKAGES, bert, pooled, published, take_gradients, tokens


@pytest.fixture(params=PACKAGES)
def package(request):
    return PACKAGES[request.param]()


def contrast(x, y, scale=1.0):
    return F.cross_entropy(scale * x @ y.T, torch.arange(len(x)))


def run(call, loss_fn, model, chunks, **kwargs):
    """A step by hand: first pass of all chunks, loss, second pass of all."""
    encoded = [[call(model, side) for side in chunk] for chunk in chunks]
    loss = loss_fn(*([rep for rep, _ in side] for side in zip(*encoded, strict=True)), **kwargs)
    loss.backward()
    for chunk in encoded:
        for rep, again in chunk:
            again(rep)
    return loss.detach()


def batches(number=5):
    return [(tokens(3, 2 * i), tokens(3, 2 * i + 1)) for i in range(number)]


def encode(model, inputs):
    return pooled(model(**inputs))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_loop_over_small_batches(package, dropout):
    model, chunks = bert(dropout=dropout), batches()
    torch.manual_seed(1)
    reps = [[encode(model, side) for side in chunk] for chunk in chunks]
    expected_loss = contrast(*(torch.cat(side) for side in zip(*reps, strict=True)))
    expected_loss.backward()
    expected = take_gradients(model)
    torch.manual_seed(1)
    loss = run(package.cached(encode), package.cat_input_tensor(contrast), model, chunks)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=0)
    assert_equal(take_gradients(model), expected)
    if dropout:
        run(cached(encode), cat_input_tensor(contrast), model.eval(), chunks)
        with pytest.raises(AssertionError, match="is off by"):
            assert_equal(take_gradients(model), expected)


def test_several_representations_per_call(package):
    model, x = nn.Linear(6, 5).double(), torch.randn(3, 4, 6, dtype=torch.float64)

    def both(inputs, *, shift):
        return model(inputs), model(inputs + shift).tanh()

    encoded = [package.cached(both)(chunk, shift=1.0) for chunk in x]
    firsts, seconds, agains = zip(*encoded, strict=True)
    contrast(torch.cat(firsts), torch.cat(seconds)).backward()
    for again, *reps in zip(agains, firsts, seconds, strict=True):
        again(tuple(reps))
    found = take_gradients(model)
    contrast(*both(x.flatten(0, 1), shift=1.0)).backward()
    assert_equal(found, take_gradients(model))


def test_keyword_arguments_are_joined():
    x, y = torch.randn(2, 4, 5).unbind()
    loss = cat_input_tensor(contrast)(x=list(x.split(1)), y=list(y.split(3)), scale=2.0)
    torch.testing.assert_close(loss, contrast(x, y, 2.0))
    with pytest.raises(ValueError, match="unpack"):
        published().cat_input_tensor(contrast)(x=list(x.split(1)), y=list(y.split(3)), scale=2.0)


def test_what_is_no_list_of_tensors_goes_through():
    same = cat_input_tensor(lambda *args: args)
    values = ([], [1, 2], (torch.ones(1), torch.ones(1)), None, torch.ones(2))
    assert all(a is b for a, b in zip(same(*values), values, strict=True))


def test_gathering_in_one_process_changes_nothing():
    x, y = torch.randn(2, 4, 5, requires_grad=True).unbind()
    torch.testing.assert_close(gather_input_tensor(contrast)(x, y=y, scale=2.0), contrast(x, y, 2.0))


def test_a_frozen_model_is_left_alone():
    a, b, x = (
        nn.Linear(6, 5).double().requires_grad_(False),
        nn.Linear(6, 5).double(),
        torch.randn(4, 6).double(),
    )
    (u, again_a), (v, again_b) = cached(lambda: a(x))(), cached(lambda: b(x))()
    contrast(u, v).backward()
    again_a(u)
    again_b(v)
    found = take_gradients(a, b)
    contrast(a(x), b(x)).backward()
    assert_equal(found, take_gradients(a, b))


def test_evaluation_without_a_gradient():
    model, x = nn.Linear(6, 5), torch.randn(4, 6)
    with torch.no_grad():
        rep, _ = cached(model)(x)
        torch.testing.assert_close(contrast(rep, rep), contrast(model(x), model(x)))


def test_autocast_and_a_scaler():
    model, x = nn.Linear(6, 5), torch.randn(2, 4, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    half = torch.autocast("cpu", torch.bfloat16)
    encoded = [cached(half(model.forward))(chunk) for chunk in x]
    assert all(rep.dtype == torch.float32 for rep, _ in encoded)
    loss = cat_input_tensor(half(contrast))([rep for rep, _ in encoded], [rep for rep, _ in encoded])
    scaler.scale(loss).backward()
    for rep, again in encoded:
        again(rep)
    found = model.weight.grad / 2**8
    model.zero_grad()
    contrast(model(x.flatten(0, 1)), model(x.flatten(0, 1))).backward()
    assert float((found - model.weight.grad).norm() / model.weight.grad.norm()) < 0.03


class TestRefused:
    def test_a_device_whose_random_state_was_not_noted(self):
        with pytest.raises(ValueError, match=r"representations on cpu.*got \['meta'\]"):
            cached(lambda: torch.ones(2, 3, device="meta"))()

    def test_leaves_without_a_gradient(self):
        rep, again = cached(nn.Linear(6, 5))(torch.randn(4, 6))
        with pytest.raises(ValueError, match=r"gradient in every representation, got none in \[0\]"):
            again(rep)

    def test_leaves_of_another_call(self):
        rep, again = cached(nn.Linear(6, 5))(torch.randn(4, 6))
        other, _ = cached(nn.Linear(6, 5))(torch.randn(3, 6))
        with pytest.raises(ValueError, match=r"shapes \[\(4, 5\)\], got \[\(3, 5\)\]"):
            again(other)
        with pytest.raises(ValueError, match=r"got \[\(4, 5\), \(3, 5\)\]"):
            again((rep, other))

    def test_outputs_that_are_no_tensors(self):
        with pytest.raises(ValueError, match=r"got \['str', 'str'\]: return what the loss takes"):
            cached(lambda **inputs: bert()(**inputs))(**tokens(3, 1))


def test_the_published_names_are_the_same_functions():
    assert published_names.cached is cached
    assert published_names.cat_input_tensor is cat_input_tensor
    assert published_names.gather_input_tensor is gather_input_tensor


@pytest.mark.parametrize("place", ["tensor", "module", "mapping", "sequence", "the function"])
def test_the_random_state_of_the_device_of_the_arguments_is_noted(place, monkeypatch):
    tensor, module = torch.ones(2, device="meta"), nn.Linear(6, 5, device="meta")
    arguments = {
        "tensor": tensor,
        "module": module,
        "mapping": {"x": {"y": tensor}},
        "sequence": [(1, tensor)],
        "the function": 1,
    }[place]
    noted = spy(monkeypatch)
    func = module if place == "the function" else print
    with pytest.raises(Noted):
        cached(func)(arguments, torch.ones(1))
    with pytest.raises(Noted):
        cached(func)(torch.ones(1), key=arguments)
    assert noted == [torch.device("meta")] * 2


def test_without_any_it_is_that_of_the_current_cuda_device(monkeypatch):
    noted = spy(monkeypatch)
    with pytest.raises(Noted, match="cpu"):
        cached(lambda: None)()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(Noted, match="cuda:3"):
        cached(lambda: None)()
    assert noted == [torch.device("cpu"), torch.device("cuda:3")]


class Noted(Exception):
    pass


def spy(monkeypatch):
    """The devices that `encode` is asked to replay; nothing is encoded, for this machine may not have them."""
    noted = []

    def encode(fn, chunk, *, device):
        noted.append(device)
        raise Noted(str(device))

    monkeypatch.setattr(functional, "encode", encode)
    return noted


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", ["cuda", "cpu"])
def test_dropout_is_replayed_on_a_gpu(inputs):
    """The published decorator notes the state of the CPU's generator only."""
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5)).double().cuda()
    x = torch.randn(2, 4, 6, dtype=torch.float64, device=inputs)

    def function(chunk):
        return model(chunk.cuda())

    torch.cuda.manual_seed(1)
    reps = torch.cat([function(chunk) for chunk in x])
    (reps @ reps.T).logsumexp(1).sum().backward()
    expected = take_gradients(model)
    torch.cuda.manual_seed(1)
    encoded = [cached(function)(chunk) for chunk in x]
    joined = torch.cat([rep for rep, _ in encoded])
    (joined @ joined.T).logsumexp(1).sum().backward()
    for rep, again in encoded:
        again(rep)
    assert_equal(take_gradients(model), expected)
