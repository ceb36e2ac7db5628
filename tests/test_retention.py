"""Retained graphs by a budget of memory: never the gradient, only forwards, and no more bytes than allowed."""

import pytest
import torch
from torch import nn

from gc_accel import GradientCache
from gc_accel.contracts import Streams
from gc_accel.engine.joining import JoinedCalls
from gc_accel.engine.schedule import Call, Chunk, cut, in_chunks, keeping_graphs
from gc_accel.inputs.packing import Packed
from gc_accel.losses import CLIPLoss, dense
from gc_accel.memory.meters import LiveBytes, SavedBytes
from tests.comparing import assert_equal
from tests.models import dual_encoder, image_text_batch
from tests.test_gradient_cache import count_samples, full_batch, take_gradients

SIZE, CHUNK = 24, 4


def graph_bytes(encoder, stream, samples):
    """The oracle for a budget: what autograd saves for a stream, counted from outside."""
    batch = image_text_batch(samples)
    inputs = {stream: {key: batch[key] for key in encoder.streams[stream] if key in batch}}
    saved = SavedBytes(besides=[*encoder.parameters(), *inputs[stream].values()])
    with saved:
        encoder(**inputs)
    return saved.total


def largest_weight(encoder):
    """Whose gradient a backward pass makes beside the graphs."""
    return max(weight.nbytes for weight in encoder.parameters())


def test_saved_bytes_of_a_linear_layer_are_its_input():
    layer, rows = nn.Linear(6, 5), torch.randn(7, 6)
    saved = SavedBytes(besides=layer.parameters())
    with saved:
        layer(rows * 2.0).relu()
    assert saved.total == 7 * 6 * 4 + 7 * 5 * 4, "the doubled rows, and the output of relu; no weight"


def steps(cache, encoder, batch, number):
    """Gradients and samples encoded of several steps."""
    counts, found = count_samples(encoder), []
    for _ in range(number):
        cache.forward_backward(batch)
        found.append((take_gradients(encoder), dict(counts)))
        counts.update(image=0, text=0)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_as_many_chunks_of_the_costliest_stream_as_the_budget_holds(chunks, dropout):
    encoder, batch = dual_encoder("clip", dropout=dropout), image_text_batch(SIZE)
    budget = chunks * graph_bytes(encoder, "image", CHUNK) * 1.01 + largest_weight(encoder)
    cache = GradientCache(encoder, CLIPLoss(), CHUNK, retain="auto", memory_budget=budget)
    torch.manual_seed(0)
    (first, counted), (second, after) = steps(cache, encoder, batch, 2)
    torch.manual_seed(0)
    (fixed, _), _ = steps(GradientCache(encoder, CLIPLoss(), CHUNK, retain=0), encoder, batch, 2)
    assert_equal(first, fixed)
    assert counted == {"image": 2 * SIZE - CHUNK, "text": 2 * SIZE}, "the first step measures"
    assert after == {"image": 2 * SIZE - chunks * CHUNK, "text": 2 * SIZE}
    if not dropout:
        assert_equal(second, fixed)


def test_a_budget_for_everything_takes_one_forward():
    encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
    _, expected = full_batch(encoder, dense.clip_loss, batch)
    budget = 1.3 * sum(graph_bytes(encoder, name, SIZE) for name in encoder.streams)
    cache = GradientCache(encoder, CLIPLoss(), CHUNK, retain="auto", memory_budget=budget)
    _, (found, counts) = steps(cache, encoder, batch, 2)
    assert_equal(found, expected)
    assert counts == {"image": SIZE, "text": SIZE}


