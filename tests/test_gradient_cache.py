"""A configuration never changes the gradient: chunk size, retained graphs, input structure, streams."""

from collections import UserDict

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from gc_accel import DualEncoder, GradientCache
from gc_accel.losses import CLIPLoss, SigLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import MODELS, dual_encoder, image_text_batch

SIZE = 11
CHUNK_SIZES = (1, 3, 16, 64)
RETAIN = (0, 1, "all")


def full_batch(encoder, loss_fn, batch):
    """The oracle: one forward of everything, one backward, no cache and no streaming."""
    streams = {name: {k: batch[k] for k in keys if k in batch} for name, keys in encoder.streams.items()}
    loss = loss_fn(**encoder(**streams))
    loss.backward()
    return loss.detach(), take_gradients(encoder)


def take_gradients(module):
    taken = gradients(module)
    module.zero_grad(set_to_none=True)
    return taken


def dense_loss(encoder):
    return dense.siglip_loss if "logit_bias" in encoder.global_names else dense.clip_loss


def streaming_loss(encoder):
    return SigLIPLoss() if "logit_bias" in encoder.global_names else CLIPLoss()


@pytest.mark.parametrize("retain", RETAIN)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_full_batch(kind, chunk_size, retain):
    encoder, batch = dual_encoder(kind), image_text_batch(SIZE)
    expected_loss, expected = full_batch(encoder, dense_loss(encoder), batch)
    loss = GradientCache(encoder, streaming_loss(encoder), chunk_size, retain=retain).forward_backward(batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_equal(take_gradients(encoder), expected)
    for name in encoder.global_names:
        assert float(expected[f"model.{name}"].abs()) > 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_full_batch_in_float32(kind):
    encoder, batch = dual_encoder(kind).float(), image_text_batch(SIZE)
    batch["pixel_values"] = batch["pixel_values"].float()
    _, expected = full_batch(encoder, dense_loss(encoder), batch)
    GradientCache(encoder, streaming_loss(encoder), 3).forward_backward(batch)
    assert_equal(take_gradients(encoder), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9])
