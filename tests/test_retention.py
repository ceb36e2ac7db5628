"""Retained graphs by a budget of memory: never the gradient, only forwards, and no more bytes than allowed."""

import pytest
import torch
from torch import nn

from gc_accel import GradientCache
from gc_accel.losses import CLIPLoss, dense
from gc_accel.memory import SavedBytes
from gc_accel.schedule import Block, FirstPass, Rows, Turn
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
    budget = chunks * graph_bytes(encoder, "image", CHUNK) * 1.01
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
    budget = (SIZE // CHUNK) * image * 1.02 + 2.5 * text
    cache = GradientCache(encoder, CLIPLoss(), CHUNK, retain="auto", memory_budget=budget)
    _, (_, counts) = steps(cache, encoder, batch, 2)
    assert counts["image"] == SIZE + CHUNK // 2, "all but the joint call"
    assert 2 * SIZE - 3 * CHUNK <= counts["text"] <= 2 * SIZE - 2 * CHUNK


@pytest.mark.parametrize(
    "options",
    [
        {"retain": "auto"},
        {"retain": "auto", "memory_budget": 0},
        {"retain": "auto", "memory_budget": 0.5},
        {"retain": "some"},
        {"retain": -1},
    ],
)
def test_refuses_what_says_nothing(options):
    with pytest.raises(ValueError, match="expected"):
        GradientCache(nn.Linear(2, 2), lambda reps: reps.sum(), 2, **options)


def turns(stream, whole, size, chunk):
    return [Turn(stream, rows) for rows in Rows(whole, 0, size).cut(chunk)]


def blocks(limit, call_size, *groups):
    schedule = FirstPass({"a": 2, "b": 2}, {"a": call_size, "b": call_size}, limit, nominal=False)
    return [
        (block.turns[0].stream, block.turns[0].rows.start, block.turns[-1].rows.stop, block.retain)
        for block in schedule.blocks(turn for group in groups for turn in group)
    ]


def test_chunks_are_joined_within_their_inputs_and_up_to_the_size_of_a_call():
    one, two = torch.zeros(7, 1), torch.zeros(4, 1)
    limit = {"a": 0, "b": 0}
    groups = (turns("a", one, 7, 2), turns("b", one.clone(), 7, 2), turns("a", two, 4, 2))
    assert blocks(limit, 4, *groups) == [
        ("a", 0, 4, False),
        ("a", 4, 7, False),
        ("b", 0, 4, False),
        ("b", 4, 7, False),
        ("a", 0, 4, False),
    ]
    assert blocks(limit, 3, *groups)[:2] == [("a", 0, 2, False), ("a", 2, 4, False)]


def test_the_last_chunks_of_each_stream_are_retained_one_by_one():
    one, two = torch.zeros(7, 1), torch.zeros(8, 1)
    found = blocks({"a": 3, "b": 4}, 8, turns("a", one, 7, 2), turns("b", two, 8, 2))
    assert found == [
        ("a", 0, 4, False),
        ("a", 4, 6, True),
        ("a", 6, 7, True),
        ("b", 0, 4, False),
        ("b", 4, 6, True),
        ("b", 6, 8, True),
    ]
    assert Block(turns("a", one, 7, 2)[1:3], False).rows.inputs.shape == (4, 1)


def test_nothing_waits_where_nothing_or_everything_is_retained():
    """A chunk is encoded before the one after it has been read."""
    for limit in (0.0, float("inf")):
        read = []

        def reading(read=read):
            for number, turn in enumerate(turns("a", torch.zeros(8, 1), 8, 2)):
                read.append(number)
                yield turn

        schedule = FirstPass({"a": 2}, {"a": 2}, {"a": limit}, nominal=False)
        for number, _ in enumerate(schedule.blocks(reading())):
            assert read[-1] == number


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
