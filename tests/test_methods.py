"""SwAV, NNCLR, MoCo, BYOL and SimSiam: the gradient of the whole batch, at the price of the cheapest exact schedule."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache, check_equivalence
from gc_accel.encoders import FullBatchHead
from gc_accel.losses import LOSSES as NAMED
from gc_accel.losses import (
    AccumulatedLoss,
    BYOLLoss,
    DistillationLoss,
    MoCoLoss,
    MomentumEncoder,
    NNCLRLoss,
    NTXentLoss,
    RetrievalLoss,
    SimSiamLoss,
    SwAVLoss,
)
from tests.comparing import assert_equal, gradients
from tests.ranks import run_on_ranks
from tests.test_distributed import count_reduction
from tests.test_vision_encoder import IMAGE, batch_of, encoder_of, images, taken_gradients

SIZE, DIM, QUEUE = 7, 6, 5
TEMPERATURE = 0.3


def make_encoder(method="byol", *, dropout=0.0):
    heads = {"prototypes": 4} if method.startswith("swav") else {"predictor": 10}
    encoder = encoder_of("vit", **heads)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return encoder


def make_teacher(encoder):
    """A momentum encoder that has fallen behind."""
    teacher = MomentumEncoder(encoder, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    for weight in teacher.parameters():
        weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return teacher


LOSSES = {
    "simsiam": lambda encoder: SimSiamLoss(),
    "byol": lambda encoder: BYOLLoss(teacher=make_teacher(encoder)),
    "moco v3": lambda encoder: MoCoLoss(TEMPERATURE, teacher=make_teacher(encoder)),
    "moco v2": lambda encoder: MoCoLoss(
        TEMPERATURE, queue_size=QUEUE, dim=DIM, teacher=make_teacher(encoder)
    ),
    "nnclr": lambda encoder: NNCLRLoss(TEMPERATURE, queue_size=QUEUE, dim=DIM),
    "swav": lambda encoder: SwAVLoss(TEMPERATURE),
    "swav, queue": lambda encoder: SwAVLoss(
        TEMPERATURE, queue_size=QUEUE, dim=DIM, prototypes=encoder.further["scores"]
    ),
}
FORWARDS = {  # of the encoder and of its teacher, for each sample, where no graph is kept
    "simsiam": (1, 0),
    "byol": (1, 1),
    "moco v3": (1, 1),
    "moco v2": (1, 1),
    "swav": (2, 0),
    "swav, queue": (2, 0),
}


def make(method, **options):
    """An encoder, a loss with a state that has moved, and its queue as a plain tensor."""
    encoder = make_encoder(method, **options)
    loss = LOSSES[method](encoder).double()
    rows = None
    if getattr(loss, "queue", None) is not None:
        shape = (QUEUE, 2, DIM) if method == "swav, queue" else (QUEUE, DIM)
        rows = F.normalize(
            torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6)), dim=-1
        )
        loss.queue.push(rows)
    return encoder, loss, rows


def cross_entropy(queries, keys, negatives):
    """Of each query against its own key and negatives, one query at a time."""
    terms = []
    for i, query in enumerate(queries):
        logits = torch.stack([query @ keys[i], *(query @ each for each in negatives(i))]) / TEMPERATURE
        terms.append(logits.logsumexp(0) - logits[0])
    return torch.stack(terms).mean()


def plain_codes(scores, *, epsilon=0.05, iterations=3):
    """The paper's listing: exponentials, and sums of a matrix (K, B) brought to 1/K and 1/B in turn."""
    matrix = (scores / epsilon).exp().T
    matrix = matrix / matrix.sum()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(1, keepdim=True) / matrix.shape[0]
        matrix = matrix / matrix.sum(0, keepdim=True) / matrix.shape[1]
    return (matrix * matrix.shape[1]).T


