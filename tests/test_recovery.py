"""A step that runs out of memory is made again with half the chunk, and equals one that began with it."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from gc_accel.losses import CLIPLoss, StatefulLoss
from gc_accel.memory.recovery import is_out_of_memory
from tests.comparing import assert_equal, gradients
from tests.models import dual_encoder, image_text_batch
from tests.ranks import run_on_ranks

SIZE, CHUNK = 13, 4
PLACES = ("first pass", "loss", "backward of the loss", "second pass")


class Failure:
    """Raises torch.OutOfMemoryError once, or each time while chunks are larger than what fits.

    Places are told apart by whether a graph is made, and by the loss.
    """

    def __init__(self, place: str, encoder: nn.Module, *, above: float = 0, call: int = 2) -> None:
        self.place, self.above, self.raised, self.calls, self.call = place, above, 0, 0, call
        encoder.register_forward_pre_hook(self._before_call, with_kwargs=True)

    def _before_call(self, _, args, kwargs):
        ((inputs,),) = (kwargs.values(),)
        samples = len(next(iter(inputs.values())))
        place = "second pass" if torch.is_grad_enabled() else "first pass"
        self.calls += place == self.place
        if place == self.place and self.calls > 1:  # in the middle, with some of it done
            self._fail(samples)

    def loss(self, image, text, **shared):
        if self.place == "loss":
            self._fail(self.above + 1)
        if self.place == "backward of the loss":
            image.register_hook(lambda grad: self._fail(self.above + 1))
        return CLIPLoss()(image=image, text=text, **shared)

    def _fail(self, samples):
        if samples > self.above and (self.above or not self.raised):
            self.raised += 1
            raise torch.OutOfMemoryError(f"injected in the {self.place}")


def accumulated(encoder):
    """Gradients from before, as when several batches make a step."""
    torch.manual_seed(5)
    for parameter in encoder.parameters():
        parameter.grad = torch.randn_like(parameter)


def step(encoder, loss_fn, chunk_size, *, with_grads=False, whole=False, **options):
    """One step from a fixed random state: gradients, loss, the random state after it, and the cache."""
    encoder.zero_grad(set_to_none=True)
    if with_grads:
        accumulated(encoder)
    torch.manual_seed(7)
    cache = GradientCache(encoder, loss_fn, chunk_size, **options)
    batch = image_text_batch(SIZE)
    loss = cache.forward_backward(batch) if whole else cache.forward_backward_chunks([batch])
    return gradients(encoder), loss, torch.get_rng_state(), cache


@pytest.mark.parametrize("with_grads", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("place", PLACES)
def test_equals_a_step_that_began_with_half_the_chunk(place, dropout, with_grads, caplog):
    encoder = dual_encoder("clip", dropout=dropout)
    expected, expected_loss, state, _ = step(encoder, CLIPLoss(), CHUNK // 2, with_grads=with_grads)
    failure = Failure(place, encoder)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        found, loss, state_after, cache = step(encoder, failure.loss, CHUNK, with_grads=with_grads)
    assert failure.raised == 1
    assert_equal(found, expected)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(state, state_after)
    assert set(cache.chunk_sizes.values()) == {CHUNK // 2}
    assert "Out of memory" in caplog.text
    assert "2 (image)" in caplog.text
    if dropout:
        whole, *_ = step(encoder, CLIPLoss(), CHUNK, with_grads=with_grads)
        assert (whole["model.visual_projection.weight"] - expected["model.visual_projection.weight"]).any()


@pytest.mark.parametrize("retain", [0, "all"])
def test_halves_until_it_fits_and_stays_there(retain):
    encoder = dual_encoder("clip")
    expected, *_ = step(encoder, CLIPLoss(), 1)
    failure = Failure("first pass" if retain == 0 else "second pass", encoder, above=2)
    found, _, _, cache = step(encoder, failure.loss, 8, retain=retain)
    assert failure.raised == 2
    assert_equal(found, expected)
    assert set(cache.chunk_sizes.values()) == {2}
    encoder.zero_grad()
    cache.forward_backward(image_text_batch(SIZE))
    assert failure.raised == 2, "the next step begins with the smaller chunk"
    assert_equal(gradients(encoder), expected)
    assert cache.retention.retain == (0 if retain == 0 else 1), "and keeps one graph at most"


def test_buffers_of_a_step_that_failed_are_put_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
    batch = torch.randn(12, 6, dtype=torch.float64)
    failures = iter([True])

    def loss(reps):
        if next(failures, False):
            raise torch.OutOfMemoryError("injected")
        return (reps @ reps.T).logsumexp(1).sum()

    cache = GradientCache(model, loss, 8, batch_norm="ghost")
    cache.forward_backward(batch)
    assert int(model[1].num_batches_tracked) == 3, "chunks of 4 in one step, and nothing of the first attempt"


def test_the_loss_is_taken_back_too():
    """Gradients of its own parameters, and buffers that its forward moves."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, **reps):
            self.seen += 1
            return CLIPLoss()(**reps) * self.scale.exp()

    found = []
    for place in ("nowhere", "second pass"):
        encoder, loss = dual_encoder("clip"), Scaled()
        failure = Failure(place, encoder)
        step(encoder, loss, CHUNK)
        assert failure.raised == (place != "nowhere")
        found.append((loss.scale.grad, loss.seen))
    assert found[0][0].abs() > 1e-3
    assert_equal({"scale": found[1][0]}, {"scale": found[0][0]})
    assert found[1][1] == found[0][1] == 1


