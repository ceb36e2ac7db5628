"""`cache(batch)` on two ranks with different data: the gradient of one process with all of it, or a refusal by name."""

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from gc_accel.losses import SigLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import dual_encoder, image_text_batch
from tests.ranks import run_on_ranks
from tests.topologies import DDP_2, FSDP2, forget_accelerators, prepare

SIZE = 12
SHARES = {"even": (6, 6), "ragged": (3, 9)}
LOSSES = {"SigLIP": (SigLIPLoss(), dense.siglip_loss), "any callable": (dense.clip_loss, dense.clip_loss)}


@dataclass(frozen=True)
class Case:
    """A step of two ranks: how the encoder is wrapped, and what is asked of the cache."""

    unused: bool = False  # find_unused_parameters
    retain: Any = 1
    freeze: tuple[str, ...] = ()
    shares: str = "ragged"
    loss: str = "SigLIP"
    batches: int = 1


CASES = [
    *(Case(unused, retain) for unused, retain in itertools.product((False, True), (0, 1, "all"))),
    *(Case(unused, freeze=("image",)) for unused in (False, True)),
    *(Case(unused, shares="even", batches=3) for unused in (False, True)),
    Case(freeze=("text",), retain="all"),
    Case(loss="any callable"),
]


def own(batch, shares=SHARES["ragged"]):
    """What this rank has of a batch; all of it on one process."""
    if not dist.is_initialized():
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.split(shares)[dist.get_rank()]
    return {key: value.split(shares)[dist.get_rank()] for key, value in batch.items()}


def batch_of(index=0):
    return image_text_batch(SIZE, seed=2 + index) | {"labels": torch.arange(SIZE) % 9}


def full_batch(encoder, loss_fn, batch):
    streams = {name: {k: batch[k] for k in keys if k in batch} for name, keys in encoder.streams.items()}
    return loss_fn(**encoder(**streams), labels=batch["labels"])


def expected(case):
    """The oracle: one process, the whole batch, a dense loss, one graph."""
    encoder, losses = dual_encoder("siglip", freeze=case.freeze), []
    for index in range(case.batches):
        losses.append(full_batch(encoder, LOSSES[case.loss][1], batch_of(index)))
        (losses[-1] / case.batches).backward()
    return [loss.detach() for loss in losses], gradients(encoder)


def ddp(module, unused=False):
    return DistributedDataParallel(module, find_unused_parameters=unused)


def accumulated(case, wrapped, call):
    """The losses of an optimizer step, and the gradient, by parameter."""
    losses = []
    for index in range(case.batches):
        with nullcontext() if index == case.batches - 1 else wrapped.no_sync():
            loss = call(own(batch_of(index), SHARES[case.shares]))
            (loss / case.batches).backward()
        losses.append(loss.detach())
    return losses, gradients(wrapped.module)


def around_the_encoder(case):
    encoder = ddp(dual_encoder("siglip", freeze=case.freeze), case.unused)
    cache = GradientCache(encoder, LOSSES[case.loss][0], 2, retain=case.retain)
    return accumulated(case, encoder, cache)


class Training(nn.Module):
    """What a trainer wraps: a module whose forward pass calls the cache."""

    def __init__(self, encoder, loss_fn, *, is_function=False, **options):
        super().__init__()
        self.encoder = encoder
        self.loss_fn = loss_fn if isinstance(loss_fn, nn.Module) else None
        encode = (lambda *args, **kwargs: encoder(*args, **kwargs)) if is_function else encoder
        self.cache = GradientCache(encode, loss_fn, 2, **options)

    def forward(self, batch):
        return self.cache(batch)


def around_the_trainer(case):
    training = Training(dual_encoder("siglip", freeze=case.freeze), LOSSES[case.loss][0], retain=case.retain)
    wrapped = ddp(training, case.unused)
    losses, grads = accumulated(case, wrapped, wrapped)
    return losses, {name.removeprefix("encoder."): grad for name, grad in grads.items()}


