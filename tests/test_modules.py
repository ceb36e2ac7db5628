"""A function around a model is treated as the model: its weights, its BatchNorm layers, its device."""

from functools import partial

import pytest
import torch
from torch import nn

from gc_accel import GradientCache
from gc_accel.state.modules import modules_of
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


class Callable:
    def __init__(self, model):
        self.model, self.other = model, nn.Linear(1, 1)

    def __call__(self, x):
        return self.model(x)


class Slotted:
    __slots__ = ("model",)

    def encode(self, x):
        return self.model(x)


def test_finds_what_a_callable_holds():
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    towers = {"query": one, "passages": [two]}
    holder = Holder(two)

    def inner(x):
        return one(x)

    assert modules_of(one) == [one]
    assert modules_of(lambda x: one(x)) == [one]
    assert modules_of(lambda x: inner(x)) == [one]
    assert modules_of(lambda x: towers["query"](x)) == [one, two]
    assert modules_of(lambda x: holder.model(x)) == [two]
    assert modules_of(partial(lambda model, x: model(x), one)) == [one]
    assert modules_of(one.forward) == [one]
    assert modules_of(holder.encode) == [two]
    assert modules_of(Callable(two)) == [two], "and not what its code does not name"
    assert modules_of(by_global_name) == [GLOBAL]
    assert modules_of(with_default) == [GLOBAL]
    assert modules_of(torch.relu) == []
    assert modules_of(Slotted().encode) == []


def test_an_attribute_is_not_taken_for_a_global_of_the_same_name():
    class Other:
        def __init__(self):
            self.GLOBAL = torch.relu

    other = Other()
    assert modules_of(lambda x: other.GLOBAL(x)) == []


def test_a_variable_without_a_value_yet_is_passed_over():
    def encoder(x):
        return later(x)

    assert modules_of(encoder) == []
    later = nn.Linear(3, 2)
    assert modules_of(encoder) == [later]


def batch_and_model(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 4)).double()
    return torch.randn(11, 6, dtype=torch.float64), model


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_step_of_a_function_is_taken_back_until_its_second_pass(call):
    """From there on gradients may have gone into weights that the function does not show."""
    batch, model = batch_and_model(nn.GELU())
    pair_loss(model(batch)).backward()
    expected = take_gradients(model)
    calls = []

    def encoder(x):
        calls.append(len(x))
        if len(calls) == call:
            raise torch.OutOfMemoryError("injected")
        return model(x)

    cache = GradientCache(encoder, pair_loss, 4)
    if call > 3:  # chunks of the first pass
        with pytest.raises(RuntimeError, match=r"second pass of a function.*pass the module itself"):
            cache.forward_backward(batch)
        return
    cache.forward_backward(batch)
    assert set(cache.chunk_sizes.values()) == {2}
    assert_equal(take_gradients(model), expected)


def test_batch_norm_inside_of_a_function_is_refused():
    batch, model = batch_and_model(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="expected no BatchNorm in training mode"):
        GradientCache(lambda x: model(x), pair_loss, 4).forward_backward(batch)
    model.eval()
    pair_loss(model(batch)).backward()
    expected = take_gradients(model)
    GradientCache(lambda x: model(x), pair_loss, 4).forward_backward(batch)
    assert_equal(take_gradients(model), expected)
