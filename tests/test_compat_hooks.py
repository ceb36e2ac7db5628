"""Subclasses: every method that people override takes effect, with random states that are contexts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gc_accel.compat.grad_cache import GradCache
from gc_accel.compat.grad_cache.context_managers import RandContext
from gc_accel.compat.grad_cache.loss import SimpleContrastiveLoss
from tests.comparing import assert_equal
from tests.compat_programs import assert_same_step, published, take_gradients


def towers(dropout=0.0):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(6, 5), nn.Dropout(dropout)).double() for _ in range(2)]


def batch():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 11, 6, dtype=torch.float64, generator=generator)


def contrast(x, y):
    return F.cross_entropy(x @ y.T, torch.arange(len(x)))


def cache(kind, models, chunk_sizes=4):
    return kind(models, chunk_sizes, SimpleContrastiveLoss())


def seeded(step):
    torch.manual_seed(3)
    return step()


def test_split_inputs():
    class Rows(GradCache):
        def split_inputs(self, model_input, chunk_size):
            return super().split_inputs(torch.stack(model_input), chunk_size)

    models, (x, y) = towers(), batch()
    step = cache(Rows, models)
    assert_same_step(models, lambda: step(list(x), list(y)), lambda: contrast(models[0](x), models[1](y)))


def test_model_call():
    class Doubled(GradCache):
        def model_call(self, model, model_input):
            return model(2 * model_input)

    models, (x, y) = towers(), batch()
    step = cache(Doubled, models)
    assert_same_step(models, lambda: step(x, y), lambda: contrast(models[0](2 * x), models[1](2 * y)))


def test_get_reps():
    class Normalised(GradCache):
        def get_reps(self, model_out):
            return F.normalize(super().get_reps(model_out), dim=-1)

    models, (x, y) = towers(), batch()
    step = cache(Normalised, models)
    assert_same_step(
        models,
        lambda: step(x, y),
        lambda: contrast(F.normalize(models[0](x), dim=-1), F.normalize(models[1](y), dim=-1)),
    )


def test_compute_loss():
    class Scaled(GradCache):
        def compute_loss(self, *reps, factor, **loss_kwargs):
            return factor * super().compute_loss(*reps, **loss_kwargs)

    models, (x, y) = towers(), batch()
    step = cache(Scaled, models)
    assert_same_step(models, lambda: step(x, y, factor=3.0), lambda: 3 * contrast(models[0](x), models[1](y)))


def test_build_cache():
    class Halved(GradCache):
        def build_cache(self, *reps, **loss_kwargs):
            gradients, loss = super().build_cache(*reps, **loss_kwargs)
            return [gradient / 2 for gradient in gradients], loss / 2

    models, (x, y) = towers(), batch()
    step = cache(Halved, models)
    assert_same_step(models, lambda: step(x, y), lambda: contrast(models[0](x), models[1](y)) / 2)


def passes_of_ones_own(base, rand_context):
    """Both passes written by hand, as programs for the published package have them."""

    class ByHand(base):
        def forward_no_grad(self, model, model_inputs):
            states, reps = [], []
            for chunk in model_inputs:
                states.append(rand_context(*self.get_input_tensors(chunk)))
                with torch.no_grad():
                    reps.append(self.get_reps(self.model_call(model, chunk)))
            return torch.cat(reps), states

        def forward_backward(self, model, model_inputs, cached_gradients, random_states, no_sync_except_last):
            seen.append(model)
            for chunk, gradient, state in zip(model_inputs, cached_gradients, random_states, strict=True):
                with state:
                    reps = self.get_reps(self.model_call(model, chunk))
                (reps * gradient).sum().backward()

    seen = []
    return ByHand, seen


@pytest.mark.parametrize("overridden", ["both", "forward_no_grad", "forward_backward"])
def test_passes_of_ones_own_see_the_same_dropout(overridden):
    models, (x, y) = towers(dropout=0.5), batch()
    seeded(lambda: cache(GradCache, models)(x, y))
    expected = take_gradients(*models)
    kind, seen = passes_of_ones_own(GradCache, RandContext)
    if overridden != "both":
        other = {"forward_no_grad", "forward_backward"} - {overridden}
        setattr(kind, *other, getattr(GradCache, *other))
    seeded(lambda: cache(kind, models)(x, y))
    assert_equal(take_gradients(*models), expected)
    assert seen == ([] if overridden == "forward_no_grad" else models)
    seeded(lambda: contrast(models[0].eval()(x), models[1].eval()(y)).backward())
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(take_gradients(*models), expected)


def test_the_same_subclass_of_the_published_package_gives_the_same():
    models, (x, y) = towers(dropout=0.5), batch()
    results = []
    for base, rand_context in ((GradCache, RandContext), (published().GradCache, published().RandContext)):
        kind, _ = passes_of_ones_own(base, rand_context)
        seeded(lambda kind=kind: cache(kind, models)(x, y))
        results.append(take_gradients(*models))
    assert_equal(*results)


def test_get_input_tensors():
    asked = []

    class Asked(GradCache):
        def get_input_tensors(self, model_input):
            asked.append(len(model_input))
            return super().get_input_tensors(model_input)

    models, (x, y) = towers(), batch()
    cache(Asked, models)(x, y)
    assert asked[:3] == [4, 4, 3]


def test_get_input_tensors_strictly():
    models, (x, y) = towers(), batch()
    step = cache(GradCache, models)
    nested = {"x": x, "more": ([y], "caption")}
    assert [id(each) for each in step.get_input_tensors(nested)] == [id(x), id(y)]
    step._get_input_tensors_strict = True
    with pytest.raises(ValueError, match="got str"):
        step.get_input_tensors(nested)


def test_get_input_tensors_of_ones_own_is_asked_within_containers():
    class Bag:
        def __init__(self, tensor):
            self.tensor = tensor

    class Opened(GradCache):
        def get_input_tensors(self, model_input):
            return (
                [model_input.tensor]
                if isinstance(model_input, Bag)
                else super().get_input_tensors(model_input)
            )

    models, (x, y) = towers(), batch()
    tensors = cache(Opened, models).get_input_tensors({"x": x, "more": [Bag(y)]})
    assert [id(each) for each in tensors] == [id(x), id(y)]


def test_a_random_context_may_be_entered_again_and_leaves_no_trace():
    context = RandContext(torch.zeros(1))
    drawn = torch.rand(3)
    position = torch.get_rng_state()
    for _ in range(2):
        with context:
            assert torch.equal(torch.rand(3), drawn)
        assert torch.equal(torch.get_rng_state(), position)
    with pytest.raises(KeyError), context:
        raise KeyError
    assert torch.equal(torch.get_rng_state(), position)