def rows(size=SIZE, seed=5):
    return torch.randn(size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairwise(reps):
    return (reps @ reps.T).logsumexp(1).mean()


def linear():
    torch.manual_seed(1)
    return nn.Linear(6, 4).double()


class Experts(nn.Module):
    """One expert for all samples, and one for those that are far out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.common, self.rare, self.never = (nn.Linear(6, 4).double() for _ in range(3))

    def forward(self, x):
        far = x[:, 0] > 5
        return self.common(x) + (self.rare(x) * far[:, None] if far.any() else 0)


class Learned(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, reps):
        return pairwise(self.scale * reps)


def far_out():
    """A batch of which the second chunk of the second rank alone has a sample for the rare expert."""
    x = rows()
    x[:, 0] = x[:, 0].clamp(max=4)
    x[SHARES["ragged"][0] + 2, 0] = 6.0
    return x


def an_expert_that_one_chunk_uses(unused, where):
    encoder = Experts()
    if where == "encoder":
        wrapped = ddp(encoder, unused)
        loss = GradientCache(wrapped, pairwise, 2)(own(far_out()))
    else:
        wrapped = ddp(Training(encoder, pairwise, is_function=where == "function"), unused)
        loss = wrapped(own(far_out()))
    loss.backward()
    return gradients(encoder)


def a_loss_that_learns(is_function):
    training = Training(Experts(), Learned(), is_function=is_function)
    wrapped = ddp(training, unused=True)
    wrapped(own(far_out())).backward()
    return gradients(training)


def with_another_loss(unused, order):
    """`cache(batch)` and a mean of this rank's own samples, in one backward pass."""
    model = linear()
    wrapped = ddp(model, unused)
    cache = GradientCache(wrapped, pairwise, 2)
    x, y = own(rows(seed=6)), own(rows(seed=7), SHARES["even"])
    terms = [lambda: cache(x), lambda: wrapped(y).square().mean()]
    sum(term() for term in (terms if order == "cache first" else terms[::-1])).backward()
    return gradients(model)


def with_another_loss_of_some_weights(order):
    """The other loss uses fewer weights than the cache, and DDP looks for unused ones."""
    model = Experts()
    wrapped = ddp(model, unused=True)
    cache = GradientCache(wrapped, pairwise, 2)
    y = own(rows(seed=7), SHARES["even"]).clamp(max=4)
    terms = [lambda: cache(own(far_out())), lambda: wrapped(y).square().mean()]
    try:
        sum(term() for term in (terms if order == "cache first" else terms[::-1])).backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return gradients(model)


def a_second_loss():
    """What is said of it, and the gradient once the first one is dropped."""
    encoder = ddp(dual_encoder("siglip"))
    cache = GradientCache(encoder, SigLIPLoss(), 2)
    loss = cache(own(batch_of(1)))
    message = ""
    try:
        cache(own(batch_of(0)))
    except ValueError as error:
        message = str(error)
    del loss
    cache(own(batch_of(0))).backward()
    return message, gradients(encoder.module)


def two_losses_in_one_trainer():
    training = Training(linear(), pairwise)
    training.forward = lambda x, y: training.cache(x) + 2 * training.cache(y)
    wrapped = ddp(training)
    wrapped(own(rows(seed=6)), own(rows(seed=7))).backward()
    return gradients(training.encoder)


def in_a_forward_pass_of_ddp():
    training = Training(dual_encoder("siglip"), SigLIPLoss())
    training.forward = training.cache.forward_backward
    with pytest.raises(ValueError, match=r"return cache\(batch\)") as caught:
        ddp(training)(own(batch_of()))
    return str(caught.value)


def behind_a_function():
    wrapped = ddp(linear())
    with pytest.raises(ValueError, match="DistributedDataParallel as the encoder") as caught:
        GradientCache(lambda x: wrapped(x), pairwise, 2)(own(rows()))
    return str(caught.value)


def without_a_graph(where):
    encoder = dual_encoder("siglip")
    call = Training(encoder, SigLIPLoss()) if where == "trainer" else encoder
    call = ddp(call) if where == "trainer" else GradientCache(ddp(call), SigLIPLoss(), 2)
    with torch.no_grad():
        return call(own(batch_of()))


class Failing(nn.Module):
    """A model that runs out of memory once, on the second rank, at a place."""

    def __init__(self, place):
        super().__init__()
        self.model, self.place, self.raised = Experts(), place, 0

    def forward(self, x):
        if self.place == "first pass" and not torch.is_grad_enabled():
            self.fail(len(x))
        return self.model(x)

    def loss(self, reps):
        if self.place == "loss" and len(reps) == SIZE:
            self.fail(4)
        return pairwise(reps)

    def fail(self, size):
        if dist.get_rank() == 1 and size > 2 and not self.raised:
            self.raised += 1
            raise torch.OutOfMemoryError("injected")


def out_of_memory(place, where):
    model = Failing(place)
    if where == "encoder":
        cache = GradientCache(ddp(model, unused=True), model.loss, 4)
        loss = cache(own(far_out()))
    else:
        training = Training(model, model.loss)
        training.cache = cache = GradientCache(model, model.loss, 4)
        wrapped = ddp(training, unused=True)
        loss = wrapped(own(far_out()))
    loss.backward()
    return model.raised, cache.chunk_sizes, gradients(model.model)


def with_an_accelerator():
    """A scaler, three accumulated batches, and a weight."""
    scaler = GradScaler("cpu", init_scale=1024.0)
    prepared = prepare(DDP_2, dual_encoder("siglip"), scaler=scaler, gradient_accumulation_steps=3)
    cache = GradientCache(prepared.encoder, SigLIPLoss(), 2, prepared.accelerator)
    for index in range(3):
        with prepared.accelerator.accumulate(prepared.encoder):
            prepared.accelerator.backward(0.5 * cache(own(batch_of(index))))
    scaler.unscale_(prepared.optimizer.optimizer)
    found = prepared.gradients()
    forget_accelerators()
    return found


def all_cells(rank):
    """Everything that two ranks are needed for, in one process group."""
    found: dict[Any, Any] = {"data": own(batch_of())["pixel_values"]}
    for case in CASES:
        found["encoder", case] = around_the_encoder(case)
        found["trainer", case] = around_the_trainer(case)
    for unused, where in EXPERTS:
        found["expert", unused, where] = an_expert_that_one_chunk_uses(unused, where)
    for is_function in (False, True):
        found["learned", is_function] = a_loss_that_learns(is_function)
    for unused, order in OTHERS:
        found["other", unused, order] = with_another_loss(unused, order)
    for order in ("cache first", "cache last"):
        found["some", order] = with_another_loss_of_some_weights(order)
    found["second loss"] = a_second_loss()
    found["two in one"] = two_losses_in_one_trainer()
    found["refused"] = in_a_forward_pass_of_ddp()
    found["behind a function"] = behind_a_function()
    for where in ("encoder", "trainer"):
        found["no graph", where] = without_a_graph(where)
        for place in ("first pass", "loss"):
            found["memory", place, where] = out_of_memory(place, where)
    found["accelerator"] = with_an_accelerator()
    return found


EXPERTS = [*itertools.product((False, True), ("encoder", "trainer")), (True, "function")]
OTHERS = [*itertools.product((False, True), ("cache first", "cache last"))]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    ranks = run_on_ranks(all_cells, 2, tmp_path_factory.mktemp("ranks"))
    assert len(ranks) == 2
    assert ranks[0]["data"].shape != ranks[1]["data"].shape
    assert not torch.equal(ranks[0]["data"][:1], ranks[1]["data"][:1]), "ranks must hold different data"
    return ranks


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("where", ["encoder", "trainer"])
def test_ddp_equals_one_process(two_ranks, where, case):
    losses, grads = expected(case)
    for found_losses, found in (rank[where, case] for rank in two_ranks):
        torch.testing.assert_close(found_losses, losses, rtol=1e-12, atol=0)
        assert_equal(found, grads)


def of_one_process(loss, *modules):
    loss.backward()
    return gradients(modules[0])


@pytest.mark.parametrize(("unused", "where"), EXPERTS)
def test_an_expert_that_one_chunk_of_one_rank_uses(two_ranks, unused, where):
    model = Experts()
    grads = of_one_process(pairwise(model(far_out())), model)
    assert float(grads["rare.weight"].norm()) > 1e-3
    for rank in two_ranks:
        assert_equal(rank["expert", unused, where], grads)
        assert not unused or rank["expert", unused, where]["never.weight"] is None


@pytest.mark.parametrize("is_function", [False, True])
def test_a_parameter_of_the_loss_has_its_gradient(two_ranks, is_function):
    training = Training(Experts(), Learned())
    grads = of_one_process(training.loss_fn(training.encoder(far_out())), training)
    assert float(grads["loss_fn.scale"].abs()) > 1e-3
    for rank in two_ranks:
        assert_equal(rank["learned", is_function], grads)


@pytest.mark.parametrize(("unused", "order"), OTHERS)
def test_adds_up_with_any_other_loss(two_ranks, unused, order):
    model = linear()
    grads = of_one_process(pairwise(model(rows(seed=6))) + model(rows(seed=7)).square().mean(), model)
    for rank in two_ranks:
        assert_equal(rank["other", unused, order], grads)


@pytest.mark.parametrize("order", ["cache first", "cache last"])
def test_another_loss_of_fewer_weights_is_added_or_refused(two_ranks, order):
    model = Experts()
    other = model(rows(seed=7).clamp(max=4)).square().mean()
    grads = of_one_process(pairwise(model(far_out())) + other, model)
    for found in (rank["some", order] for rank in two_ranks):
        if isinstance(found, str):
            assert "mark a variable ready only once" in found, "DDP says so of any two such forward passes"
        else:
            assert_equal(found, grads)


def test_a_second_loss_before_backward_is_refused_as_long_as_the_first_is_there(two_ranks):
    _, grads = expected(Case())
    for message, found in (rank["second loss"] for rank in two_ranks):
        assert "one of them alone would be reduced" in message
        assert_equal(found, grads)


def test_two_losses_in_one_forward_pass_of_a_trainer(two_ranks):
    model = linear()
    grads = of_one_process(pairwise(model(rows(seed=6))) + 2 * pairwise(model(rows(seed=7))), model)
    for rank in two_ranks:
        assert_equal(rank["two in one"], grads)


def test_forward_backward_in_a_forward_pass_of_ddp_is_refused(two_ranks):
    for rank in two_ranks:
        assert "it would reduce nothing" in rank["refused"]


def test_ddp_behind_a_function_is_refused(two_ranks):
    for rank in two_ranks:
        assert "got a function around it" in rank["behind a function"]


@pytest.mark.parametrize("where", ["encoder", "trainer"])
def test_without_grad_mode_it_is_the_loss_of_all_ranks(two_ranks, where):
    (loss,), _ = expected(Case())
    for rank in two_ranks:
        torch.testing.assert_close(rank["no graph", where], loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("where", ["encoder", "trainer"])
@pytest.mark.parametrize("place", ["first pass", "loss"])
def test_all_ranks_try_again_when_one_runs_out_of_memory(two_ranks, place, where):
    model = Experts()
    grads = of_one_process(pairwise(model(far_out())), model)
    assert [rank["memory", place, where][0] for rank in two_ranks] == [0, 1]
    for _, sizes, found in (rank["memory", place, where] for rank in two_ranks):
        assert set(sizes.values()) == {2}
        assert_equal(found, grads)


def test_every_factor_of_an_accelerator_goes_into_the_gradient(two_ranks):
    _, grads = expected(Case(batches=3))
    grads = {name: None if grad is None else 0.5 * grad for name, grad in grads.items()}
    for rank in two_ranks:
        assert_equal(rank["accelerator"], grads)


@dataclass(frozen=True)
class Sharded:
    """A step of FSDP2."""

    retain: Any = 1
    shares: str = "ragged"
    batches: int = 1
    kind: str = "one"


SHARDED = [
    *(Sharded(retain, shares) for retain, shares in itertools.product((0, 1, "all"), SHARES)),
    Sharded(batches=3),
    *(Sharded(kind=kind) for kind in ("one after the other", "together", "other first", "other last")),
]


def single(batch):
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}


def sharded_gradients(encoder, case):
    prepared = prepare(FSDP2, encoder, gradient_accumulation_steps=case.batches)
    accelerator, encoder = prepared.accelerator, prepared.encoder
    cache = GradientCache(encoder, SigLIPLoss(), 2, accelerator, case.retain)
    shares = SHARES["even" if case.kind.startswith("other") else case.shares]
    batches = [single(own(batch_of(index), shares)) for index in range(max(2, case.batches))]
    try:
        if case.kind == "one":
            for batch in batches[: case.batches]:
                with accelerator.accumulate(encoder):
                    accelerator.backward(cache(batch))
        elif case.kind.startswith("other"):
            terms = [lambda: other_of(encoder, batches[1]), lambda: cache(batches[0])]
            terms = terms if case.kind == "other first" else terms[::-1]
            accelerator.backward(sum(term() for term in terms))
        else:
            first, second = cache(batches[0]), cache(batches[1])
            for loss in [first + second] if case.kind == "together" else [first, second]:
                accelerator.backward(loss)
    except ValueError as error:
        return str(error)
    return prepared.gradients()


def other_of(encoder, batch):
    """A mean over samples, of which each rank has as many."""
    outputs = encoder(image={"pixel_values": batch["pixel_values"]})
    return outputs["image"].square().cumsum(1).sum() * 2 / SIZE


def fsdp_cells(rank):
    encoders = [dual_encoder("siglip").float() for _ in SHARDED]
    return [sharded_gradients(encoder, case) for encoder, case in zip(encoders, SHARDED, strict=True)]


def halves(batch):
    return [{k: v.split(SHARES["even"])[rank] for k, v in batch.items()} for rank in range(2)]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return run_on_ranks(fsdp_cells, 2, tmp_path_factory.mktemp("fsdp"), timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(SHARDED)), ids=[str(case) for case in SHARDED])
