"""The parts of methods with few negatives on their own: queue, momentum encoder, Sinkhorn; and beside lightly's."""

import copy
import math
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel import GradientCache
from gc_accel.distributed import RankedBatch
from gc_accel.encoders.heads import Prototypes
from gc_accel.losses import BYOLLoss, MoCoLoss, MomentumEncoder, NNCLRLoss, SimSiamLoss, SwAVLoss, dense
from gc_accel.losses.stateful.queue import TILE_ROWS, Queue
from gc_accel.losses.stateful.swav import sinkhorn
from tests.comparing import assert_equal
from tests.ranks import run_on_ranks
from tests.test_methods import make_encoder
from tests.test_vision_encoder import batch_of
from tests.topologies import FSDP2, forget_accelerators, prepare

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightly.loss import NegativeCosineSimilarity, SwaVLoss
    from lightly.loss import NTXentLoss as LightlyNTXent
    from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
    from lightly.models.modules import NNMemoryBankModule
    from lightly.models.utils import update_momentum


def unit(*shape, seed=0):
    rows = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=-1)


class Kept(nn.Module):
    """A momentum encoder that gives keys known beforehand."""

    def __init__(self, keys):
        super().__init__()
        self.keys = keys

    def forward(self, views):
        return {"views": self.keys[views["index"]]}


class Outputs(nn.Module):
    """An encoder whose outputs are its parameters."""

    streams: ClassVar = {"views": ("index",)}

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = nn.ParameterDict(outputs)

    def forward(self, views):
        return {name: value[views["index"]] for name, value in self.outputs.items()}


def step(loss, **outputs):
    """Value and gradients of a loss through the engine, in chunks, for outputs as they are."""
    encoder = Outputs(**{name: value.clone() for name, value in outputs.items()})
    size = len(next(iter(outputs.values())))
    value = GradientCache(encoder, loss, 3).forward_backward({"index": torch.arange(size)})
    return {"loss": value} | {name: p.grad for name, p in encoder.outputs.items() if p.grad is not None}


def direct(fn, **outputs):
    """The same for a function of the outputs."""
    leaves = {name: value.clone().requires_grad_() for name, value in outputs.items()}
    value = fn(**leaves)
    value.backward()
    return {"loss": value.detach()} | {name: v.grad for name, v in leaves.items() if v.grad is not None}


class TestQueue:
    @pytest.mark.parametrize("sizes", [[1] * 9, [2, 3, 2, 2], [4, 5], [7, 2], [9], [5, 4], [10, 3]])
    def test_keeps_the_latest_rows_whatever_the_batches(self, sizes):
        queue, rows = Queue(5, 3).double(), unit(sum(sizes), 3)
        for part in rows.split(sizes):
            queue.push(part)
        in_order = torch.cat([queue.rows[queue.position :], queue.rows[: queue.position]])
        assert torch.equal(in_order, rows[-5:])
        assert queue.is_full

    def test_loses_no_tail_as_lightlys_does(self):
        queue, bank = Queue(5, 3).double(), NNMemoryBankModule((5, 3)).double()
        first, second = unit(4, 3, seed=1), unit(3, 3, seed=2)
        for rows in (first, second):
            queue.push(rows)
            bank(rows, update=True)
        assert torch.equal(queue.rows.sort(0)[0], torch.cat([first[2:], second]).sort(0)[0])
        found = torch.cdist(second, bank.bank).min(1)[0] < 1e-5
        assert found.tolist() == [True, False, False]

    def test_begins_with_the_same_random_rows_everywhere(self):
        first = Queue(4, 2, 3)
        torch.manual_seed(99)
        second = Queue(4, 2, 3)
        assert torch.equal(first.rows, second.rows)
        torch.testing.assert_close(first.rows.norm(dim=-1), torch.ones(4, 2))
        assert not first.is_full

    def test_nearest_is_by_cosine_over_tiles(self):
        queue, rows = Queue(40, 6).double(), unit(2 * TILE_ROWS + 3, 6, seed=3)
        queue.push(unit(40, 6, seed=4))
        expected = queue.rows[(rows @ queue.rows.T).argmax(1)]
        assert torch.equal(queue.nearest(rows), expected)
        assert len(expected.unique(dim=0)) > 20

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match="at least 1 row, got 0"):
            Queue(0, 3)
        with pytest.raises(ValueError, match=r"rows of shape \(3,\).*got \(4,\)"):
            Queue(2, 3).push(torch.zeros(1, 4))


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.layer(x)))


