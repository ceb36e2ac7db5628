"""A function around a model is treated as the model: its weights, its BatchNorm layers, its device."""

from functools import partial

import pytest
import torch
from torch import nn

from gc_accel import GradientCache
from gc_accel.modules import modules_of
from tests.comparing import assert_equal
from tests.test_gradient_cache import pair_loss, take_gradients

GLOBAL = nn.Linear(3, 2)


def by_global_name(x):
    return GLOBAL(x)


def with_default(x, model=GLOBAL):
    return model(x)


class Holder:
    def __init__(self, model):
        self.model = model

    def encode(self, x):
        return self.model(x)


def test_finds_what_a_callable_holds():
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    towers = {"query": one, "passages": [two]}

    def inner(x):
        return one(x)

    assert modules_of(one) == [one]
    assert modules_of(lambda x: one(x)) == [one]
    assert modules_of(lambda x: inner(x)) == [one]
    assert modules_of(lambda x: towers["query"](x)) == [one, two]
    assert modules_of(partial(lambda model, x: model(x), one)) == [one]
    assert modules_of(one.forward) == [one]
    assert modules_of(Holder(two).encode) == [two]
    assert modules_of(by_global_name) == [GLOBAL]
    assert modules_of(with_default) == [GLOBAL]
    assert modules_of(torch.relu) == []


def batch_and_model(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 4)).double()
    return torch.randn(11, 6, dtype=torch.float64), model


def test_a_step_that_runs_out_of_memory_is_taken_back():
    batch, model = batch_and_model(nn.GELU())
    pair_loss(model(batch)).backward()
    expected = take_gradients(model)
    graphs = []

    def encoder(x):
        if torch.is_grad_enabled():
            graphs.append(len(x))
            if len(graphs) == 3:
                raise torch.OutOfMemoryError("injected")
        return model(x)

    GradientCache(encoder, pair_loss, 4).forward_backward(batch)
    assert max(graphs[3:]) == 2
    assert_equal(take_gradients(model), expected)


def test_a_step_is_not_made_again_on_weights_that_nobody_knows():
    batch, model = batch_and_model()
    hidden = {id(model): model}.values()  # a view, which is not looked into
    calls = []

    def encoder(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("injected")
        return next(iter(hidden))(x)

    assert modules_of(encoder) == []
    with pytest.raises(RuntimeError, match=r"whose weights are not known .pass the module"):
        GradientCache(encoder, pair_loss, 4).forward_backward(batch)


def test_batch_norm_inside_of_a_function_is_refused():
    batch, model = batch_and_model(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="expected no BatchNorm in training mode"):
        GradientCache(lambda x: model(x), pair_loss, 4).forward_backward(batch)
    model.eval()
    pair_loss(model(batch)).backward()
    expected = take_gradients(model)
    GradientCache(lambda x: model(x), pair_loss, 4).forward_backward(batch)
    assert_equal(take_gradients(model), expected)
