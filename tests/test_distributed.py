"""Several ranks with different data give the gradients of one process with all of it, in one reduction."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from gc_accel.distributed import RankedBatch
from gc_accel.engine.alignment import align
from gc_accel.engine.schedule import Chunk
from gc_accel.losses import CLIPLoss, SigLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import dual_encoder, image_text_batch
from tests.ranks import run_on_ranks

SIZE = 12
LOSSES = {
    "clip": (CLIPLoss(), dense.clip_loss),
    "siglip": (SigLIPLoss(), dense.siglip_loss),
    "clip, any callable": (dense.clip_loss, dense.clip_loss),
}
RETAIN = (0, 1, "all")
FROZEN = ((), ("image",), ("text",))
CASES = list(itertools.product(LOSSES, RETAIN, FROZEN))


def shares(world_size, *, ragged):
    """Where each rank's samples begin and end."""
    if not ragged:
        return [(r * SIZE // world_size, (r + 1) * SIZE // world_size) for r in range(world_size)]
    ends = [(r + 1) * (r + 2) * SIZE // (world_size * (world_size + 1)) for r in range(world_size)]
    return list(zip([0, *ends], ends, strict=False))


def batch_with_labels(size=SIZE):
    return {**image_text_batch(size), "labels": torch.arange(size) % 9}


def one_process(loss, frozen):
    """The oracle: full batch, one graph, dense loss."""
    encoder, batch = dual_encoder("siglip", freeze=frozen), batch_with_labels()
    streams = {name: {k: batch[k] for k in keys if k in batch} for name, keys in encoder.streams.items()}
    value = LOSSES[loss][1](**encoder(**streams), labels=batch["labels"])
    value.backward()
    return value.detach(), gradients(encoder)


def ddp_step(rank, ragged):
    """All cases on one rank: the loss, the gradients after the step, the number of reductions."""
    start, stop = shares(dist.get_world_size(), ragged=ragged)[rank]
    own = {key: value[start:stop] for key, value in batch_with_labels().items()}
    found = []
    for loss, retain, frozen in CASES:
        encoder = DistributedDataParallel(dual_encoder("siglip", freeze=frozen), find_unused_parameters=True)
        reductions = []
        encoder.register_comm_hook(reductions, count_reduction)
        cache = GradientCache(encoder, LOSSES[loss][0], chunk_size=2, retain=retain)
        found.append((cache.forward_backward(own), gradients(encoder.module), len(reductions)))
    return own["pixel_values"], found


def count_reduction(reductions, bucket):
    reductions.append(bucket.index())
    return allreduce_hook(None, bucket)


def assert_ranks_equal_one_process(results):
    assert not torch.equal(results[0][0][:1], results[1][0][:1]), "ranks must hold different data"
    for index, (loss, _, frozen) in enumerate(CASES):
        expected_loss, expected = one_process(loss, frozen)
        for _, found in results:
            value, grads, reductions = found[index]
            torch.testing.assert_close(value, expected_loss, rtol=1e-12, atol=0)
            assert_equal(grads, expected)
            assert reductions == 1


def all_steps(rank):
    """Everything that two ranks are needed for, in one process group."""
    static_graph_is_refused()
    a_sharded_encoder_without_its_accelerator_is_refused()
    return {
        "even": ddp_step(rank, ragged=False),
        "ragged": ddp_step(rank, ragged=True),
        "wrong scale": wrong_scale_step(rank),
        "gather": gather_step(rank),
        "aligned": aligned(CHUNKS[rank]),
        "no sample": aligned(CHUNKS[rank] if rank else []),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    results = run_on_ranks(all_steps, 2, tmp_path_factory.mktemp("ranks"))
    assert len(results) == 2
    return results


@pytest.mark.parametrize("sizes", ["even", "ragged"])
def test_two_ranks_equal_one_process(two_ranks, sizes):
    assert_ranks_equal_one_process([result[sizes] for result in two_ranks])


@pytest.mark.slow
def test_four_ranks_equal_one_process(tmp_path):
    results = run_on_ranks(ddp_step, 4, tmp_path, False)
    assert len(results) == 4
    assert_ranks_equal_one_process(results)


def wrong_scale_step(rank):
    """Mean instead of sum over ranks: what a missing factor W would give."""
    own = {key: value.chunk(2)[rank] for key, value in batch_with_labels().items()}
    encoder = DistributedDataParallel(dual_encoder("siglip"), find_unused_parameters=True)
    cache = GradientCache(encoder, CLIPLoss(), chunk_size=2)
    cache.replicas.world_size = 1
    cache.forward_backward(own)
    return gradients(encoder.module)


def test_a_wrong_scale_would_be_seen(two_ranks):
    _, expected = one_process("clip", ())
    for grads in (result["wrong scale"] for result in two_ranks):
        halved = {name: None if grad is None else 2 * grad for name, grad in grads.items()}
        assert_equal(halved, expected)
        with pytest.raises(AssertionError, match="is off by"):
            assert_equal(grads, expected)


def gather_step(rank):
    rows = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)[: rank + 1].clone().requires_grad_()
    batch = RankedBatch(len(rows), rows.device)
    gathered = batch.gather(rows)
    (gathered * (rank + 1) * torch.arange(1, 4)[:, None]).sum().backward()
    return gathered.detach(), rows.grad, batch.own


def test_gather_sums_the_gradients_of_all_ranks_for_ragged_sizes(two_ranks):
    (first, first_grad, first_own), (second, second_grad, second_own) = (r["gather"] for r in two_ranks)
    assert torch.equal(first, second)
    assert first.tolist() == [[0, 1], [0, 1], [2, 3]]
    assert (first_own, second_own) == (slice(0, 1), slice(1, 3))
    assert first_grad.tolist() == [[3, 3]]
    assert second_grad.tolist() == [[6, 6], [9, 9]]


def static_graph_is_refused():
    encoder = DistributedDataParallel(dual_encoder("clip"), static_graph=True)
    with pytest.raises(ValueError, match="without static_graph"):
        GradientCache(encoder, CLIPLoss())


def a_sharded_encoder_without_its_accelerator_is_refused():
    encoder = fully_shard(dual_encoder("clip"))
    with pytest.raises(ValueError, match="expected the accelerator"):
        GradientCache(encoder, CLIPLoss())


CHUNKS = [  # the streams of each rank's chunks, which begin at different samples to be told apart
    [("image", 1), ("image", 2), ("text", 3), ("image", 4), ("text", 5)],
    [("image", 6), ("text", 7)],
]


def aligned(chunks):
    """The chunks that one rank encodes, how many it had read before each, and what ended them."""
    read = []

    def reading():
        for stream, start in chunks:
            read.append(start)
            yield Chunk(stream, None, start, start + 1)

    encoded = []
    try:
        for chunk in align(reading(), ["image", "text"], torch.device("cpu")):
            encoded.append((chunk.stream, chunk.start, chunk.counts, len(read)))
    except ValueError as error:
        return str(error)
    return encoded


def test_a_rank_with_fewer_chunks_repeats_its_latest_one_of_the_stream_that_comes_next(two_ranks):
    first, second = (result["aligned"] for result in two_ranks)
    assert first == [
        ("image", 1, True, 1),
        ("image", 2, True, 2),
        ("text", 3, True, 3),
        ("image", 4, True, 4),
        ("text", 5, True, 5),
    ]
    assert [chunk[:3] for chunk in second] == [
        ("image", 6, True),
        ("image", 6, False),
        ("text", 7, True),
        ("image", 6, False),
        ("text", 7, False),
    ]


def test_a_rank_without_a_sample_is_refused_on_all(two_ranks):
    for result in two_ranks:
        assert "expected a sample on every rank" in result["no sample"]
