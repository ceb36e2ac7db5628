"""The compatibility layers on two DDP ranks with different data: exact, and one reduction per model and step."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from gc_accel import losses as streaming
from gc_accel.compat import grad_cache_con_learning as con_learning
from gc_accel.compat.functional import cached, cat_input_tensor, gather_input_tensor
from gc_accel.compat.grad_cache import GradCache
from gc_accel.compat.grad_cache.loss import DistributedContrastiveLoss, SimpleContrastiveLoss
from gc_accel.compat.grad_cache_con_learning.losses import SupConLoss
from gc_accel.losses import dense
from tests.comparing import assert_equal
from tests.compat_programs import (
    bert,
    image_text_inputs,
    image_text_towers,
    pooled,
    published,
    take_gradients,
    tokens,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow  # the ranks import transformers and the published package

SHARES = {"even": (slice(0, 32), slice(32, 64)), "ragged": (slice(0, 39), slice(39, 64))}


def contrast(x, y):
    return F.cross_entropy(x @ y.T, torch.arange(len(x)) * (len(y) // len(x)))


def inputs_of(rows):
    images, captions = image_text_inputs(64)
    return images[rows], {key: value[rows] for key, value in captions.items()}


def map_of(seed):
    torch.manual_seed(seed)
    return nn.Linear(6, 5).double()


def numbers(size=8, seed=1):
    return torch.randn(size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Step:
    """Models of one rank, in DDP, with their reductions counted."""

    def __init__(self, *models):
        self.models, self.reductions = models, []
        self.wrapped = [DistributedDataParallel(model, find_unused_parameters=True) for model in models]
        for number, each in enumerate(self.wrapped):
            each.register_comm_hook(number, self.count)

    def count(self, number, bucket):
        self.reductions.append((number, bucket.index()))
        return allreduce_hook(None, bucket)

    def result(self, loss):
        return loss, take_gradients(*self.models), sorted(self.reductions)


def image_text_step(rank, shares, loss_fn, package=GradCache, **options):
    step = Step(*image_text_towers())
    images, captions = inputs_of(SHARES[shares][rank])
    cache = package(models=step.wrapped, chunk_sizes=16, loss_fn=loss_fn)
    return step.result(cache(images, captions, **options))


def text_step(rank, *seeds):
    """The distributed blocks of the published README: two encoders, or a tied one."""
    step, rows = Step(*map(bert, seeds)), slice(4 * rank, 4 * rank + 4)
    x, y = ({k: v[rows] for k, v in tokens(8, seed).items()} for seed in (1, 2))
    encoders = [step.wrapped[0], step.wrapped[-1]]
    cache = GradCache(models=encoders, chunk_sizes=3, loss_fn=DistributedContrastiveLoss(), get_rep_fn=pooled)
    return step.result(cache(x, y, no_sync_except_last=True, reduction="mean"))


def tied_around_another_step(rank, package=GradCache):
    """Three inputs for two models: the first model is also the last."""
    step, own = Step(map_of(1), map_of(2)), slice(4 * rank, 4 * rank + 4)
    first, second = step.wrapped
    cache = package([first, second, first], 3, triple_contrast)
    return step.result(cache(*(numbers(seed=seed)[own] for seed in (1, 2, 3))))


def triple_contrast(x, y, z):
    loss = DistributedContrastiveLoss()
    return loss(x, y) + loss(y, z)


class ByHand(GradCache):
    """A second pass that knows of no ranks."""

    def forward_backward(self, model, model_inputs, cached_gradients, random_states, no_sync_except_last):
        for chunk, gradient, state in zip(model_inputs, cached_gradients, random_states, strict=True):
            with state:
                reps = self.get_reps(self.model_call(model, chunk))
            (reps * gradient).sum().backward()


def passes_by_themselves_step(rank):
    """Both passes of a model as methods that a step of one's own calls."""
    step, own = Step(map_of(1), map_of(2)), slice(4 * rank, 4 * rank + 4)
    cache = GradCache(step.wrapped, 3, DistributedContrastiveLoss())
    chunked = [cache.split_inputs(numbers(seed=seed)[own], 3) for seed in (1, 2)]
    encoded = [cache.forward_no_grad(*each) for each in zip(step.wrapped, chunked, strict=True)]
    gradients, loss = cache.build_cache(*(rep for rep, _ in encoded))
    for model, chunks, gradient, (_, states) in zip(step.wrapped, chunked, gradients, encoded, strict=True):
        cache.forward_backward(model, chunks, gradient.split(3), states, no_sync_except_last=True)
    return step.result(loss)