class TestMomentumEncoder:
    @pytest.mark.parametrize(
        ("schedule", "progress"), [("constant", 0.3), ("cosine", 0.0), ("cosine", 0.3), ("cosine", 1)]
    )
    def test_follows_by_its_formula(self, schedule, progress):
        encoder = WithBuffers()
        teacher = MomentumEncoder(encoder, momentum=0.9, schedule=schedule)
        before = copy.deepcopy(teacher.encoder.state_dict())
        with torch.no_grad():
            for value in encoder.state_dict().values():
                value.add_(1 if not value.is_floating_point() else torch.rand_like(value))
        teacher.update(encoder, progress=progress)
        momentum = 0.9 if schedule == "constant" else 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
        for name, value in encoder.state_dict().items():
            expected = (
                momentum * before[name] + (1 - momentum) * value if value.is_floating_point() else value
            )
            torch.testing.assert_close(teacher.encoder.state_dict()[name], expected)
        moved = not torch.equal(teacher.encoder.layer.weight, before["layer.weight"])
        assert moved == (progress != 1)

    def test_equals_lightlys_on_parameters(self):
        encoder = WithBuffers()
        teacher, other = MomentumEncoder(encoder, momentum=0.97, schedule="constant"), copy.deepcopy(encoder)
        other.requires_grad_(False)
        for _ in range(3):
            with torch.no_grad():
                encoder.layer.weight.add_(torch.randn(2, 3))
            teacher.update(encoder)
            update_momentum(encoder, other, 0.97)
        torch.testing.assert_close(teacher.encoder.layer.weight, other.layer.weight)

    def test_has_no_graph_no_dropout_and_no_part_in_training(self):
        encoder = WithBuffers().train()
        teacher = MomentumEncoder(encoder).train()
        assert not any(module.training for module in teacher.encoder.modules())
        assert encoder.training
        assert encoder.layer.weight.requires_grad
        out = teacher(torch.randn(4, 3))
        assert not out.requires_grad
        assert torch.equal(teacher.encoder.norm.num_batches_tracked, torch.tensor(0))

    def test_is_a_copy(self):
        encoder = WithBuffers()
        teacher = MomentumEncoder(encoder)
        with torch.no_grad():
            encoder.layer.weight.zero_()
        assert teacher.encoder.layer.weight.norm() > 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_refuses_half_precision_in_which_an_average_stands_still(self, dtype):
        mine = torch.ones(4, dtype=dtype)
        assert torch.equal(mine.clone().lerp_(1.05 * mine, 0.004), mine)
        with pytest.raises(ValueError, match=rf"in float32, .*got {dtype}: load .*bf16=True"):
            MomentumEncoder(WithBuffers().to(dtype))

    def test_refuses_what_it_cannot_copy_or_follow(self):
        for options, match in (
            ({"momentum": 1.1}, "momentum from 0 to 1"),
            ({"schedule": "linear"}, "schedule"),
        ):
            with pytest.raises(ValueError, match=match):
                MomentumEncoder(WithBuffers(), **options)
        forget_accelerators()
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(WithBuffers())
        with pytest.raises(ValueError, match=r"before accelerator\.prepare"):
            MomentumEncoder(prepared)
        forget_accelerators()


def following_step(rank):
    """A forward on this rank's own samples; statistics of the encoder, and the state of its momentum encoder."""
    torch.manual_seed(0)
    encoder = WithBuffers()
    teacher = MomentumEncoder(encoder, momentum=0.9)
    replica = DistributedDataParallel(encoder.train())
    for step in range(2):
        replica(torch.randn(4, 3, generator=torch.Generator().manual_seed(2 * step + rank)))
        teacher.update(replica)
    return encoder.norm.running_mean, teacher.state_dict()


def test_momentum_encoders_of_all_ranks_have_the_same_statistics(tmp_path):
    (own, first), (others, second) = run_on_ranks(following_step, 2, tmp_path)
    assert not torch.equal(own, others), "each rank has its own until the next forward"
    for name, value in first.items():
        assert torch.equal(second[name], value), name
    assert first["encoder.norm.running_mean"].norm() > 0
    assert int(first["encoder.norm.num_batches_tracked"]) == 2


class TestSinkhorn:
    def test_shares_out_evenly(self):
        codes = sinkhorn(unit(12, 5), RankedBatch(12, torch.device("cpu")), iterations=200)
        torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64))
        torch.testing.assert_close(codes.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64))

    @pytest.mark.parametrize("iterations", [1, 3, 7])
    def test_equals_lightlys(self, iterations):
        scores = unit(9, 5)
        found = sinkhorn(scores, RankedBatch(9, torch.device("cpu")), iterations=iterations)
        torch.testing.assert_close(found, lightly_sinkhorn(scores, iterations=iterations))

    def test_does_not_overflow_where_exponentials_do(self):
        scores = 60 * unit(9, 5).float()
        found = sinkhorn(scores, RankedBatch(9, torch.device("cpu")))
        assert not (scores / 0.05).exp().isfinite().all()
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(1), torch.ones(9))


def test_prototypes_give_cosines_whatever_the_lengths():
    prototypes, reps = Prototypes(6, 4).double(), unit(5, 2, 6)
    expected = reps @ F.normalize(prototypes.weight, dim=1).T
    with torch.no_grad():
        prototypes.weight.mul_(3)
    torch.testing.assert_close(prototypes(7 * reps), expected)