def test_any_batch_size_with_a_last_chunk_of_one(size):
    encoder, batch = dual_encoder("siglip"), image_text_batch(size)
    expected_loss, expected = full_batch(encoder, dense.siglip_loss, batch)
    loss = GradientCache(encoder, SigLIPLoss(), chunk_size=4).forward_backward(batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_equal(take_gradients(encoder), expected)


@pytest.mark.parametrize("retain", [0, 1, 2, 100])
@pytest.mark.parametrize(
    "sizes", [{"image": 2, "text": 5}, {"image": 7, "text": 1}, {"image": 64, "text": 3}]
)
def test_streams_have_their_own_chunk_size(sizes, retain):
    encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
    _, expected = full_batch(encoder, dense.clip_loss, batch)
    GradientCache(encoder, CLIPLoss(), sizes, retain=retain).forward_backward(batch)
    assert_equal(take_gradients(encoder), expected)


@pytest.mark.parametrize("frozen", ["image", "text"])
@pytest.mark.parametrize("retain", RETAIN)
def test_frozen_tower_is_encoded_once_and_stays_frozen(frozen, retain):
    encoder, batch = dual_encoder("clip", freeze=(frozen,)), image_text_batch(SIZE)
    _, expected = full_batch(encoder, dense.clip_loss, batch)
    calls = count_samples(encoder)
    GradientCache(encoder, CLIPLoss(), 3, retain=retain).forward_backward(batch)
    assert_equal(take_gradients(encoder), expected)
    assert calls[frozen] == SIZE
    assert all(p.requires_grad != name.startswith(MODULES[frozen]) for name, p in encoder.named_parameters())


MODULES = {
    "image": ("model.vision_model", "model.visual_projection"),
    "text": ("model.text_model", "model.text_projection"),
}


def count_samples(encoder):
    """Count the samples that go through each tower."""
    counts = {"image": 0, "text": 0}

    def count(_, args, kwargs):
        for name, inputs in kwargs.items():
            counts[name] += len(next(iter(inputs.values())))

    encoder.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize(("retain", "images"), [(0, 24), (1, 21), (2, 18), ("all", 12)])
def test_retained_chunks_need_no_second_forward(retain, images):
    encoder = dual_encoder("clip")
    counts = count_samples(encoder)
    GradientCache(encoder, CLIPLoss(), 3, retain=retain).forward_backward(image_text_batch(12))
    assert counts == {"image": images, "text": 12 if retain == "all" else 24}


def record_calls(encoder):
    """The arguments of every call, in order, as the encoder gets them."""
    calls = []
    encoder.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


@pytest.mark.parametrize("retain", RETAIN)
@pytest.mark.parametrize("kind", ["clip", "siglip", "vision_text", "open_clip"])
def test_with_dropout_equals_the_chunked_reference(kind, retain):
    """The reference: the calls of the first pass, from the same RNG state, in one graph."""
    encoder, batch = dual_encoder(kind, dropout=0.5), image_text_batch(SIZE)
    batch["index"] = torch.arange(SIZE)
    seen = []

    def keep_order(index, **reps):
        seen.append(index)
        return streaming_loss(encoder)(**reps)

    calls = record_calls(encoder)
    start = torch.get_rng_state()
    loss = GradientCache(encoder, keep_order, 4, retain=retain).forward_backward(batch)
    found, end = take_gradients(encoder), torch.get_rng_state()
    assert torch.equal(seen[0], torch.arange(SIZE))

    def reference():
        torch.set_rng_state(start)
        reps = {"image": [], "text": []}
        for call in first_pass(calls):
            outputs = DualEncoder.forward(encoder, **call)
            for name in call:
                reps[name].append(outputs[name])
        shared = {name: outputs[name] for name in encoder.global_names}
        loss = dense_loss(encoder)(**{name: torch.cat(parts) for name, parts in reps.items()}, **shared)
        loss.backward()
        return loss.detach(), take_gradients(encoder)

    expected_loss, expected = reference()
    assert torch.equal(end, torch.get_rng_state()), "the generator stands where the first pass left it"
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_equal(found, expected)
    encoder.eval()
    undropped, _ = full_batch(encoder, dense_loss(encoder), {k: v for k, v in batch.items() if k != "index"})
    assert abs(float(undropped - loss)) > 1e-4, "dropout was not active"


def first_pass(calls):
    """The calls up to the one that has encoded the last sample of every stream: a second pass follows."""
    left = {"image": SIZE, "text": SIZE}
    for number, call in enumerate(calls, start=1):
        for name, inputs in call.items():
            left[name] -= len(next(iter(inputs.values())))
        if not any(left.values()):
            return calls[:number]
    raise AssertionError(f"not all samples were encoded: {left}")


class Pair(nn.Module):
    """Two linear maps behind any input structure."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5).double(), nn.Linear(6, 5).double()

    def forward(self, x, y=None, *, scale=1.0):
        return self.a(x) if y is None else (self.a(x) * scale, self.b(y))


def structures():
    x, y = torch.randn(2, 7, 6, dtype=torch.float64)
    return {
        "tensor": x,
        "list": [x, y],
        "mapping": {"x": x, "y": y},
        "BatchEncoding": BatchEncoding({"x": x, "y": y}),
        "UserDict": UserDict({"x": x, "y": y}),
        "list and mapping": ([x], {"y": y, "scale": 2.0}),
    }


def pair_loss(reps, other=None):
    other = reps if other is None else other
    return (reps @ other.T).logsumexp(1).sum() - (reps * other).sum()


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("kind", structures())
def test_input_structures(kind, chunk_size):
    torch.manual_seed(3)
    encoder, inputs = Pair(), structures()[kind]
    if kind == "tensor":
        loss = pair_loss(encoder(inputs))
    elif isinstance(inputs, list):
        loss = pair_loss(*encoder(*inputs))
    elif isinstance(inputs, tuple):
        loss = pair_loss(*encoder(*inputs[0], **inputs[1]))
    else:
        loss = pair_loss(*encoder(**inputs))
    loss.backward()
    expected = take_gradients(encoder)
    found = GradientCache(encoder, pair_loss, chunk_size).forward_backward(inputs)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
    assert_equal(take_gradients(encoder), expected)


def test_lists_of_captions_are_sliced_with_the_batch():
    """An encoder that tokenizes by itself gets each chunk's own captions."""
    embedding = nn.Embedding(30, 5).double()

    def encoder(texts):
        return embedding(torch.tensor([len(text) for text in texts]))

    texts = ["a" * n for n in range(7)]
    loss = pair_loss(encoder(texts))
    loss.backward()
    expected = take_gradients(embedding)
    found = GradientCache(encoder, pair_loss, 2).forward_backward({"texts": texts})
    torch.testing.assert_close(found, loss.detach())
    assert_equal(take_gradients(embedding), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 16])