def test_what_the_costliest_stream_leaves_of_the_budget_goes_to_the_next():
    encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
    image, text = (graph_bytes(encoder, name, CHUNK) for name in encoder.streams)
    budget = (SIZE // CHUNK) * image + 2.5 * text + largest_weight(encoder)
    cache = GradientCache(encoder, CLIPLoss(), CHUNK, retain="auto", memory_budget=budget)
    _, (_, counts) = steps(cache, encoder, batch, 2)
    assert counts == {"image": SIZE, "text": 2 * SIZE - 2 * CHUNK}


@pytest.mark.parametrize(
    "options",
    [
        {"retain": "auto"},
        {"retain": "auto", "memory_budget": 0},
        {"retain": "auto", "memory_budget": 0.5},
        {"retain": "some"},
        {"retain": -1},
        {"retain": 1.5},
        {"retain": None},
        {"retain": True},
        {"retain": "auto", "memory_budget": "4GB"},
        {"retain": "auto", "memory_budget": float("nan")},
    ],
)
def test_refuses_what_says_nothing(options):
    with pytest.raises(ValueError, match="expected"):
        GradientCache(nn.Linear(2, 2), lambda reps: reps.sum(), 2, **options)


def calls(limits, call_size, chunks):
    """The calls of chunks of two: stream, first and last sample, whether the graph is kept."""
    joined = JoinedCalls(nn.Identity(), call_size, torch.device("cpu"))
    found = joined.join(keeping_graphs(chunks, limits), {"a": 2, "b": 2})
    return [(c.stream, c.chunks[0].start, c.chunks[-1].stop, c.keeps_graph) for c in found]


def test_chunks_are_joined_within_their_inputs_and_up_to_the_size_of_a_call():
    one, two = torch.zeros(7, 1), torch.zeros(4, 1)
    chunks = [*cut("a", one, 7, 2), *cut("b", one.clone(), 7, 2), *cut("a", two, 4, 2)]
    assert calls({"a": 0, "b": 0}, 4, chunks) == [
        ("a", 0, 4, False),
        ("a", 4, 7, False),
        ("b", 0, 4, False),
        ("b", 4, 7, False),
        ("a", 0, 4, False),
    ]
    assert calls({"a": 0, "b": 0}, 3, chunks)[:2] == [("a", 0, 2, False), ("a", 2, 4, False)]


def test_the_first_chunks_and_the_last_are_retained_one_by_one():
    one, two = torch.zeros(9, 1), torch.zeros(8, 1)
    assert calls({"a": 3}, 8, cut("a", one, 9, 2)) == [
        ("a", 0, 2, True),
        ("a", 2, 4, True),
        ("a", 4, 8, False),
        ("a", 8, 9, True),
    ]
    assert calls({"b": 1}, 8, cut("b", two, 8, 2)) == [("b", 0, 6, False), ("b", 6, 8, True)]
    assert Call(list(cut("a", one, 7, 2))[1:3]).inputs.shape == (4, 1)


@pytest.mark.parametrize(("limit", "waits"), [(0, 0), (float("inf"), 0), (1, 1), (3, 1), (8, 1)])
def test_at_most_one_chunk_waits_for_the_next(limit, waits):
    """Loading goes on while chunks are encoded, however many graphs are retained."""
    read = []

    def reading():
        for number, chunk in enumerate(cut("a", torch.zeros(16, 1), 16, 2)):
            read.append(number)
            yield chunk

    kept = 0
    for number, call in enumerate(keeping_graphs(reading(), {"a": limit})):
        assert read[-1] <= number + waits
        kept += call.keeps_graph
    assert kept == min(limit, 8)


def test_the_streams_of_a_batch_follow_each_other_in_the_order_of_the_samples():
    streams, rows = Streams({"a": ("x",), "b": ("y",)}), torch.arange(11)[:, None]
    batches = [{"x": rows, "y": rows}, {"x": rows[:2], "y": rows[:2]}]
    chunks = list(in_chunks(batches, streams, {"a": 4, "b": 6}))
    first = [("a", 0, 4), ("a", 4, 8), ("a", 8, 11), ("b", 0, 6), ("b", 6, 11)]
    assert [(chunk.stream, chunk.start, chunk.stop) for chunk in chunks] == [*first, ("a", 0, 2), ("b", 0, 2)]
    assert torch.equal(chunks[1].inputs["x"], rows[4:8])
    found = [(call.stream, call.keeps_graph) for call in keeping_graphs(chunks, {"a": 2, "b": 0})]
    assert found == [("a", True), *[("a", False)] * 2, *[("b", False)] * 2, ("a", True), ("b", False)]


def test_ranks_decide_by_what_is_the_same_on_all_of_them():
    """The streams of their chunks: sizes differ, and one rank's chunk is another's repeated one."""
    found = []
    for sizes, repeated in [((2, 2, 2, 2, 2, 2), ()), ((2, 1, 2, 1, 2, 1), (4, 5)), ((1,) * 6, (3,))]:
        chunks = [
            Chunk(name, torch.zeros(2, 1), 0, size, number not in repeated)
            for number, (name, size) in enumerate(zip("ababab", sizes, strict=True))
        ]
        found.append([call.keeps_graph for call in keeping_graphs(chunks, {"a": 2, "b": 1})])
    assert found[0] == found[1] == found[2] == [True, False, False, False, True, True]


def encoded_samples(retain, sizes, *, chunk_size=8, **options):
    """How many samples a tower sees in each of several steps, with batches that come in chunks of some sizes."""
    model, seen, counts = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 5)), [], []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    cache = GradientCache(model, lambda reps: reps.logsumexp(0).sum(), chunk_size, retain=retain, **options)
    for step in sizes:
        seen.clear()
        cache.forward_backward_chunks(torch.randn(size, 6) for size in step)
        counts.append(sum(seen))
    return counts