@pytest.mark.parametrize("goes_on", [False, True])
def test_memory_that_runs_out_while_a_chunk_is_read_ends_the_run(goes_on):
    """A generator is finished then, and a `map` goes on without the chunk: nobody trains on what is left."""
    seen = []

    def move(number):
        if number == 2 and not seen:
            seen.append(number)
            raise torch.OutOfMemoryError("while moving")
        return torch.randn(4, 3)

    chunks = map(move, range(4)) if goes_on else (move(number) for number in range(4))
    model = nn.Linear(3, 2)
    with pytest.raises(torch.OutOfMemoryError, match="while moving"):
        GradientCache(model, lambda reps: reps.logsumexp(0).sum(), 2).forward_backward_chunks(chunks)
    assert model.weight.grad is None


@pytest.mark.parametrize("chunk_size", [5, 7])
def test_a_chunk_of_odd_size_is_halved_and_cut_anew(chunk_size):
    """As a step that began with the smaller one cuts, not within the larger ones: dropout draws by chunk."""
    encoder = dual_encoder("clip", dropout=0.5)
    expected, *_ = step(encoder, CLIPLoss(), chunk_size // 2, whole=True)
    failure = Failure("loss", encoder)
    found, *_ = step(encoder, failure.loss, chunk_size, whole=True)
    assert failure.raised == 1
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. non-contiguous input"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_has_run_out(error, expected):
    assert is_out_of_memory(error) == expected


def test_says_what_to_set_when_one_sample_is_too_much():
    encoder = dual_encoder("clip")
    failure = Failure("second pass", encoder, above=0.5)
    with pytest.raises(RuntimeError, match=r"chunks of one sample.*gradient checkpointing"):
        step(encoder, failure.loss, CHUNK)
    assert failure.raised == 3, "in chunks of 4, 2 and 1"


def test_other_errors_go_through_at_once():
    calls = []

    def loss(reps):
        calls.append(1)
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        GradientCache(nn.Linear(2, 2), loss, 2).forward_backward(torch.randn(4, 2))
    assert len(calls) == 1


RANK_CASES = [  # where it fails, on which ranks, in which call there
    ("first pass", (0,), 1),
    ("first pass", (0,), 2),
    ("first pass", (0, 1), 2),
    ("loss", (0,), 1),
    ("loss", (0, 1), 1),
    ("backward of the loss", (1,), 1),
    ("second pass", (1,), 2),
    ("second pass", (0, 1), 2),
]


class FailingLoss(CLIPLoss):
    """A loss that reaches over ranks, and fails before or between its collective calls."""

    def __init__(self, failure):
        super().__init__()
        self.failure = failure

    def forward(self, image, text, **shared):
        return self.failure.loss(image, text, **shared)


def rank_step(rank, dropout, chunk_size, place, call, retain=1):
    encoder = dual_encoder("clip", dropout=dropout)
    encoder.register_buffer("steps", torch.zeros(3))  # which ranks broadcast with the first call of a step
    failure = Failure(place, encoder, call=call)
    model = DistributedDataParallel(encoder, find_unused_parameters=True)
    batch = {name: value[rank::2] for name, value in image_text_batch(2 * SIZE).items()}
    torch.manual_seed(rank)
    cache = GradientCache(model, FailingLoss(failure), chunk_size, retain=retain)
    loss = cache.forward_backward_chunks([batch])
    return gradients(encoder), loss, failure.raised, max(cache.chunk_sizes.values())


def all_graphs_on_ranks(rank):
    """Steps that keep all graphs, with a failure before and in the loss, and without."""
    expected, *_ = rank_step(rank, 0.0, CHUNK // 2, "nowhere", 1)
    places = ("second pass", "loss") if rank == 0 else ("nowhere", "nowhere")  # a first pass with graphs
    return expected, [rank_step(rank, 0.0, CHUNK, place, 1, "all") for place in places]


def test_ranks_that_keep_all_graphs_give_up_a_step_together(tmp_path):
    """Until they reduce, no reducer waits for a backward pass."""
    for rank, (expected, found) in enumerate(run_on_ranks(all_graphs_on_ranks, 2, tmp_path)):
        for grads, _, raised, chunk in found:
            assert raised == (rank == 0)
            assert chunk == CHUNK // 2
            assert_equal(grads, expected)


def on_ranks(rank):
    """One rank's steps, with a failure on some of the ranks and without, and the data they are made on."""
    found = {}
    for dropout in (0.0, 0.5):
        found[dropout] = rank_step(rank, dropout, CHUNK // 2, "nowhere", 1)
        for place, failing, call in RANK_CASES:
            name = place if rank in failing else "nowhere"
            found[dropout, place, failing, call] = rank_step(rank, dropout, CHUNK, name, call)
    return found, image_text_batch(2 * SIZE)["input_ids"][rank::2]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    (first, data), (second, other) = run_on_ranks(on_ranks, 2, tmp_path_factory.mktemp("ranks"), timeout=240)
    assert not torch.equal(data, other), "ranks hold different data"
    return first, second


@pytest.mark.parametrize("case", RANK_CASES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_ranks_give_up_a_step_together(case, dropout, two_ranks):
    for rank, found in enumerate(two_ranks):
        expected, expected_loss, *_ = found[dropout]
        grads, loss, raised, chunk = found[(dropout, *case)]
        assert raised == (rank in case[1])
        assert chunk == CHUNK // 2
        assert_equal(grads, expected)
        assert torch.equal(loss, expected_loss)
    assert_equal(two_ranks[0][(dropout, *case)][0], two_ranks[1][(dropout, *case)][0])


def in_the_reduction(rank):
    encoder = dual_encoder("clip")
    model = DistributedDataParallel(encoder, find_unused_parameters=True)
    cache = GradientCache(model, CLIPLoss(), CHUNK)

    def fail(any_rank):
        raise torch.OutOfMemoryError("injected")

    cache.replicas.reduction.reduce = fail
    with pytest.raises(RuntimeError, match="set a smaller chunk_size"):
        cache.forward_backward(image_text_batch(SIZE, seed=rank))
    return cache.chunk_sizes["image"]


def test_there_is_no_way_back_from_the_reduction(tmp_path):
    assert run_on_ranks(in_the_reduction, 2, tmp_path) == [CHUNK, CHUNK]


class Counting(StatefulLoss):
    """Whose state does not fit into the memory of one rank."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.register_buffer("batches", torch.zeros(1))

    def forward(self, image, text, **_):
        return self.everywhere(image).sum() * 0 + (image * text).sum()

    def update(self, reps):
        self.batches += 1
        if self.rank == 1:
            raise torch.OutOfMemoryError("update")


def after_the_reduction(rank):
    encoder = dual_encoder("clip")
    loss = Counting(rank)
    cache = GradientCache(DistributedDataParallel(encoder, find_unused_parameters=True), loss, CHUNK)
    try:
        cache.forward_backward(image_text_batch(SIZE, seed=rank))
    except RuntimeError as error:
        return str(error), float(loss.batches)
    return "", float(loss.batches)


def test_a_state_that_has_moved_is_not_moved_again(tmp_path):
    """The other ranks are done with the step by then."""
    (done, moved), (error, moved_too) = run_on_ranks(after_the_reduction, 2, tmp_path)
    assert not done
    assert "ranks depend on each other's calls" in error
    assert moved == moved_too == 1