def hard_negatives_step(rank, target=None):
    step, own = Step(map_of(1), map_of(2)), slice(4 * rank, 4 * rank + 4)
    candidates = numbers(24, seed=2).view(8, 3, 6)[own].flatten(0, 1)
    cache = GradCache(step.wrapped, [2, 5], DistributedContrastiveLoss(2))
    return step.result(cache(numbers()[own], candidates, target=target, reduction="sum"))


def global_loss_step(rank):
    """A loss of this package, which counts on its engine for the scaling rule."""
    step, own = Step(map_of(1), map_of(2)), slice(5 * rank, 5 * rank + 5 - 2 * rank)
    cache = GradCache(step.wrapped, 2, streaming.CLIPLoss())
    scale = torch.ones(1, dtype=torch.float64)
    return step.result(cache(numbers()[own], numbers(seed=2)[own], logit_scale=scale))


def frozen_step(rank):
    frozen, step, own = map_of(1).requires_grad_(False), Step(map_of(2)), slice(4 * rank, 4 * rank + 4)
    cache = GradCache([frozen, *step.wrapped], 3, DistributedContrastiveLoss())
    return step.result(cache(numbers()[own], numbers(seed=2)[own], no_sync_except_last=True))


def decorated_step(rank):
    """By hand: representations gathered, the loss times W, all but the last chunk in `no_sync`."""
    step, own = Step(map_of(1)), slice(5 * rank, 5 * rank + 5 - 2 * rank)

    @cat_input_tensor
    @gather_input_tensor
    @torch.autocast("cpu", torch.bfloat16)  # which leaves float64 alone
    def loss_fn(x, y, temperature):
        return F.cross_entropy(x @ y.T / temperature, torch.arange(len(x))) * dist.get_world_size()

    chunks = [(numbers()[own], cached(step.wrapped[0])), (numbers(seed=2)[own], cached(step.wrapped[0]))]
    (x, first), (y, second) = (encode(chunk) for chunk, encode in chunks)
    loss = loss_fn([x[:1], x[1:]], y=[y], temperature=torch.tensor(0.5))
    loss.backward()
    with step.wrapped[0].no_sync():
        first(x)
    second(y)
    return step.result(loss.detach() / dist.get_world_size())


def gathered_along(rank):
    rows = torch.arange(6.0).reshape(2, 3)[:, : 2 + rank] + 10 * rank
    return gather_input_tensor(lambda x: x, axis=1)(rows)


def con_learning_step(rank, loss_fn):
    step, own = Step(map_of(1)), slice(4 * rank, 4 * rank + 4)
    views = torch.cat([numbers()[own], numbers(seed=2)[own]])
    cache = con_learning.GradCache(step.wrapped[0], 3, loss_fn)
    return step.result(cache(views, torch.arange(8)[own] % 3, no_sync_except_last=True))


def refused(rank):
    wrapped = DistributedDataParallel(map_of(1))
    with pytest.raises(ValueError, match=r"got those at \[1\] without: their gradients would never"):
        GradCache([wrapped, map_of(2)], 2, SimpleContrastiveLoss())(numbers(), numbers())
    with pytest.raises(ValueError, match="without static_graph"):
        GradCache([DistributedDataParallel(map_of(1), static_graph=True)], 2, SimpleContrastiveLoss())
    with pytest.raises(ValueError, match='got "none"'):
        DistributedContrastiveLoss()(numbers(), numbers(), reduction="none")
    with pytest.raises(ValueError, match=r"each of the 16 queries of all ranks, got shape \(8,\)"):
        DistributedContrastiveLoss()(numbers(), numbers(), target=torch.arange(8))
    assert wrapped.module.weight.grad is None