def test_a_number_of_chunks_is_counted_in_chunks_however_small_they_are():
    """Chunks that are bounded in tokens have fewer samples, and their graphs are as large."""
    assert encoded_samples(1, [[3, 3, 3, 3]]) == [2 * 12 - 3]
    assert encoded_samples(2, [[3, 3, 3, 3]]) == [2 * 12 - 6]


def test_a_budget_holds_in_larger_batches_than_the_first():
    graph = 8 * 2 * 6 * 4  # bytes of eight samples, before and after GELU
    weight = 6 * 6 * 4  # whose gradient is made beside the graphs
    first, larger = encoded_samples("auto", [[8] * 2, [8] * 40], memory_budget=3.5 * graph + weight)
    assert first == 2 * 16 - 8
    assert larger == 2 * 320 - 24


def test_bytes_are_those_of_the_costliest_sample():
    """Not of the largest graph, which may have many short samples."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Linear(3, 4)

        def forward(self, x):
            return self.embedding(x * 2.0).sum(1)

    model, seen = Padded(), []
    model.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    long = 40 * 3 * 4  # bytes of a sample of 40 tokens
    options = {"retain": "auto", "memory_budget": 4.5 * long}
    cache = GradientCache(model, lambda reps: reps.logsumexp(0).sum(), 64, **options)
    chunks = [torch.randn(*shape, 3) for shape in [(2, 40), (64, 2), (2, 40), (2, 40), (2, 40)]]
    cache.forward_backward_chunks(chunks)
    seen.clear()
    cache.forward_backward_chunks(chunks[2:] + chunks[:1] * 3)
    first_pass = seen[: len(seen) // 2]
    assert sum(count for count, retained in first_pass if retained) <= 64, (
        "one chunk of the largest size, at most"
    )


def test_a_first_batch_of_less_than_a_chunk_fixes_nothing():
    assert encoded_samples("auto", [[3], [8] * 4, [8] * 4], memory_budget=1e6) == [3, 32, 32]
    encoder, batch = dual_encoder("clip"), image_text_batch(SIZE)
    cache = GradientCache(encoder, CLIPLoss(), CHUNK, retain="auto", memory_budget=1e9)
    cache.forward_backward(image_text_batch(2))
    ((_, counts),) = steps(cache, encoder, batch, 1)
    assert counts == {"image": SIZE, "text": SIZE}


def test_a_small_budget_takes_no_less_than_the_default():
    assert encoded_samples("auto", [[8] * 4] * 2, memory_budget=10) == encoded_samples(1, [[8] * 4] * 2)


def test_packed_inputs_can_be_measured():
    layer = nn.Linear(6, 5)

    def encoder(ids, patches):
        return ids.float() + layer(patches).sum(0)

    batch = {
        "ids": torch.arange(10.0)[:, None].expand(10, 5),
        "patches": Packed(torch.randn(40, 6), (4,) * 10),
    }
    cache = GradientCache(encoder, lambda reps: reps.logsumexp(0).sum(), 2, retain="auto", memory_budget=1e6)
    for _ in range(2):
        cache.forward_backward(batch)
    assert layer.weight.grad.abs().sum() > 0


def test_a_view_of_what_the_encoder_computed_keeps_nothing_of_it_alive():
    """Such as the first token of all hidden states."""
    layer, rows, kept = nn.Linear(8, 64), torch.randn(32, 16, 8), []

    def loss(reps):
        kept.append(live.now)
        return reps.logsumexp(0).sum()

    with LiveBytes([*layer.parameters(), rows]) as live:
        GradientCache(lambda x: layer(x)[:, 0], loss, 4, retain=0).forward_backward(rows)
    assert kept[0] <= 3 * 32 * 64 * 4, "the representations, as leaves and joined"


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_keeps_no_graph_and_shares_calls(frozen):
    encoder, batch = dual_encoder("clip", freeze=[frozen]), image_text_batch(SIZE)
    _, expected = full_batch(encoder, dense.clip_loss, batch)
    calls = []
    encoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.extend(
            (name, len(next(iter(part.values()))), torch.is_grad_enabled()) for name, part in kwargs.items()
        ),
        with_kwargs=True,
    )
    GradientCache(encoder, CLIPLoss(), CHUNK, forward_chunk_size=3 * CHUNK).forward_backward(batch)
    assert_equal(take_gradients(encoder), expected)
    own = [(count, grad) for name, count, grad in calls if name == frozen]
    assert own == [(3 * CHUNK, False)] * 2


def test_with_both_towers_frozen_only_the_first_chunk_is_encoded_twice():
    """For the globals, which it brings along."""
    encoder, batch = dual_encoder("clip", freeze=["image", "text"]), image_text_batch(SIZE)
    _, expected = full_batch(encoder, dense.clip_loss, batch)
    counts = count_samples(encoder)
    GradientCache(encoder, CLIPLoss(), CHUNK).forward_backward(batch)
    assert_equal(take_gradients(encoder), expected)
    assert counts == {"image": SIZE + CHUNK, "text": SIZE}


@pytest.mark.parametrize("retain", [0, 1, 3, "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_calls_of_several_chunks_change_nothing(dropout, retain):
    encoder, batch = dual_encoder("clip", dropout=dropout), image_text_batch(SIZE)
    calls = []
    encoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(next(iter(next(iter(kwargs.values())).values())))),
        with_kwargs=True,
    )

    def step(call_size):
        calls.clear()
        torch.manual_seed(0)
        cache = GradientCache(encoder, CLIPLoss(), CHUNK, retain=retain, forward_chunk_size=call_size)
        cache.forward_backward_chunks([batch])
        return take_gradients(encoder), list(calls), torch.get_rng_state()

    expected, one_by_one, state = step(CHUNK)
    found, joined, state_after = step(3 * CHUNK)
    assert_equal(found, expected)
    assert torch.equal(state, state_after)
    assert max(one_by_one) == CHUNK
    if retain != "all":
        assert max(joined) > CHUNK, "several chunks went into one call"
    if not dropout:
        assert sum(joined) == sum(one_by_one), "and no sample was encoded once more"


def test_chunks_with_random_draws_are_encoded_one_by_one():
    """The same dropout masks as without joined calls, which takes a call for each chunk."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).double()
    rows, widths = torch.randn(12, 6, dtype=torch.float64), []
    encoder.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    cache = GradientCache(
        encoder, lambda reps: (reps @ reps.T).logsumexp(1).sum(), 2, retain=0, forward_chunk_size=4
    )
    cache.forward_backward_chunks([rows])
    assert sorted(widths) == [2] * 2 * 6 + [4], "one call to find out, and never again"