def test_a_list_of_captions_is_one_argument(chunk_size):
    embedding = nn.Embedding(30, 5).double()

    def encoder(texts):
        return embedding(torch.tensor([len(text) for text in texts]))

    texts = ["a" * n for n in range(7)]
    pair_loss(encoder(texts)).backward()
    expected = take_gradients(embedding)
    GradientCache(encoder, pair_loss, chunk_size).forward_backward(texts)
    assert_equal(take_gradients(embedding), expected)


def test_a_function_without_parameters_computes_on_the_device_in_use(monkeypatch):
    """Its random state would not be replayed otherwise, and its inputs would be taken off the device."""
    monkeypatch.setattr("gc_accel.distributed.replicas.device_in_use", lambda: torch.device("meta"))
    assert GradientCache(lambda x: x, pair_loss).replicas.device == torch.device("meta")
    assert GradientCache(nn.Linear(2, 2), pair_loss).replicas.device == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", ["cuda", "cpu"])
def test_a_function_around_a_model_on_a_gpu_replays_its_dropout(inputs):
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5)).double().cuda()
    batch = torch.randn(7, 6, dtype=torch.float64, device=inputs)
    torch.cuda.manual_seed(1)
    cache = GradientCache(lambda x: model(x.cuda()), pair_loss, 2, retain=0)
    cache.forward_backward(batch)
    found = take_gradients(model)
    torch.cuda.manual_seed(1)
    pair_loss(torch.cat([model(chunk.cuda()) for chunk in batch.split(2)])).backward()
    assert_equal(found, take_gradients(model))


def test_whole_batch_values_in_chunks_reach_the_loss_once():
    encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
    seen = []

    def loss(flag, weight, **reps):
        seen.append((flag, weight))
        return CLIPLoss()(**reps)

    GradientCache(encoder, loss, 3).forward_backward({**batch, "flag": None, "weight": torch.tensor(2.0)})
    assert seen == [(None, torch.tensor(2.0))]


def test_chunks_are_read_lazily():
    """Each is encoded before the one after the next is asked for: one is looked ahead, which may keep its graph."""
    encoder, events = Pair(), []
    encoder.register_forward_pre_hook(lambda *_: events.append("encode"))

    def chunks():
        for _ in range(4):
            events.append("load")
            yield torch.randn(2, 6, dtype=torch.float64)

    GradientCache(encoder, pair_loss, 2, retain=1).forward_backward_chunks(chunks())
    assert events == ["load", *["load", "encode"] * 3, "encode", *["encode"] * 3]


def test_arriving_chunks_are_split_and_change_nothing():
    encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
    _, expected = full_batch(encoder, dense.clip_loss, batch)
    parts = [{k: v[a:b] for k, v in batch.items()} for a, b in [(0, 7), (7, 8), (8, 11)]]
    GradientCache(encoder, CLIPLoss(), 2).forward_backward_chunks(iter(parts))
    assert_equal(take_gradients(encoder), expected)


def test_labels_travel_with_the_chunks():
    encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
    labels = torch.arange(SIZE) // 3
    _, expected = full_batch(encoder, lambda **reps: dense.clip_loss(**reps, labels=labels), batch)
    _, without = full_batch(encoder, dense.clip_loss, batch)
    GradientCache(encoder, CLIPLoss(), 2).forward_backward({**batch, "labels": labels})
    found = take_gradients(encoder)
    assert_equal(found, expected)
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(found, without)


