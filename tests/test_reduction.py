"""One reduction per step, of whatever some rank has a gradient of, on every backend."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from tests.comparing import assert_equal, gradients
from tests.ranks import run_on_ranks
from tests.topologies import FSDP2, WORLD_SIZES, ZERO, Reductions, prepare

SIZE, CHUNK = 10, 2
HOT = 8  # the only sample that goes to the expert: of the second rank, in its second chunk


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).tanh()


class Mixture(nn.Module):
    """A layer for all samples, an expert for hot ones, another that nobody needs.

    The expert is a weight of the mixture itself: where parameters are sharded, each rank has to run the same modules.
    """

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.block, self.idle = Block(), Block()
        self.expert = nn.Parameter(torch.randn(6, 6) / 2)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        reps, hot = self.block(x), x[:, :1] > 5
        if hot.any():
            reps = torch.where(hot, reps + x @ self.expert, reps)
        return nn.functional.normalize(reps, dim=1)


def mixture() -> Mixture:
    torch.manual_seed(1)
    return Mixture()


def batch() -> Tensor:
    x = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(2))
    x[HOT, 0] = 10
    return x


def own_rows(x: Tensor) -> Tensor:
    return x[:6] if dist.get_rank() == 0 else x[6:]


def loss(reps: Tensor) -> Tensor:
    return (4 * reps @ reps.T).logsumexp(1).mean()


def expected(dtype: torch.dtype) -> dict[str, Tensor | None]:
    model = mixture().to(dtype)
    loss(model(batch().to(dtype))).backward()
    found = gradients(model)
    assert found["expert"].norm() > 1e-3
    assert found["idle.layer.weight"] is None
    return found


def with_ddp(rank: int, find_unused: bool, batches: int) -> Any:
    model = mixture().double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    cache, own = GradientCache(wrapped, loss, CHUNK, retain=rank), own_rows(batch().double())
    losses, reductions = [], Reductions()
    with reductions:
        for _ in range(batches - 1):
            with wrapped.no_sync():
                losses.append(cache.forward_backward(own))
            assert (model.expert.grad is not None) == (rank == 1), "not reduced yet"
        losses.append(cache.forward_backward(own))
    again = gradients(model)
    cache.forward_backward(own)  # DDP is ready for another step
    return losses, again, gradients(model), reductions.numbers, model.calls


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("find_unused", [False, True])
def test_an_expert_of_one_rank_is_trained_on_all(find_unused, batches, tmp_path):
    results = run_on_ranks(with_ddp, 2, tmp_path, find_unused, batches)
    exact = expected(torch.float64)
    size = sum(parameter.numel() for parameter in mixture().parameters())
    for rank, (losses, found, after, numbers, calls) in enumerate(results):
        torch.testing.assert_close(losses, [loss(mixture().double()(batch().double()))] * batches)
        assert_equal(found, {n: None if g is None else batches * g for n, g in exact.items()})
        assert_equal(after, {n: None if g is None else (batches + 1) * g for n, g in exact.items()})
        assert found["idle.layer.weight"] is None, "what nobody has used stays without a gradient"
        assert numbers < size * 1.5 + batches * 500, (
            "one reduction, and what the loss and the agreement exchange"
        )
        chunks = 3 - rank
        assert len(calls) == (batches + 1) * (2 * chunks - min(rank, chunks)), (
            "and nothing was encoded for it"
        )


def sharded(rank: int, topology: str, batches: int, reduce_every: int | None) -> Any:
    model = mixture()
    prepared = prepare(topology, model, gradient_accumulation_steps=batches)
    cache = GradientCache(prepared.encoder, loss, CHUNK, prepared.accelerator, reduce_every=reduce_every)
    for _ in range(2):  # the second optimizer step begins where the first one has left the backend
        for _ in range(batches):
            with prepared.accelerator.accumulate(prepared.encoder):
                cache.forward_backward(own_rows(batch()))
                prepared.optimizer.step()
        assert len(prepared.steps) >= 1
        found = prepared.gradients()
        prepared.optimizer.zero_grad()
    return found, prepared.accelerator.num_processes


def two_steps(batches: int) -> dict[str, Tensor]:
    """What two optimizer steps with a learning rate of 1 take away, or the gradient of the second."""
    model = mixture()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(batch())).backward()
        optimizer.step()
    taken = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    return taken, gradients(model)


CASES = [(topology, batches, None) for topology in (FSDP2, *ZERO) for batches in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "batches", "reduce_every"), [*CASES, (FSDP2, 1, 1), (FSDP2, 2, 2)])
def test_sharded_ranks_agree_on_what_has_a_gradient(topology, batches, reduce_every, tmp_path):
    taken, second = two_steps(batches)
    for found, world_size in run_on_ranks(sharded, 2, tmp_path, topology, batches, reduce_every):
        assert world_size == WORLD_SIZES[topology] == 2
        assert_equal(found, second if topology == FSDP2 else taken)


@pytest.mark.parametrize("reduce_every", [0, -1])
def test_reduce_every_counts_chunks(reduce_every):
    with pytest.raises(ValueError, match="expected reduce_every of at least 1"):
        GradientCache(mixture(), loss, CHUNK, reduce_every=reduce_every)