def test_fsdp2_equals_one_process(fsdp, index):
    case, encoder = SHARDED[index], dual_encoder("siglip").float()
    for number in range(case.batches):
        (full_batch(encoder, dense.siglip_loss, single(batch_of(number))) / case.batches).backward()
    if case.kind.startswith("other"):
        sum(other_of(encoder, single(part)) for part in halves(batch_of(1))).div(2).backward()
    elif case.kind != "one":
        full_batch(encoder, dense.siglip_loss, single(batch_of(1))).backward()
    for rank in fsdp:
        assert not isinstance(rank[index], str), rank[index]
        assert_equal(rank[index], gradients(encoder))


def sharded_trainers(rank):
    """What is said, or the gradient, where FSDP2 shards a trainer's module, and perhaps a layer of the encoder."""
    found = []
    for inner in (False, True):
        training = Training(nn.Sequential(linear(), nn.Linear(4, 3).double()), pairwise)
        if inner:
            fully_shard(training.encoder[0])
        fully_shard(training)
        try:
            training(own(rows())).backward()
            found.append(
                {n: None if p.grad is None else p.grad.full_tensor() for n, p in training.named_parameters()}
            )
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.slow
def test_a_trainer_that_fsdp2_shards_is_refused(tmp_path):
    for messages in run_on_ranks(sharded_trainers, 2, tmp_path):
        for message in messages:
            assert "FSDP" in message


def deepspeed_refusal(rank):
    prepared = prepare("ZeRO-1", dual_encoder("siglip").float())
    cache = GradientCache(prepared.encoder, SigLIPLoss(), 2, prepared.accelerator)
    with pytest.raises(ValueError, match="DeepSpeed") as caught:
        cache(single(own(batch_of())))
    return str(caught.value)


@pytest.mark.slow
def test_deepspeed_is_refused_with_the_line_to_use(tmp_path):
    for message in run_on_ranks(deepspeed_refusal, 2, tmp_path):
        assert "call loss = cache.forward_backward(batch)" in message