def oracle(method, encoder, outputs, keys, rows):
    """The loss of a whole batch in one graph, from what the encoder and its teacher make of it."""
    z, p, scores = (outputs.get(name) for name in ("views", "predictions", "scores"))
    total = 0.0
    for view, other in ((0, 1), (1, 0)):
        if method == "simsiam":
            total -= F.cosine_similarity(p[:, view], z[:, other].detach()).mean() / 2
        elif method == "byol":
            total += (
                (F.normalize(p[:, view], dim=1) - F.normalize(keys[:, other], dim=1)).square().sum(1).mean()
            )
        elif method == "moco v3":
            logits = p[:, view] @ keys[:, other].T / TEMPERATURE
            total += 2 * TEMPERATURE * F.cross_entropy(logits, torch.arange(len(logits)))
        elif method == "moco v2":
            total += cross_entropy(p[:, view], keys[:, other], lambda _: rows) / 2
        elif method == "nnclr":
            nearest = rows[torch.cdist(z[:, view].detach(), rows).argmin(1)]
            logits = nearest @ p[:, other].T / TEMPERATURE
            total += F.cross_entropy(logits, torch.arange(len(logits))) / 2
        else:
            known = scores[:, view].detach()
            if rows is not None:
                centres = F.normalize(encoder.further["scores"].weight.detach(), dim=1)
                known = torch.cat([rows[:, view] @ centres.T, known])
            codes = plain_codes(known)[-len(z) :]
            total -= (codes * (scores[:, other] / TEMPERATURE).log_softmax(1)).sum(1).mean() / 2
    return total


def whole_batch(method, encoder, loss, rows, batch):
    """The oracle's loss and gradients."""
    inputs = {"pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        keys = loss.teacher(views=inputs)["views"] if getattr(loss, "teacher", None) is not None else None
    value = oracle(method, encoder, encoder(views=inputs), keys, rows)
    value.backward()
    found = taken_gradients(encoder)
    assert any(grad is not None and grad.norm() > 1e-3 for grad in found.values())
    return value.detach(), found


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("method", LOSSES)
def test_equals_the_whole_batch_in_one_graph(method, chunk_size):
    encoder, loss, rows = make(method)
    expected_value, expected = whole_batch(method, encoder, loss, rows, batch_of())
    value = GradientCache(encoder, loss, chunk_size).forward_backward(batch_of())
    torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)
    assert_equal(taken_gradients(encoder), expected)


