"""The class in place of `grad_cache.GradCache`: programs give the gradients that they give without a cache.

The published package takes part wherever it is right, so that both are seen to agree in one run.
"""

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gc_accel.compat.grad_cache import GradCache
from gc_accel.compat.grad_cache.loss import ContrastiveLossWithQueryClosure, SimpleContrastiveLoss
from tests.comparing import assert_equal
from tests.compat_programs import (
    OURS,
    PACKAGES,
    assert_same_step,
    bert,
    image_text_inputs,
    image_text_towers,
    pooled,
    published,
    take_gradients,
    tokens,
)


@pytest.fixture(params=PACKAGES)
def package(request):
    return PACKAGES[request.param]()


class Map(nn.Module):
    """A linear map of one or two inputs."""

    def __init__(self, seed, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(6, 5).double(), nn.Linear(6, 5).double()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, y=None):
        return self.dropout(self.a(x) + (0 if y is None else self.b(y).tanh()))


def rows(size=11, seed=1):
    return torch.randn(size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def contrast(x, y, target=None):
    """The oracle of the loss, over the whole matrix."""
    target = torch.arange(len(x)) * (len(y) // len(x)) if target is None else target
    return F.cross_entropy(x @ y.T, target)


def test_the_image_text_program_of_a_doubter(package):
    image, text = image_text_towers()
    images, captions = image_text_inputs(64)
    cache = package.GradCache(
        models=[image, text], chunk_sizes=16, loss_fn=package.loss.SimpleContrastiveLoss()
    )
    assert_same_step(
        [image, text], lambda: cache(images, captions), lambda: contrast(image(images), text(**captions))
    )


@pytest.mark.parametrize("chunk_sizes", [1, 4, [3, 7], [64, 2]])
def test_two_models_with_chunk_sizes_of_their_own(package, chunk_sizes):
    a, b, x, y = Map(1), Map(2), rows(seed=3), rows(22, seed=4)
    cache = package.GradCache([a, b], chunk_sizes, package.loss.SimpleContrastiveLoss(n_hard_negatives=1))
    assert_same_step([a, b], lambda: cache.cache_step(x, y), lambda: contrast(a(x), b(y)))


def test_a_tied_encoder(package):
    encoder, x, y = bert(), tokens(5, 1), tokens(5, 2, length=7)
    loss = package.loss.SimpleContrastiveLoss()
    cache = package.GradCache([encoder, encoder], 2, loss, get_rep_fn=pooled)
    assert_same_step(
        [encoder],
        lambda: cache(x, y, reduction="mean"),
        lambda: contrast(pooled(encoder(**x)), pooled(encoder(**y))),
    )


def test_three_models(package):
    models, inputs = [Map(1), Map(2), Map(3)], [rows(seed=4), rows(seed=5), rows(seed=6)]

    def loss(x, y, z, weight):
        return contrast(x, y) + weight * contrast(y, z)

    cache = package.GradCache(models, 4, loss)
    assert_same_step(
        models,
        lambda: cache(*inputs, weight=0.3),
        lambda: loss(*(model(x) for model, x in zip(models, inputs, strict=True)), weight=0.3),
    )


@pytest.mark.parametrize("kind", ["tensor", "list", "dict", "UserDict", "list and dict"])
def test_kinds_of_inputs(package, kind):
    a, b, x, y, z = Map(1), Map(2), rows(seed=3), rows(seed=4), rows(seed=5)
    inputs = {
        "tensor": x,
        "list": [x, y],
        "dict": {"x": x, "y": y},
        "UserDict": UserDict({"x": x, "y": y}),
        "list and dict": ([x], {"y": y}),
    }[kind]
    cache = package.GradCache([a, b], 3, package.loss.SimpleContrastiveLoss())
    direct = a(x) if kind == "tensor" else a(x, y)
    assert_same_step([a, b], lambda: cache(inputs, z), lambda: contrast(direct, b(z)))


def test_other_inputs_through_split_input_fn(package):
    embedding = nn.Embedding(30, 5).double()
    texts, y, b = ["a" * n for n in range(11)], rows(), Map(2)

    def split(inputs, size):
        parts = [inputs[i : i + size] for i in range(0, len(inputs), size)]
        return [[part] for part in parts] if isinstance(inputs, list) else parts

    def model(words):
        return embedding(torch.tensor([len(word) for word in words]))

    cache = package.GradCache([model, b], 4, package.loss.SimpleContrastiveLoss(), split_input_fn=split)
    assert_same_step([embedding, b], lambda: cache(texts, y), lambda: contrast(model(texts), b(y)))


def test_dropout_is_that_of_the_first_pass(package):
    a, b, x, y = bert(1, dropout=0.5), bert(2, dropout=0.5), tokens(11, 1), tokens(11, 2)
    cache = package.GradCache([a, b], 4, package.loss.SimpleContrastiveLoss(), get_rep_fn=pooled)

    def in_chunks(model, inputs):
        parts = zip(inputs["input_ids"].split(4), inputs["attention_mask"].split(4), strict=True)
        return torch.cat([pooled(model(ids, mask)) for ids, mask in parts])

    def one_graph():
        torch.manual_seed(9)
        return contrast(in_chunks(a, x), in_chunks(b, y))

    def cached():
        torch.manual_seed(9)
        return cache(x, y)

    assert_same_step([a, b], cached, one_graph)
    position = torch.get_rng_state()
    dropped = one_graph()
    assert torch.equal(position, torch.get_rng_state()), "it stands where the first pass left it"
    assert abs(dropped - contrast(in_chunks(a.eval(), x), in_chunks(b.eval(), y))) > 1e-3


def test_outputs_of_encoders_outside_the_cache_get_their_gradient(package):
    a, b, other, x, y, z = Map(1), Map(2), Map(3), rows(seed=4), rows(seed=5), rows(seed=6)

    def loss(first, second, third):
        return contrast(first, second) + contrast(second, third)

    cache = package.GradCache([a, b], 4, loss)
    assert_same_step([a, b, other], lambda: cache(x, y, third=other(z)), lambda: loss(a(x), b(y), other(z)))


def test_queries_from_a_closure(package):
    a, b, x, y = Map(1), Map(2), rows(seed=4), rows(seed=5)
    cache = package.GradCache([b], 4, package.loss.ContrastiveLossWithQueryClosure())
    assert_same_step([a, b], lambda: cache(y, query_closure=lambda: a(x)), lambda: contrast(a(x), b(y)))


class TestRightWherePublishedIsNot:
    def test_a_frozen_tower(self):
        a, b, x, y = Map(1).requires_grad_(False), Map(2), rows(seed=3), rows(seed=4)
        for models, inputs in (([a, b], (x, y)), ([b, a], (y, x))):
            calls = []
            hook = a.register_forward_hook(lambda *args, calls=calls: calls.append(len(args[2])))
            cache = GradCache(models, 4, SimpleContrastiveLoss())
            direct = (lambda: contrast(a(x), b(y))) if models[0] is a else (lambda: contrast(b(y), a(x)))
            assert_same_step(models, lambda cache=cache, inputs=inputs: cache(*inputs), direct)
            hook.remove()
            assert calls == [11, 4, 4, 3, 4], "one direct, a first pass, the first chunk of the second"
        with pytest.raises(RuntimeError, match="does not require grad"):
            published().GradCache([a, b], 4, SimpleContrastiveLoss())(x, y)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_evaluation_without_a_gradient(self, mode):
        a, b, x, y = Map(1), Map(2), rows(seed=3), rows(seed=4)
        with mode():
            loss = GradCache([a, b], 4, SimpleContrastiveLoss())(x, y)
            torch.testing.assert_close(loss, contrast(a(x), b(y)), rtol=1e-12, atol=0)
        assert a.a.weight.grad is None
        with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
            published().GradCache([a, b], 4, SimpleContrastiveLoss())(x, y)

    def test_dropout_in_get_rep_fn_is_replayed(self):
        a, b, x, y = Map(1), Map(2), rows(seed=3), rows(seed=4)
        drop = nn.Dropout(0.5)
        cache = GradCache([a, b], 4, SimpleContrastiveLoss(), get_rep_fn=drop)

        def one_graph():
            torch.manual_seed(9)
            return contrast(*(torch.cat([drop(m(c)) for c in i.split(4)]) for m, i in ((a, x), (b, y))))

        def cached(cache=cache):
            torch.manual_seed(9)
            return cache(x, y)

        assert_same_step([a, b], cached, one_graph)
        theirs = published().GradCache([a, b], 4, SimpleContrastiveLoss(), get_rep_fn=drop)
        with pytest.raises(AssertionError, match="is off by"):
            assert_same_step([a, b], lambda: cached(theirs), one_graph)

    def test_lists_that_are_empty_and_flags_for_the_whole_batch(self):
        a, b, x, y, z = Map(1), Map(2), rows(seed=3), rows(seed=4), rows(seed=5)
        cache = GradCache([a, b], 4, SimpleContrastiveLoss())
        assert_same_step([a, b], lambda: cache(([x], {}), z), lambda: contrast(a(x), b(z)))
        assert_same_step(
            [a, b],
            lambda: cache(([], {"x": x, "y": y}), {"x": z, "y": None}),
            lambda: contrast(a(x, y), b(z)),
        )


class TestRefused:
    """What was silently wrong is a ValueError, before any gradient."""

    def check(self, match, *inputs, models=None, chunk_sizes=4, loss=None, options=(), **kwargs):
        models = models or [Map(1), Map(2)]
        with pytest.raises(ValueError, match=match):
            GradCache(models, chunk_sizes, loss or SimpleContrastiveLoss(), **dict(options))(
                *inputs, **kwargs
            )
        modules = [model for model in models if isinstance(model, nn.Module)]
        assert all(p.grad is None for module in modules for p in module.parameters())

    def test_fewer_chunk_sizes_than_models(self):
        a, b, x, y = Map(1), Map(2), rows(seed=3), rows(seed=4)
        self.check("a chunk size of at least 1 for each of 2 models", x, y, models=[a, b], chunk_sizes=[4])
        published().GradCache([a, b], [4], lambda first, second=1: (first * second).sum())(x, y)
        assert a.a.weight.grad.norm() > 0
        assert b.a.weight.grad is None

    @pytest.mark.parametrize("sizes", [0, [4, 0], [4, 4, 4], []])
    def test_other_chunk_sizes(self, sizes):
        self.check("chunk size", rows(), rows(), chunk_sizes=sizes)

    def test_inputs_of_other_models(self):
        self.check("inputs of each of 2 models, got 1", rows())

    def test_float16_without_a_scaler(self):
        self.check("expected a scaler", rows(), rows(), options={"fp16": True})

    def test_a_representation_that_the_loss_ignores(self):
        self.check(r"ignores those at \[1\]", rows(), rows(), loss=lambda x, y: x.square().sum())

    def test_inputs_that_differ_in_length(self):
        inputs = {"x": rows(11), "y": rows(8)}
        self.check("same number of samples", inputs, rows())
        a, b = Map(1), Map(2)
        published().GradCache([a, b], 4, SimpleContrastiveLoss())(inputs, rows(8))  # drops three in silence
        assert a.a.weight.grad.norm() > 0

    def test_no_samples(self):
        self.check("at least one sample", rows(0), rows(0))

    def test_unknown_inputs(self):
        self.check("give a split_input_fn", ["a", "b"], rows())
        self.check("give a split_input_fn", (rows(), rows()), rows())

    def test_outputs_that_are_no_tensor(self):
        self.check("give a get_rep_fn", tokens(4, 1), tokens(4, 2), models=[bert(), bert()])

    def test_losses_that_are_no_number(self):
        self.check("scalar loss", rows(), rows(), reduction="none")
        self.check("scalar loss", rows(), rows(), loss=lambda x, y: (x * y).sum().detach())

    def test_chunks_of_another_length(self):
        def halves(x, size):
            return [x[:2], x[2:]]

        self.check("as many chunks as pieces", rows(), rows(), options={"split_input_fn": halves})

        def unequal(x, size):
            return [x[:3], x[3:7], x[7:]]

        self.check(r"shape \(4, 5\), got \(3, 5\)", rows(), rows(), options={"split_input_fn": unequal})

    def test_models_that_are_not_distributed(self):
        self.check("DistributedDataParallel", rows(), rows(), no_sync_except_last=True)

    def test_batch_norm_in_training_mode(self):
        models = [nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double(), Map(2)]
        self.check("BatchNorm in training mode", rows(), rows(), models=models)
        self.check("BatchNorm in training mode", rows(), rows(), models=[lambda x: models[0](x), models[1]])
        assert models[0][1].num_batches_tracked == 0
        models[0].eval()
        assert_same_step(
            models,
            lambda: GradCache(models, 4, SimpleContrastiveLoss())(rows(), rows()),
            lambda: contrast(models[0](rows()), models[1](rows())),
        )


@pytest.mark.parametrize("wrapped", [lambda model: model, lambda model: lambda x: model(x)])
def test_ghost_batch_norm_updates_its_statistics_once(wrapped):
    model, b, x, y = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double(), Map(2), rows(12), rows(12)
    cache = GradCache([wrapped(model), b], 4, SimpleContrastiveLoss(), batch_norm="ghost")
    assert_same_step(
        [model, b],
        lambda: cache(x, y),
        lambda: contrast(torch.cat([model(chunk) for chunk in x.split(4)]), b(y)),
    )
    assert model[1].num_batches_tracked == 6, "three chunks of the reference, three of a first pass"


def test_a_scaler_scales_the_gradients_once():
    a, b, x, y = Map(1).float(), Map(2).float(), rows().float(), rows(seed=2).float()
    contrast(a(x), b(y)).backward()
    expected = take_gradients(a, b)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    a.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    loss = GradCache([a, b], 4, SimpleContrastiveLoss(), fp16=True, scaler=scaler)(x, y)
    assert set(seen) == {torch.float16}
    torch.testing.assert_close(loss, contrast(a(x), b(y)).detach(), rtol=1e-3, atol=0)
    found = {name: None if grad is None else grad / 2**10 for name, grad in take_gradients(a, b).items()}
    largest = max(float(grad.norm()) for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is not None:
            assert float((found[name] - grad).norm()) < 5e-3 * largest, name


def test_a_step_inside_of_autocast_loses_no_gradient():
    a, b, x, y = Map(1).float(), Map(2).float(), rows().float(), rows(seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        GradCache([a, b], 4, SimpleContrastiveLoss())(x, y)
    found = take_gradients(a, b)
    contrast(a(x), b(y)).backward()
    assert float((found["0.a.weight"] - a.a.weight.grad).norm() / a.a.weight.grad.norm()) < 0.03


def test_two_steps_add_up():
    a, b, x, y = Map(1), Map(2), rows(seed=3), rows(seed=4)
    cache = GradCache([a, b], 4, SimpleContrastiveLoss())
    cache(x, y)
    once = take_gradients(a, b)
    cache(x, y)
    cache(x, y)
    assert_equal(take_gradients(a, b), {k: None if v is None else 2 * v for k, v in once.items()})


def test_names_of_the_published_package_are_there():
    theirs = published()
    for name in vars(theirs.GradCache):
        assert name.startswith("__") or hasattr(GradCache, name), name
    for name in ("SimpleContrastiveLoss", "DistributedContrastiveLoss", "ContrastiveLossWithQueryClosure"):
        assert hasattr(OURS.loss, name)
    assert ContrastiveLossWithQueryClosure().target_per_qry == 1