def all_steps(rank):
    """Everything that two ranks are needed for, in one process group."""
    refused(rank)
    theirs = published()
    return {
        "data": inputs_of(SHARES["even"][rank])[0],
        "local": image_text_step(rank, "even", SimpleContrastiveLoss(), no_sync_except_last=True),
        "global": image_text_step(rank, "even", DistributedContrastiveLoss(), no_sync_except_last=True),
        "global, flag left out": image_text_step(rank, "even", DistributedContrastiveLoss()),
        "global, in a function": image_text_step(
            rank, "even", lambda x, y: DistributedContrastiveLoss()(x, y)
        ),
        "ragged": image_text_step(rank, "ragged", DistributedContrastiveLoss()),
        "averaged": image_text_step(rank, "even", DistributedContrastiveLoss(average_over_ranks=True)),
        "published": image_text_step(
            rank, "even", theirs.loss.DistributedContrastiveLoss(), theirs.GradCache, no_sync_except_last=True
        ),
        "published, local": image_text_step(
            rank, "even", theirs.loss.SimpleContrastiveLoss(), theirs.GradCache, no_sync_except_last=True
        ),
        "two encoders": text_step(rank, 7, 8),
        "tied": text_step(rank, 7),
        "tied around another": tied_around_another_step(rank),
        "tied around another, by hand": tied_around_another_step(rank, ByHand),
        "passes by themselves": passes_by_themselves_step(rank),
        "hard negatives": hard_negatives_step(rank),
        "target": hard_negatives_step(rank, torch.arange(8) * 2),
        "global loss": global_loss_step(rank),
        "frozen": frozen_step(rank),
        "decorated": decorated_step(rank),
        "axis": gathered_along(rank),
        "con, local": con_learning_step(rank, SupConLoss()),
        "con, global": con_learning_step(rank, streaming.SupConLoss(base_temperature=0.07)),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    results = run_on_ranks(all_steps, 2, tmp_path_factory.mktemp("ranks"), timeout=240)
    assert len(results) == 2
    assert not torch.equal(results[0]["data"][:1], results[1]["data"][:1]), "ranks must hold different data"
    return results


def assert_ranks(two_ranks, name, models, loss, factor=1.0):
    """Both ranks hold `factor` times the gradient of one process, after one reduction per model."""
    loss.backward()
    expected = take_gradients(*models)
    for result in two_ranks:
        value, grads, reductions = result[name]
        torch.testing.assert_close(value, loss.detach(), rtol=1e-11, atol=0)
        assert_equal(grads, {k: None if v is None else factor * v for k, v in expected.items()})
        assert reductions == [(number, 0) for number in range(len(models))]


def image_text_loss():
    image, text = towers = image_text_towers()
    images, captions = inputs_of(slice(0, 64))
    return towers, contrast(image(images), text(**captions))


@pytest.mark.parametrize("name", ["global", "global, flag left out", "global, in a function", "ragged"])
def test_the_image_text_program_equals_one_process_with_the_whole_batch(two_ranks, name):
    assert_ranks(two_ranks, name, *image_text_loss())


def test_a_loss_of_one_rank_is_averaged_as_without_a_cache(two_ranks):
    image, text = towers = image_text_towers()
    losses = []
    for rows in SHARES["even"]:
        images, captions = inputs_of(rows)
        losses.append(contrast(image(images), text(**captions)))
    (sum(losses) / 2).backward()
    expected = take_gradients(*towers)
    for loss, result in zip(losses, two_ranks, strict=True):
        for name in ("local", "published, local"):
            torch.testing.assert_close(result[name][0], loss.detach(), rtol=1e-11, atol=0)
            assert_equal(result[name][1], expected)
        assert result["local"][2] == [(0, 0), (1, 0)]


@pytest.mark.parametrize("name", ["averaged", "published"])
def test_the_published_scale_is_one_over_the_world_size_and_has_a_name(two_ranks, name):
    assert_ranks(two_ranks, name, *image_text_loss(), factor=0.5)


def test_text_encoders_and_a_tied_one_that_is_reduced_once(two_ranks):
    a, b = bert(7), bert(8)
    x, y = tokens(8, 1), tokens(8, 2)
    assert_ranks(two_ranks, "two encoders", [a, b], contrast(pooled(a(**x)), pooled(b(**y))))
    assert_ranks(two_ranks, "tied", [a], contrast(pooled(a(**x)), pooled(a(**y))))


@pytest.mark.parametrize("name", ["tied around another", "tied around another, by hand"])
def test_a_model_that_is_listed_twice_is_reduced_once_wherever_it_stands(two_ranks, name):
    a, b = map_of(1), map_of(2)
    x, y, z = a(numbers()), b(numbers(seed=2)), a(numbers(seed=3))
    assert_ranks(two_ranks, name, [a, b], contrast(x, y) + contrast(y, z))


def test_passes_outside_of_a_step_reduce_with_their_last_chunk(two_ranks):
    a, b = map_of(1), map_of(2)
    assert_ranks(two_ranks, "passes by themselves", [a, b], contrast(a(numbers()), b(numbers(seed=2))))


def test_hard_negatives_follow_their_positive_on_every_rank(two_ranks):
    a, b = map_of(1), map_of(2)
    x, y = a(numbers()), b(numbers(24, seed=2))
    assert_ranks(two_ranks, "hard negatives", [a, b], 8 * contrast(x, y))
    x, y = a(numbers()), b(numbers(24, seed=2))
    loss = F.cross_entropy(x @ y.T, torch.arange(8) * 2, reduction="sum")
    assert_ranks(two_ranks, "target", [a, b], loss)


def test_a_global_loss_gets_the_factor_of_the_scaling_rule(two_ranks):
    a, b, scale = map_of(1), map_of(2), torch.ones(1, dtype=torch.float64)
    loss = dense.clip_loss(a(numbers()), b(numbers(seed=2)), scale)
    assert_ranks(two_ranks, "global loss", [a, b], loss)


def test_a_frozen_tower_needs_no_wrapper(two_ranks):
    frozen, b = map_of(1), map_of(2)
    assert_ranks(two_ranks, "frozen", [b], contrast(frozen(numbers()), b(numbers(seed=2))))


def test_the_decorators_gather_by_position_and_keyword_from_ragged_ranks(two_ranks):
    model = map_of(1)
    loss = contrast(model(numbers()) / 0.5, model(numbers(seed=2)))
    assert_ranks(two_ranks, "decorated", [model], loss)


def test_gathering_along_another_axis(two_ranks):
    for result in two_ranks:
        assert result["axis"].tolist() == [[0, 1, 10, 11, 12], [3, 4, 13, 14, 15]]


def test_views_of_one_rank_and_of_all(two_ranks):
    model = map_of(1)
    views = torch.stack([model(numbers()), model(numbers(seed=2))], dim=1)
    loss = dense.supcon_loss(views, torch.arange(8) % 3, base_temperature=0.07)
    assert_ranks(two_ranks, "con, global", [model], loss)
    parts = torch.stack([model(numbers()), model(numbers(seed=2))], dim=1).split(4)
    labels = (torch.arange(8) % 3).split(4)
    losses = [
        dense.supcon_loss(part, own, base_temperature=0.07) for part, own in zip(parts, labels, strict=True)
    ]
    (sum(losses) / 2).backward()
    expected = take_gradients(model)
    for own, result in zip(losses, two_ranks, strict=True):
        torch.testing.assert_close(result["con, local"][0], own.detach(), rtol=1e-11, atol=0)
        assert_equal(result["con, local"][1], expected)