def counted(module):
    """How many samples go through a module, kept up to date."""
    seen = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["views"]["pixel_values"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("method", FORWARDS)
def test_no_sample_is_encoded_more_often_than_it_has_to_be(method):
    encoder, loss, _ = make(method)
    own = counted(encoder)
    of_teacher = counted(loss.teacher.encoder) if loss.teacher is not None else []
    GradientCache(encoder, loss, 3, retain=0).forward_backward(batch_of())
    assert (sum(own), sum(of_teacher)) == tuple(SIZE * times for times in FORWARDS[method])
    assert max([*own, *of_teacher]) == 3


@pytest.mark.parametrize(
    ("chunk_size", "retain", "samples"),
    [(3, 0, 14), (3, 1, 13), (3, 2, 10), (3, "all", 7), (64, 1, 7), (1, 3, 11)],
)
@pytest.mark.parametrize("method", ["swav", "nnclr"])
def test_graphs_that_are_kept_spare_their_chunks_a_second_forward(method, chunk_size, retain, samples):
    encoder, loss, rows = make(method)
    _, expected = whole_batch(method, encoder, loss, rows, batch_of())
    seen = counted(encoder)
    GradientCache(encoder, loss, chunk_size, retain=retain).forward_backward(batch_of())
    assert sum(seen) == samples
    assert_equal(taken_gradients(encoder), expected)


@pytest.mark.parametrize("declared", [False, True])
def test_a_budget_for_all_graphs_of_swav_takes_one_forward(declared):
    encoder, loss, rows = make("swav")
    _, expected = whole_batch("swav", encoder, loss, rows, batch_of())
    if declared:
        encoder.streams = {"views": ("pixel_values",)}
    seen = counted(encoder)
    cache = GradientCache(encoder, loss, 2, retain="auto", memory_budget=1e9)
    cache.forward_backward(batch_of())
    taken_gradients(encoder)
    seen.clear()
    cache.forward_backward(batch_of())
    assert sum(seen) == SIZE
    assert_equal(taken_gradients(encoder), expected)


@pytest.mark.parametrize("method", ["swav", "byol", "moco v3"])
def test_calls_of_several_chunks_where_nothing_is_drawn(method):
    encoder, loss, rows = make(method)
    _, expected = whole_batch(method, encoder, loss, rows, batch_of())
    seen = counted(encoder if method == "swav" else loss.teacher.encoder)
    GradientCache(encoder, loss, 2, retain=0, forward_chunk_size=6).forward_backward(batch_of())
    assert max(seen) > 2
    assert_equal(taken_gradients(encoder), expected)


@pytest.mark.parametrize("method", LOSSES)
def test_a_regime_is_declared(method):
    _, loss, _ = make(method)
    regimes = {"simsiam": "C", "byol": "C", "moco v2": "C", "moco v3": "B", "nnclr": "A"}
    assert loss.regime == regimes.get(method, "B")
    assert isinstance(loss, AccumulatedLoss) == (loss.regime != "A")


def test_every_loss_says_its_regime():
    made = {name: kind() for name, kind in NAMED.items()} | {"moco v2": MoCoLoss(queue_size=QUEUE)}
    others = {"swav": "B", "moco": "B", "moco v2": "C", "byol": "C", "simsiam": "C"}
    assert {name: loss.regime for name, loss in made.items()} == dict.fromkeys(NAMED, "A") | others
    assert DistillationLoss.regime == RetrievalLoss.regime == "A"
    for name, loss in made.items():
        assert isinstance(loss, AccumulatedLoss) == (loss.regime != "A"), name


@pytest.mark.parametrize("method", LOSSES)
def test_with_dropout_equals_the_chunked_reference(method):
    """The same chunks from the same random state, in one graph; the generator stands where these leave it."""
    encoder, loss, rows = make(method, dropout=0.4)
    chunks = [batch_of()["pixel_values"][a:b] for a, b in [(0, 3), (3, 6), (6, 7)]]
    start = torch.get_rng_state()
    parts = [encoder(views={"pixel_values": chunk}) for chunk in chunks]
    end = torch.get_rng_state()
    assert not torch.equal(start, end), "dropout draws"
    outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    keys = None
    if getattr(loss, "teacher", None) is not None:
        keys = loss.teacher(views={"pixel_values": batch_of()["pixel_values"]})["views"]
    expected_value = oracle(method, encoder, outputs, keys, rows)
    expected_value.backward()
    expected = taken_gradients(encoder)
    torch.set_rng_state(start)
    value = GradientCache(encoder, loss, 3).forward_backward(batch_of())
    assert torch.equal(torch.get_rng_state(), end)
    torch.testing.assert_close(value, expected_value.detach(), rtol=1e-10, atol=1e-12)
    assert_equal(taken_gradients(encoder), expected)
    encoder.eval()
    undropped, _ = whole_batch(method, encoder, loss, rows, batch_of())
    assert abs(float(undropped - value)) > 1e-4, "dropout was not active"


@pytest.mark.parametrize("method", ["simsiam", "swav"])
def test_the_schedule_equals_the_gradient_cache(method):
    """A loss without a momentum encoder is also a loss of a whole batch like any other."""
    encoder, loss, _ = make(method)
    value = GradientCache(encoder, loss, 3).forward_backward(batch_of())
    found = taken_gradients(encoder)
    encoder, loss, _ = make(method)

    def as_any_loss(**reps):
        return loss(**reps) + 0 * sum(rep.sum() for rep in reps.values())

    torch.testing.assert_close(GradientCache(encoder, as_any_loss, 3).forward_backward(batch_of()), value)
    assert_equal(taken_gradients(encoder), found)


def test_a_queue_inside_of_another_loss_is_refused():
    """It would never move."""
    encoder, loss, _ = make("swav, queue")
    with pytest.raises(ValueError, match="expected SwAVLoss as the loss itself"):
        GradientCache(encoder, lambda **reps: loss(**reps), 3).forward_backward(batch_of())
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("method", LOSSES)
def test_the_state_moves_once_and_after_the_loss(method):
    encoder, loss, _ = make(method)
    before = copy.deepcopy(loss.state_dict())
    reps = encoder.eval()(views={"pixel_values": batch_of()["pixel_values"]})["views"].detach()
    GradientCache(encoder.train(), loss, 3).forward_backward(batch_of())
    queue = getattr(loss, "queue", None)
    changed = {name for name, value in loss.state_dict().items() if not torch.equal(value, before[name])}
    if queue is None:
        assert not changed
        return
    assert changed == {"queue.rows", "queue.position"}
    keys = (
        loss.teacher(views={"pixel_values": batch_of()["pixel_values"]})["views"]
        if method == "moco v2"
        else reps
    )
    pushed = {"moco v2": keys.flatten(0, 1), "nnclr": reps[:, 0], "swav, queue": reps}[method]
    assert int(queue.position) == len(pushed) % QUEUE
    in_order = torch.cat([queue.rows[queue.position :], queue.rows[: queue.position]])
    torch.testing.assert_close(in_order, pushed[-QUEUE:])


def test_a_queue_of_swav_waits_until_it_is_full():
    encoder = make_encoder("swav")
    loss = LOSSES["swav, queue"](encoder).double()
    loss.queue.push(torch.randn(QUEUE - 1, 2, DIM, dtype=torch.float64))
    without, expected = whole_batch("swav", encoder, loss, None, batch_of())
    torch.testing.assert_close(GradientCache(encoder, loss, 3).forward_backward(batch_of()), without)
    assert_equal(taken_gradients(encoder), expected)
    assert loss.queue.is_full
    later = GradientCache(encoder, loss, 3).forward_backward(batch_of())
    assert abs(float(later - without)) > 1e-4


@pytest.mark.parametrize("views", [3, 5])
def test_swav_with_more_crops_than_codes(views):
    """Crops of a smaller size predict, but have no code of their own."""
    pixels = [images(SIZE, 3, side, side, seed=n) for n, side in enumerate([16, 16, 8, 8, 8][:views])]
    encoder = encoder_of("resnet, frozen norm", prototypes=4)
    scores = encoder(views={"pixel_values": pixels})["scores"]
    terms = [
        -(plain_codes(scores[:, a].detach()) * (scores[:, v] / TEMPERATURE).log_softmax(1)).sum(1).mean()
        for a in (0, 1)
        for v in range(views)
        if v != a
    ]
    expected_value = sum(terms) / len(terms)
    expected_value.backward()
    expected = taken_gradients(encoder)
    value = GradientCache(encoder, SwAVLoss(TEMPERATURE), 3).forward_backward({"pixel_values": pixels})
    torch.testing.assert_close(value, expected_value.detach())
    assert_equal(taken_gradients(encoder), expected)


def test_moco_v2_asks_without_a_predictor():
    encoder = encoder_of("vit")
    loss = LOSSES["moco v2"](encoder).double()
    inputs = {"pixel_values": batch_of()["pixel_values"]}
    queries, keys = encoder(views=inputs)["views"], loss.teacher(views=inputs)["views"]
    expected = (
        sum(cross_entropy(queries[:, v], keys[:, 1 - v], lambda _: loss.queue.rows) for v in (0, 1)) / 2
    )
    value = GradientCache(encoder, loss, 3).forward_backward(batch_of())
    torch.testing.assert_close(value, expected.detach())


def test_gradients_accumulate_and_are_scaled():
    for method in LOSSES:
        encoder, loss, rows = make(method)
        _, expected = whole_batch(method, encoder, loss, rows, batch_of())
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        encoder = accelerator.prepare(encoder)
        GradientCache(encoder, loss, 3, accelerator).forward_backward(batch_of())
        found = taken_gradients(encoder)
        assert_equal({name: None if grad is None else grad / 4 for name, grad in found.items()}, expected)


@pytest.mark.parametrize("method", FORWARDS)
def test_autocast_around_the_step_loses_no_gradient(method):
    encoder, loss, rows = make(method)
    _, expected = whole_batch(method, encoder, loss, rows, batch_of())
    encoder, loss = encoder.float(), loss.float()
    batch = {"pixel_values": batch_of()["pixel_values"].float()}
    with torch.autocast("cpu", torch.bfloat16):
        GradientCache(encoder, loss, 3).forward_backward(batch)
    found = taken_gradients(encoder)
    largest = max(float(grad.norm()) for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is not None:
            assert float((found[name] - grad).norm()) < 0.1 * largest, name


SHARES = {2: [(0, 3), (3, 7)], 4: [(0, 1), (1, 4), (4, 5), (5, 7)]}


def ranks_step(rank, world_size):
    """Two steps of every method on one rank's share of the batch, so that the second one meets the first's state."""
    own = slice(*SHARES[world_size][rank])
    found = {}
    for method in LOSSES:
        encoder, loss, _ = make(method)
        replica = DistributedDataParallel(encoder, find_unused_parameters=True)
        reductions = []
        replica.register_comm_hook(reductions, count_reduction)
        cache = GradientCache(replica, loss, 2)
        values = [
            cache.forward_backward({name: value[own] for name, value in batch.items()})
            for batch in (batch_of(), later_batch())
        ]
        state = {name: value for name, value in loss.state_dict().items() if name.startswith("queue")}
        found[method] = (values, gradients(encoder), state, len(reductions))
    return found


def later_batch():
    return {"pixel_values": images(SIZE, 2, 3, IMAGE, IMAGE, seed=9), "labels": torch.arange(SIZE)}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process(tmp_path, world_size):
    results = run_on_ranks(ranks_step, world_size, tmp_path, world_size, timeout=240)
    assert len(results) == world_size
    for method in LOSSES:
        encoder, loss, _ = make(method)
        cache = GradientCache(encoder, loss, 64)
        expected_values = [cache.forward_backward(batch) for batch in (batch_of(), later_batch())]
        assert abs(float(expected_values[0] - expected_values[1])) > 1e-5
        expected = gradients(encoder)
        for values, grads, state, reductions in (result[method] for result in results):
            torch.testing.assert_close(values, expected_values, rtol=1e-9, atol=1e-12)
            assert_equal(grads, expected)
            assert reductions == 2, "one for each step"
            for name, value in state.items():
                torch.testing.assert_close(value, loss.state_dict()[name], rtol=1e-9, atol=1e-12)


def ranks_check(rank):
    own, found = slice(*SHARES[2][rank]), {}
    for method in LOSSES:
        encoder, loss, _ = make(method, dropout=0.3)
        replica = DistributedDataParallel(encoder, find_unused_parameters=True)
        batch = {name: value[own] for name, value in batch_of().items()}
        report = check_equivalence(replica, loss, batch, 2)
        found[method] = (report.ok, report.max_relative_error, report.loss)
    return found


@pytest.mark.slow
def test_equivalence_can_be_checked_on_ranks(tmp_path):
    first, second = run_on_ranks(ranks_check, 2, tmp_path, timeout=240)
    for method in LOSSES:
        assert first[method] == second[method]
        ok, error, loss = first[method]
        assert ok, (method, error)
        assert abs(loss) > 1e-3


def test_ranks_that_keep_to_themselves_would_be_seen():
    for method in ("swav", "swav, queue", "moco v3", "nnclr"):
        alone, together = (
            GradientCache(*make(method)[:2], 64).forward_backward(
                {"pixel_values": batch_of()["pixel_values"][own]}
            )
            for own in (slice(0, 3), slice(0, 7))
        )
        assert abs(float(alone - together)) > 1e-3, method


class TestBadInput:
    def test_a_sample_that_is_no_number_is_named_before_gradients_change(self):
        for method in ("byol", "moco v2", "moco v3", "swav", "nnclr"):
            encoder, loss, _ = make(method)
            state = copy.deepcopy(loss.state_dict())
            batch = batch_of()
            batch["pixel_values"][4, 1, 0, 0, 0] = torch.nan
            with pytest.raises(ValueError, match=r"NaN for samples \[4\]"):
                GradientCache(encoder, loss, 3).forward_backward(batch)
            assert all(p.grad is None for p in encoder.parameters()), method
            assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())

    def test_a_sample_that_is_no_number_is_named_without_a_first_pass(self):
        encoder, loss, _ = make("simsiam")
        batch = batch_of()
        batch["pixel_values"][4, 1, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"'loss', got infinity or NaN for samples \[4\]"):
            GradientCache(encoder, loss, 3).forward_backward(batch)

    @pytest.mark.parametrize("loss", [BYOLLoss(), MoCoLoss(), MoCoLoss(queue_size=3)])
    def test_no_momentum_encoder(self, loss):
        with pytest.raises(ValueError, match="expected a momentum encoder in"):
            GradientCache(make_encoder(), loss).forward_backward(batch_of())

    def test_no_predictor_and_no_prototypes(self):
        encoder = encoder_of("vit")
        nnclr = NNCLRLoss(queue_size=3, dim=DIM).double()
        losses = ((SimSiamLoss(), "predictor"), (nnclr, "predictor"), (SwAVLoss(), "prototypes"))
        for loss, name in losses:
            with pytest.raises(ValueError, match=rf"VisionEncoder\(..., {name}=...\)"):
                GradientCache(encoder, loss).forward_backward(batch_of())

    @pytest.mark.parametrize("method", ["simsiam", "byol", "moco v3", "nnclr"])
    def test_more_than_two_views(self, method):
        encoder, loss, _ = make(method)
        with pytest.raises(ValueError, match="expected 2 views of each sample, got 3"):
            GradientCache(encoder, loss).forward_backward(batch_of(views=3))

    def test_a_queue_of_another_width(self):
        encoder = make_encoder()
        teacher = MomentumEncoder(encoder)
        for loss in (NNCLRLoss(queue_size=3), MoCoLoss(queue_size=3, teacher=teacher)):
            with pytest.raises(ValueError, match="set dim of the loss"):
                GradientCache(encoder, loss.double()).forward_backward(batch_of())

    def test_an_empty_batch_keyword_arguments_and_a_frozen_encoder(self):
        encoder, loss, _ = make("simsiam")
        cache = GradientCache(encoder, loss)
        with pytest.raises(ValueError, match="at least one sample"):
            cache.forward_backward_chunks([])
        with pytest.raises(ValueError, match="no keyword arguments"):
            cache.forward_backward(batch_of(), labels=torch.arange(SIZE))
        encoder.requires_grad_(False)
        with pytest.raises(ValueError, match="a term with a gradient"):
            cache.forward_backward(batch_of())

    def test_options(self):
        for options in ({"temperature": 0}, {"epsilon": 0}, {"iterations": 0}, {"assigned": 0}):
            with pytest.raises(ValueError, match="above 0"):
                SwAVLoss(**options)
        with pytest.raises(ValueError, match="expected prototypes for the queue"):
            SwAVLoss(queue_size=4)
        for kind in (MoCoLoss, NNCLRLoss):
            with pytest.raises(ValueError, match="temperature above 0"):
                kind(0)

    def test_batch_norm_in_training_mode(self):
        encoder = encoder_of("resnet, frozen norm", predictor=4)
        for layer in encoder.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.requires_grad_(True)
        encoder.train()
        with pytest.raises(ValueError, match="BatchNorm in training mode"):
            GradientCache(encoder, SimSiamLoss()).forward_backward(batch_of())


class TestBesideTheEngine:
    def test_heads_on_the_full_batch_refuse_a_state_that_nobody_would_move(self):
        encoder = FullBatchHead(encoder_of("vit", head="none"), {"views": torch.nn.Linear(16, DIM)})
        assert encoder.loss(SwAVLoss())
        with pytest.raises(ValueError, match="expected a loss without a state behind heads, got NNCLRLoss"):
            encoder.loss(NNCLRLoss(queue_size=3))

    def test_in_evaluation_the_encoder_stands_in_for_its_teacher(self):
        encoder, loss, rows = make("byol")
        outputs = encoder.eval()(views={"pixel_values": batch_of()["pixel_values"]})
        with pytest.raises(ValueError, match=r"call loss\.eval\(\) first"):
            loss(**outputs)
        expected = oracle("byol", encoder, outputs, outputs["views"].detach(), rows)
        torch.testing.assert_close(loss.eval()(**outputs, labels=torch.arange(SIZE)), expected)

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("method", LOSSES)
    def test_equivalence_can_be_checked(self, method, dropout):
        encoder, loss, rows = make(method, dropout=dropout)
        before = copy.deepcopy(loss.state_dict())
        report = check_equivalence(encoder, loss, batch_of(), 3)
        assert report.ok, report
        assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
        expected, _ = whole_batch(method, encoder, loss, rows, batch_of())
        assert (report.loss == pytest.approx(float(expected), rel=1e-9)) == (dropout == 0)

    def test_nt_xent_is_still_in_regime_a(self):
        encoder = encoder_of("vit")
        own = counted(encoder)
        GradientCache(encoder, NTXentLoss(), 3, retain=0).forward_backward(batch_of())
        assert sum(own) == 2 * SIZE