class TestBesideLightly:
    def test_simsiam_is_the_negative_cosine_of_both_directions(self):
        views, predictions = (
            torch.randn(7, 2, 6, dtype=torch.float64),
            torch.randn(7, 2, 6, dtype=torch.float64),
        )
        criterion = NegativeCosineSimilarity()

        def theirs(predictions):
            return sum(criterion(predictions[:, v], views[:, 1 - v]) for v in (0, 1)) / 2

        found = step(SimSiamLoss(), views=views, predictions=predictions)
        assert_equal(found, direct(theirs, predictions=predictions))

    def test_byol_is_twice_one_plus_the_negative_cosine(self):
        keys, predictions = unit(7, 2, 6, seed=1), torch.randn(7, 2, 6, dtype=torch.float64)
        criterion = NegativeCosineSimilarity()

        def theirs(predictions):
            return sum(2 + 2 * criterion(predictions[:, v], keys[:, 1 - v]) for v in (0, 1))

        found = step(BYOLLoss(teacher=Kept(keys)), predictions=predictions)
        assert_equal(found, direct(theirs, predictions=predictions))

    def test_moco_v2_is_nt_xent_with_a_memory_bank(self):
        keys, views, rows = unit(7, 2, 6, seed=1), unit(7, 2, 6, seed=2), unit(11, 6, seed=3)
        loss = MoCoLoss(0.2, queue_size=11, dim=6, teacher=Kept(keys)).double()
        loss.queue.push(rows)

        def theirs(views):
            total = 0
            for view in (0, 1):
                criterion = LightlyNTXent(0.2, memory_bank_size=(11, 6)).double()
                criterion.memory_bank.bank.copy_(rows)
                total = total + criterion(views[:, view], keys[:, 1 - view]) / 2
            return total

        found, expected = step(loss, views=views), direct(theirs, views=views)
        # lightly's normalises, so that its gradient is tangential.
        radial = (found["views"] * views).sum(2, keepdim=True) * views
        assert_equal(found | {"views": found["views"] - radial}, expected)

    def test_swav_is_swapped_prediction(self):
        scores = unit(7, 4, 5)

        def theirs(scores):
            criterion = SwaVLoss(temperature=0.1)
            return criterion([scores[:, 0], scores[:, 1]], [scores[:, 2], scores[:, 3]]).squeeze()

        assert_equal(step(SwAVLoss(0.1), scores=scores), direct(theirs, scores=scores))

    def test_nnclr_finds_the_same_neighbours_but_is_not_nt_xent_of_them(self):
        """lightly's criterion has neighbours and predictions as negatives of each other and of themselves."""
        views, predictions, rows = unit(7, 2, 6, seed=1), unit(7, 2, 6, seed=2), unit(11, 6, seed=3)
        loss = NNCLRLoss(0.2, queue_size=11, dim=6).double()
        loss.queue.push(rows)
        bank = NNMemoryBankModule((11, 6))
        bank(rows.float(), update=True)
        neighbours = loss.queue.nearest(views.flatten(0, 1)).view_as(views)
        for view in (0, 1):
            torch.testing.assert_close(
                bank(views[:, view].float()).double(), neighbours[:, view], atol=1e-6, rtol=0
            )
        ours, theirs, ours_as_nt_xent = 0.0, 0.0, 0.0
        for view in (0, 1):
            anchors, targets = neighbours[:, view], predictions[:, 1 - view]
            theirs += float(LightlyNTXent(0.2)(anchors, targets)) / 2
            pair = torch.stack([anchors, targets], 1)
            ours_as_nt_xent += float(dense.nt_xent_loss(pair, temperature=0.2)) / 2
            ours += float(F.cross_entropy(anchors @ targets.T / 0.2, torch.arange(7))) / 2
        assert float(loss(views, predictions)) == pytest.approx(ours, rel=1e-12)
        assert theirs == pytest.approx(ours_as_nt_xent, rel=1e-12)
        assert theirs > ours + 0.3


SHARDED = {"simsiam": lambda: SimSiamLoss(), "swav": lambda: SwAVLoss(0.3)}
SHARES = [slice(0, 2), slice(2, 7)]


def sharded_step(rank):
    found = {}
    for method, loss in SHARDED.items():
        prepared = prepare(FSDP2, make_encoder(method).float())
        batch = {"pixel_values": batch_of()["pixel_values"][SHARES[rank]].float()}
        value = GradientCache(prepared.encoder, loss(), 2, prepared.accelerator).forward_backward(batch)
        found[method] = (value, prepared.gradients())
        refused = ""
        try:
            teacher = MomentumEncoder(make_encoder().float())
            GradientCache(
                prepared.encoder, BYOLLoss(teacher=teacher), 2, prepared.accelerator
            ).forward_backward(batch)
        except ValueError as error:
            refused = str(error)
        assert "expected whole parameters for the momentum encoder" in refused
    return found


@pytest.mark.slow
def test_sharded_ranks_with_unequal_chunks_equal_one_process(tmp_path):
    """One rank has one chunk, the other three."""
    results = run_on_ranks(sharded_step, 2, tmp_path, timeout=240)
    for method, loss in SHARDED.items():
        encoder = make_encoder(method).float()
        batch = {"pixel_values": batch_of()["pixel_values"].float()}
        expected_value = GradientCache(encoder, loss(), 64).forward_backward(batch)
        expected = {name: p.grad for name, p in encoder.named_parameters()}
        for value, grads in (result[method] for result in results):
            torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-6)
            assert_equal(grads, expected)