def test_parameters_of_the_loss_get_their_gradient():
    encoder, x = Pair(), torch.randn(5, 6, dtype=torch.float64)
    temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def loss_fn(reps):
        return pair_loss(reps / temperature)

    loss_fn(encoder(x)).backward()
    expected, temperature.grad = temperature.grad, None
    GradientCache(encoder, loss_fn, 2).forward_backward(x)
    torch.testing.assert_close(temperature.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("retain", RETAIN)
def test_autocast_around_the_step_loses_no_gradient(retain):
    """Autocast caches casted weights; those of the pass without a graph must not serve the other."""
    encoder, batch = dual_encoder("clip").float(), image_text_batch(SIZE)
    batch["pixel_values"] = batch["pixel_values"].float()
    with torch.autocast("cpu", torch.bfloat16):
        GradientCache(encoder, CLIPLoss(), 3, retain=retain).forward_backward(batch)
    found = take_gradients(encoder)
    _, expected = full_batch(encoder, dense.clip_loss, batch)
    largest = max(float(value.norm()) for value in expected.values())
    off = {name: float((found[name] - value).norm()) / largest for name, value in expected.items()}
    assert max(off.values()) < 0.02, off


def test_reentrant_use_accumulates():
    encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
    cache = GradientCache(encoder, CLIPLoss(), 3)
    cache.forward_backward(batch)
    once = gradients(encoder)
    cache.forward_backward(batch)
    assert_equal(gradients(encoder), {name: 2 * grad for name, grad in once.items()})


class TestBadInput:
    """Each error is clear and comes before any gradient exists."""

    def check(self, match, encoder=None, loss_fn=None, batch=None, **options):
        encoder = encoder or dual_encoder("clip")
        batch = image_text_batch(4) if batch is None else batch
        with pytest.raises(ValueError, match=match):
            GradientCache(encoder, loss_fn or CLIPLoss(), **options).forward_backward(batch)
        assert all(p.grad is None for p in encoder.parameters())

    def test_chunk_size(self):
        self.check("whole number of samples from 1", chunk_size=0)
        self.check("whole number of samples from 1", chunk_size={"image": 2})

    def test_retain(self):
        self.check("retain", retain=-1)
        self.check("retain", retain="al")

    def test_modalities_of_different_lengths(self):
        batch = image_text_batch(4)
        batch["input_ids"] = batch["input_ids"][:3]
        self.check(r"same number of samples.*'pixel_values'.* has 4.*'input_ids'.* has 3", batch=batch)

    def test_missing_stream(self):
        self.check("input of 'text'", batch={"pixel_values": torch.randn(4, 3, 8, 8)})

    def test_empty_batch(self):
        self.check("at least one sample", batch=image_text_batch(0))
        self.check("tensor or a list of samples", batch={})

    def test_batch_norm_in_training_mode(self):
        encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        self.check("BatchNorm in training mode.*'1'", encoder, pair_loss, torch.randn(4, 6))
        encoder[1].eval()
        GradientCache(encoder, pair_loss, 2).forward_backward(torch.randn(4, 6))
        assert encoder[0].weight.grad.norm() > 0

    def test_batch_norm_without_running_statistics_even_in_eval_mode(self):
        encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False)).eval()
        self.check("BatchNorm", encoder, pair_loss, torch.randn(4, 6))

    def test_labels_given_twice(self):
        encoder, batch = dual_encoder("clip"), {**image_text_batch(4), "labels": torch.arange(4)}
        with pytest.raises(ValueError, match=r"\['labels'\] in the chunks or by keyword"):
            GradientCache(encoder, CLIPLoss()).forward_backward(batch, labels=torch.arange(4))

    def test_loss_that_ignores_a_representation(self):
        self.check(r"ignores \['text'\]", loss_fn=lambda image, **_: image.square().sum() + image.sum())

    @pytest.mark.parametrize("output", [None, 1.0, {"a": None}, (torch.zeros(2), "b")])
    def test_an_encoder_that_returns_something_else(self, output):
        with pytest.raises(ValueError, match="expected an encoder that returns a tensor"):
            GradientCache(lambda x: output, pair_loss, 2).forward_backward(torch.randn(4, 3))

    @pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
    def test_an_output_that_is_not_of_each_sample(self, shape):
        scale = torch.ones(shape, requires_grad=True)
        encoder = nn.Linear(3, 4)
        with pytest.raises(ValueError, match=r"each of 2 samples.*'scale'.*global_names"):
            GradientCache(lambda x: {"reps": encoder(x), "scale": scale * 2}, pair_loss, 2).forward_backward(
                torch.randn(4, 3)
            )

    def test_an_output_that_is_not_of_each_sample_where_calls_are_shared(self):
        model = nn.Linear(3, 4)
        cache = GradientCache(
            lambda x: model(x).mean(0, keepdim=True), pair_loss, 2, retain=0, forward_chunk_size=6
        )
        with pytest.raises(ValueError, match=r"each of 6 samples"):
            cache.forward_backward(torch.randn(10, 3))

    @pytest.mark.parametrize("value", [1.0, (torch.zeros(()),)])
    def test_a_loss_that_is_no_tensor(self, value):
        with pytest.raises(ValueError, match="expected a scalar loss"):
            GradientCache(nn.Linear(3, 4), lambda reps: value, 2).forward_backward(torch.randn(4, 3))

    def test_loss_that_is_no_scalar(self):
        self.check("scalar loss", loss_fn=lambda image, text, **_: image * text)

    def test_loss_without_gradient(self):
        self.check("scalar loss", loss_fn=lambda image, text, **_: (image * text).sum().detach())
