"""The planner: what it counts on graphs that can be counted by hand, and its forecasts against real steps."""

import copy
import json
from itertools import chain

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTModel

from gc_accel import GradientCache, VisionEncoder
from gc_accel.distributed import Replicas
from gc_accel.engine.joining import CHUNKS
from gc_accel.inputs.packing import Packed
from gc_accel.losses import CLIPLoss, NTXentLoss
from gc_accel.memory.budget import FILL
from gc_accel.memory.fitting import WORTH, fit_chunk_size, largest_chunk
from gc_accel.memory.meters import LiveBytes
from gc_accel.planning import plan
from gc_accel.planning.dry_run import CallCost, DryRun
from gc_accel.planning.loss import loss_cost
from gc_accel.planning.plan import Room, most_retained, suggest
from gc_accel.planning.step import StepCost
from tests.models import dual_encoder, image_text_batch
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
KIB = 1024
MUCH = 2**40


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def vit(*, dropout=0.0, checkpointing=False, layers=2, **options):
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=dropout,
    )
    encoder = VisionEncoder(ViTModel(config), projection_dim=32, **options)
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    return encoder


def two_views(size):
    return {"pixel_values": torch.randn(size, 2, 3, 32, 32)}


def step_of(encoder, sample, batch_size, devices=1):
    return StepCost(DryRun(encoder, sample, CPU, None), batch_size, devices, 2, CPU)


class TestLiveBytes:
    def test_results_count_once_until_they_are_gone(self):
        x = torch.zeros(KIB, dtype=torch.uint8)
        with LiveBytes([x]) as live:
            y = x + 1
            assert live.now == KIB
            z = torch.cat([y, y])
            view = z[:3]
            y.add_(1)
            assert (live.now, live.peak) == (3 * KIB, 3 * KIB)
            del z
            assert live.now == 3 * KIB, "a view keeps its storage"
            del view
            assert (live.now, live.peak) == (KIB, 3 * KIB)
            live.restart()
            assert live.peak == KIB

    def test_what_was_there_before_does_not_count(self):
        x = torch.zeros(KIB, dtype=torch.uint8)
        with LiveBytes([x]) as live:
            assert len(x.view(2, -1)) == 2
            assert live.peak == 0

    def test_a_linear_layer_by_hand(self):
        """C = 3, 7 inputs, 5 outputs: what is saved for the weight's gradient is the input, which does not count."""
        cost = DryRun(nn.Linear(7, 5), torch.zeros(2, 7), CPU, None).cost({None: 3})
        output, weight, bias = 4 * 3 * 5, 4 * 5 * 7, 4 * 5
        both = weight + bias
        # Output, its gradient, and beside them the gradients of the weights, which stay.
        assert cost == CallCost(
            graph=output, building=output, backward=2 * output + both, fresh=2 * output + both, gradients=both
        )

    def test_a_chain_of_layers_by_hand(self):
        """Of sigmoids the outputs are kept, of linear layers the inputs."""
        layers = nn.Sequential(
            nn.Linear(8, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 8, bias=False), nn.Sigmoid()
        )
        run, each = DryRun(layers, torch.zeros(1, 8), CPU, None), 4 * 10 * 8
        assert run.cost({None: 10}).graph == 2 * each  # no linear output is kept
        assert run.cost({None: 10}).building == 3 * each  # with the latest linear output
        assert run.forward({None: 10}) == 2 * each  # the input of one layer, and its output
        work = run.work(None)
        assert work.forward == 2 * 2 * 8 * 8  # two products, multiply and add
        assert work.backward == 3 * 2 * 8 * 8  # of each weight, and of the hidden layer
        assert work.shapes == {None: (8,)}


def live_peak(encoder, loss, batch, chunk_size, retain, accelerator=None):
    """What a real step takes beyond weights and inputs."""
    encoder.zero_grad()
    encoder.train()
    prepared = encoder if accelerator is None else accelerator.prepare(encoder)
    cache = GradientCache(prepared, loss, chunk_size, accelerator, retain=retain, batch_norm="frozen")
    with LiveBytes([*encoder.parameters(), *encoder.buffers(), *batch.values()]) as live:
        cache.forward_backward(batch)
    return live.peak


def forecast(encoder, sample, batch_size, chunk_size, retain, autocast=None):
    """The same, planned."""
    step = StepCost(DryRun(encoder, sample, CPU, autocast), batch_size, 1, 2, CPU)
    stages = step.memory(chunk_size, retain)
    there = sum(stages["loss"][part] for part in ("weights", "optimizer state", "inputs"))
    return max(sum(parts.values()) for parts in stages.values()) - there


CASES = {
    "vit": (vit, NTXentLoss(), two_views),
    "dropout": (lambda: vit(dropout=0.1), NTXentLoss(), two_views),
    "checkpointing": (lambda: vit(checkpointing=True, layers=4), NTXentLoss(), two_views),
    "frozen backbone": (lambda: vit(freeze_backbone=True), NTXentLoss(), two_views),
    "resnet": (lambda: VisionEncoder(timm.create_model("resnet10t", num_classes=0)), NTXentLoss(), two_views),
    "clip": (lambda: dual_encoder("clip").float(), CLIPLoss(), image_text_batch),
    "frozen tower": (lambda: dual_encoder("clip", freeze=("image",)).float(), CLIPLoss(), image_text_batch),
}


def assert_forecast(name, chunk_size, retain):
    """Planned without values, from two samples, and taken with 31, so that the last chunk is cut."""
    make, loss, batch_of = CASES[name]
    encoder = make()
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch_of(31).items()}
    measured = live_peak(encoder, loss, batch, chunk_size, retain)
    computed = forecast(encoder, {k: v[:2] for k, v in batch.items()}, 31, chunk_size, retain)
    assert measured > 10 * KIB
    assert computed == pytest.approx(measured, rel=0.04, abs=16 * KIB)  # small vectors of the loss


@pytest.mark.parametrize(("chunk_size", "retain"), [(4, 1), (4, 3), (5, "all")])
@pytest.mark.parametrize("name", CASES)
def test_forecast_is_what_a_real_step_takes(name, chunk_size, retain):
    assert_forecast(name, chunk_size, retain)


@pytest.mark.parametrize(("chunk_size", "retain"), [(1, 0), (7, 0), (16, 2), (40, 0), (40, 1), (40, "all")])
def test_forecast_at_any_chunk_and_retain(chunk_size, retain):
    assert_forecast("vit", chunk_size, retain)


@pytest.mark.parametrize("retain", [0, 2, "all"])
def test_forecast_under_autocast(retain):
    accelerator, batch = Accelerator(cpu=True, mixed_precision="bf16"), two_views(24)
    encoder = vit()
    computed = forecast(encoder, two_views(1), 24, 4, retain, torch.bfloat16)
    assert computed != forecast(encoder, two_views(1), 24, 4, retain)
    assert computed == pytest.approx(
        live_peak(encoder, NTXentLoss(), batch, 4, retain, accelerator), rel=0.03
    )


def test_more_retained_graphs_take_more():
    found = [forecast(vit(), two_views(1), 24, 4, retain) for retain in (1, 2, 4, "all")]
    assert found == sorted(found)
    assert found[-1] > 2 * found[0]


@pytest.mark.parametrize("retain", [0, 3, "all"])
def test_flops_are_those_of_a_real_step(retain):
    """With a loss without products, as those of the kernel write into tensors and are not counted."""
    encoder = vit(checkpointing=True)
    with FlopCounterMode(display=False) as counter:
        cache = GradientCache(encoder.train(), lambda views: views.square().sum(), 4, retain=retain)
        cache.forward_backward(two_views(31))
    found = step_of(encoder, two_views(1), 31).flops(4, retain)
    assert found["first pass"] + found["second pass"] == pytest.approx(counter.get_total_flops())


def calls_of(step, chunk_size, retain):
    return [(call.stream, call.size, call.keeps_graph) for call in step.calls(chunk_size, retain)]


def test_the_schedule_is_that_of_the_engine():
    """The first chunks and the last keep their graph, and none of a frozen stream."""
    step = step_of(vit(), two_views(1), 11)
    for retain, kept in [(0, {}), (1, {3}), (2, {1, 3}), (3, {1, 2, 3}), ("all", {1, 2, 3})]:
        expected = [("views", size, number in kept) for number, size in [(1, 4), (2, 4), (3, 3)]]
        assert calls_of(step, 4, retain) == expected
    pairs = step_of(dual_encoder("clip"), image_text_batch(1), 7)
    images = [("image", 4, True), ("image", 3, True)]
    assert calls_of(pairs, 4, 2) == [*images, ("text", 4, False), ("text", 3, False)]
    assert calls_of(pairs, 4, "all") == [*images, ("text", 4, True), ("text", 3, True)]
    frozen = step_of(dual_encoder("clip", freeze=("image",)), image_text_batch(1), 7)
    assert calls_of(frozen, 7, "all") == [("image", 7, False), ("text", 7, True)]


@pytest.mark.parametrize("retain", [0, 1, "all"])
def test_a_reduction_over_devices_encodes_nothing(retain):
    one, two = (step_of(vit(), two_views(1), 12, devices) for devices in (1, 2))
    assert one.calls(4, retain) == two.calls(4, retain)
    for stage in ("first pass", "second pass"):
        assert one.flops(4, retain)[stage] == two.flops(4, retain)[stage]
        more = two.memory(4, retain)[stage]["buckets of the reduction"]
        assert sum(two.memory(4, retain)[stage].values()) == sum(one.memory(4, retain)[stage].values()) + more


def test_graphs_of_all_streams_count_before_they_are_used_up():
    step = step_of(dual_encoder("clip").float(), image_text_batch(1), 24, 2)
    image, text = (step.encoder.cost({name: 4}) for name in ("image", "text"))
    kept = 6 * (image.graph + text.graph)
    assert step.memory(4, "all")["loss"]["retained graphs"] == kept
    assert step.activations(4, "all") >= kept - image.graph + image.backward
    assert step.peak(4, "all") > step.peak(4, 5) > step.peak(4, 1)


def test_retaining_spares_forwards():
    step = step_of(vit(), two_views(1), 20)
    forward = step.work["views"].forward
    none, some, everything = (step.flops(4, retain)["second pass"] for retain in (0, 2, "all"))
    assert none - some == pytest.approx(8 * forward)
    assert none - everything == pytest.approx(20 * forward)


def test_graphs_grow_by_the_sample():
    """A straight line through two chunk sizes predicts a third, where activations decide."""
    run = DryRun(vit(dropout=0.1), two_views(1), CPU, None)
    small, large, third = (run.cost({"views": size}) for size in (16, 32, 80))
    assert third.graph == small.graph + (large.graph - small.graph) * (80 - 16) // (32 - 16)
    predicted = small.backward + (large.backward - small.backward) * (80 - 16) / (32 - 16)
    assert third.backward == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("lines", [[(700, 30)], [(5000, 1), (90, 50)], [(900, 0), (300, 2), (0, 3)]])
def test_largest_chunk_fits_and_little_more_does(lines):
    """Of peaks that are the largest of several lines, whatever the bound; none tried takes much more than that."""
    tried = []

    def peak(chunk):
        tried.append(max(a + b * chunk for a, b in lines))
        return tried[-1]

    for memory in chain(range(500, 1500, 7), range(4000, 9000, 111)):
        fitting = [chunk for chunk in range(1, 3001) if max(a + b * chunk for a, b in lines) <= memory]
        tried.clear()
        found = largest_chunk(peak, memory, 3000)
        assert max(fitting, default=0) / (WORTH / FILL) <= found <= max(fitting, default=0)
        assert len(tried) < 50
        assert max(tried[3:], default=0) <= 1.5 * memory


def need(step, chunk_size, retain):
    """Bytes that both passes take where gradients are there."""
    return step.activations(chunk_size, retain) + step.besides(chunk_size, retain)


def test_the_suggestion_fits_and_wastes_nothing():
    step = step_of(vit(), two_views(1), 64)
    limits = {need(step, chunk, retain) for chunk in (1, 8, 32) for retain in (0, 2)}
    limits.add(2 * need(step, 64, "all"))
    seen = set()
    for limit in limits:
        room = Room(int(limit / FILL) + 1)
        chunk, retain = suggest(step, room)
        seen.add((chunk, retain))
        assert step.peak(chunk, retain) <= limit
        work = sum(step.flops(chunk, retain).values())
        options = {
            (size, most_retained(step, size, room))
            for size in (1, 2, 4, 8, 16, 32, 64)
            if room.has(step, size, 0)
        }
        least = min(sum(step.flops(*option).values()) for option in options)
        assert work <= 1.02 * least
        if retain != "all":
            assert max(need(step, chunk, retain + 1), step.peak(chunk, retain + 1)) > limit
        larger = [option for option in options if option[0] > chunk]
        assert all(sum(step.flops(*option).values()) > 1.02 * least for option in larger)
    assert (64, "all") in seen
    assert len(seen) > 3


def test_nothing_fits():
    found = plan(vit(), two_views(1), 64, memory=KIB)
    assert (found.suggested_chunk_size, found.suggested_retain) == (0, 0)
    assert "Does not fit" in str(found)
    assert found.suggested_peak > KIB


def test_memory_is_not_filled_to_the_brim():
    encoder = vit()
    step = step_of(encoder, two_views(1), 16)
    limit = min(need(step, chunk, "all") for chunk in (1, 2, 4, 8, 16)) / FILL
    assert plan(encoder, two_views(1), 16, memory=int(limit) + 8).suggested_retain == "all"
    assert plan(encoder, two_views(1), 16, memory=int(limit) - 8).suggested_retain != "all"


def test_planning_leaves_no_trace():
    encoder = VisionEncoder(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)))
    encoder.train()
    encoder.backbone[1].eval()
    before, modes = copy.deepcopy(encoder.state_dict()), [module.training for module in encoder.modules()]
    sample, state = two_views(1), torch.get_rng_state()
    plan(encoder, sample, 16, memory=MUCH)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in encoder.modules()] == modes
    assert all(parameter.grad is None for parameter in encoder.parameters())
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_without_values_has_the_same_plan():
    with torch.device("meta"):
        empty = vit()
    found, expected = (plan(each, two_views(1), 64, memory=2**22) for each in (empty, vit()))
    assert found == expected
    assert 0 < found.suggested_chunk_size < 64


def test_any_number_of_samples_will_do():
    encoder = vit()
    assert plan(encoder, two_views(1), 16, memory=MUCH) == plan(encoder, two_views(7), 16, memory=MUCH)


def test_an_accelerator_holds_chunks_and_not_the_batch():
    encoder, sample = vit(), two_views(1)
    here = plan(encoder, sample, 64, memory=MUCH, chunk_size=2, retain=1)
    there = plan(encoder, sample, 64, memory=MUCH, chunk_size=2, retain=1, device="cuda")
    each = sample["pixel_values"].nbytes
    assert here.bytes["first pass"]["inputs"] == 64 * each
    assert there.bytes["first pass"]["inputs"] == (CHUNKS * 2 + 2) * each
    for model, chunks in [(encoder, CHUNKS), (vit(checkpointing=True), 1)]:
        step = StepCost(DryRun(model, sample, CPU, None), 64, 1, 2, torch.device("cuda"))
        assert max(call.size for call in step.calls(2, 1)) == 2 * chunks
    assert (
        there.bytes["first pass"]["a chunk being encoded"] > here.bytes["first pass"]["a chunk being encoded"]
    )


def test_optimizer_and_reduction_come_on_top():
    encoder = vit(freeze_backbone=True)
    training = sum(p.nbytes for p in encoder.parameters() if p.requires_grad)
    weights = sum(each.nbytes for each in chain(encoder.parameters(), encoder.buffers()))
    assert 0 < training < weights
    parts = plan(encoder, two_views(1), 8, 2, memory=MUCH).bytes["second pass"]
    assert parts["weights"] == weights
    assert parts["optimizer state"] == 2 * training
    assert parts["buckets of the reduction"] == parts["gradients"] == training


def test_what_devices_send_one_another():
    """W = 4, B = 6: 18 texts of others, twice; sums over 24 columns, three times; rings carry 2 (W-1)/W of it all."""
    encoder = dual_encoder("clip").float()
    found = plan(encoder, image_text_batch(1), 6, 4, memory=MUCH)
    gradients = sum(p.nbytes for p in encoder.parameters())
    assert found.sent == {
        "representations": 2 * 18 * 8 * 4,
        "column sums": 2 * 3 * (3 * 24 * 4) // 4,
        "gradients": 2 * 3 * gradients // 4,
    }
    alone = plan(encoder, image_text_batch(1), 6, memory=MUCH)
    assert set(alone.sent.values()) == {0}
    assert found.flops["loss"] == pytest.approx(4 * alone.flops["loss"])


def loss_on_rank(rank, world_size, name, rows, dim):
    """Peak of a loss on real representations, beyond them and their gradients."""
    generator = torch.Generator().manual_seed(rank)
    kinds = {"clip": 2, "simclr": 1}
    shape = (rows, dim) if name == "clip" else (rows, 2, dim)
    reps = [
        nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1).requires_grad_()
        for _ in range(kinds[name])
    ]
    scale = torch.tensor([14.0])
    with LiveBytes([*reps, scale]) as live:
        joined = [torch.cat([each]) for each in reps]
        (CLIPLoss()(*joined, scale) if name == "clip" else NTXentLoss()(*joined)).backward()
        del joined
    assert all(each.grad.norm() > 0 for each in reps)
    return live.peak - sum(each.nbytes for each in reps)


@pytest.mark.parametrize("rows", [2500, 4000])  # of which most tiles are full
@pytest.mark.parametrize("name", ["clip", "simclr"])
def test_workspace_of_a_loss(name, rows):
    shapes = {"image": (256,), "text": (256,)} if name == "clip" else {"views": (2, 256)}
    computed = loss_cost(shapes, rows, 1).workspace
    assert computed == pytest.approx(loss_on_rank(0, 1, name, rows, 256), rel=0.15)


def test_workspace_has_the_budget_of_tiles_and_no_more():
    rows = 2**16
    assert loss_cost({"image": (64,), "text": (64,)}, rows, 1).workspace < 2**28 + 2 * 4 * rows * 64 + 2**23


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "simclr"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_workspace_of_a_loss_over_ranks(tmp_path, name, world_size):
    shapes = {"image": (256,), "text": (256,)} if name == "clip" else {"views": (2, 256)}
    found = run_on_ranks(loss_on_rank, world_size, tmp_path, world_size, name, 1500, 256)
    assert loss_cost(shapes, 1500, world_size).workspace == pytest.approx(max(found), rel=0.15)


def test_the_table_has_every_part_and_the_file_every_number():
    found = plan(
        dual_encoder("clip").float(), image_text_batch(1), 64, 2, memory=24 * 2**30, chunk_size=8, retain=1
    )
    text = str(found)
    for words in (
        "64 samples on each of 2 devices, chunk_size=8, retain=1",
        "weights",
        "optimizer state",
        "gradients",
        "retained graphs",
        "first pass",
        "share of the work",
        "of 24.0 GiB",
        "Sent by each device",
        "Suggested: chunk_size=64, retain=all",
    ):
        assert words in text
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["peak"] == found.peak == max(sum(parts.values()) for parts in saved["bytes"].values())


def test_wrong_sizes_and_unknown_memory_are_refused():
    with pytest.raises(ValueError, match="sizes of at least 1, got a batch of 0 on 1 devices"):
        plan(vit(), two_views(1), 0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="a device that is not here"):
            plan(vit(), two_views(1), 8, device="cuda")


class Unforeseeable(nn.Linear):
    """Its shapes depend on values."""

    def forward(self, x):
        return super().forward(x) if bool(x.sum() > 0) else super().forward(x) + 1


def test_an_encoder_that_looks_at_values_is_refused():
    with pytest.raises(ValueError, match="looks at their values"):
        plan(Unforeseeable(7, 5), torch.ones(2, 7), 8)


class Patches(nn.Module):
    """Over images of any size, whose patches are packed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 4)

    def forward(self, ids, patches=None):
        return ids[:, None] + self.embed(patches).sum()


def test_packed_inputs_have_the_rows_of_their_samples():
    sample = {"ids": torch.arange(3), "patches": Packed(torch.zeros(8, 6), (5, 0, 3))}
    run = DryRun(Patches(), sample, CPU, None)
    found = run._fake_inputs(sample, 7)["patches"]
    assert found.counts == (5, 0, 3, 5, 0, 3, 5)
    assert found.rows.shape == (21, 6)
    assert run.sample_bytes == (3 * 8 + 8 * 6 * 4) // 3
    few, many = (run.forward({None: count}) for count in (3, 30))
    assert 5 * few < many
    assert run._fake_inputs([Packed(torch.zeros(8, 6), (5, 3))], 1)[0].counts == (5,)
    assert plan(Patches(), sample, 64, memory=MUCH).suggested_chunk_size == 64


def test_retain_is_a_number_all_or_what_fits():
    run = {"memory": 2**22, "chunk_size": 4}
    assert plan(vit(), two_views(1), 64, retain="auto", **run) == plan(vit(), two_views(1), 64, **run)
    for retain in (-1, "some", 1.5):
        with pytest.raises(ValueError, match=f'"auto" or a number of chunks from 0, got {retain!r}'):
            plan(vit(), two_views(1), 64, retain=retain, **run)
    for memory in (0, -5, 0.9):
        with pytest.raises(ValueError, match=f"memory in bytes, at least 1, got {memory}"):
            plan(vit(), two_views(1), 64, memory=memory)


def test_a_plain_module_over_one_tensor():
    found = plan(nn.Linear(7, 5), torch.zeros(2, 7), 8, memory=MUCH)
    assert (found.suggested_chunk_size, found.suggested_retain) == (8, "all")
    assert found.bytes["first pass"]["inputs"] == 8 * 7 * 4


class TestBudget:
    """`memory_budget` and `forward_chunk_size` as the cache has them."""

    def test_activations_within_bytes(self):
        step = step_of(vit(), two_views(1), 64)
        budget = step.activations(4, 2) + 1000
        assert step.activations(1, 0) < budget < step.activations(4, 3)
        found = plan(vit(), two_views(1), 64, chunk_size=4, retain="auto", memory=MUCH, memory_budget=budget)
        assert found.retain == 2
        assert step.activations(found.suggested_chunk_size, found.suggested_retain) <= budget
        tight = {"chunk_size": 4, "memory": MUCH, "memory_budget": step.activations(4, 0) - 1000}
        assert plan(vit(), two_views(1), 64, retain="auto", **tight).retain == 1
        assert plan(vit(), two_views(1), 64, **tight).retain == 0
        everything = plan(vit(), two_views(1), 64, chunk_size=4, retain="auto", memory=MUCH)
        assert everything.retain == "all"

    @pytest.mark.parametrize("retain", [1, 3, "all"])
    @pytest.mark.parametrize("name", ["vit", "clip", "resnet"])
    def test_activations_are_what_a_real_step_takes_besides(self, name, retain):
        """With gradients that are there to be added to, beside representations and their gradients."""
        make, loss, batch_of = CASES[name]
        encoder = make()
        batch = {k: v.float() if v.is_floating_point() else v for k, v in batch_of(31).items()}
        for weight in encoder.parameters():
            weight.grad = torch.zeros_like(weight)
        there = [*encoder.parameters(), *(weight.grad for weight in encoder.parameters())]
        cache = GradientCache(encoder.train(), loss, 4, retain=retain, batch_norm="frozen")
        with LiveBytes([*there, *encoder.buffers(), *batch.values()]) as live:
            cache.forward_backward(batch)
        step = step_of(encoder, {k: v[:2] for k, v in batch.items()}, 31)
        copies = step.gradients + sum(buffer.nbytes for buffer in encoder.buffers())  # noted, to be put back
        found = live.peak - copies - 2 * step.loss.representations
        assert step.activations(4, retain) == pytest.approx(found, rel=0.04, abs=16 * KIB)

    def test_a_chunk_within_bytes_is_the_one_that_is_measured(self):
        encoder, sample, run = vit(), two_views(4), {"chunk_size": "auto", "memory": MUCH}
        step = step_of(encoder, sample, 64)
        for size in (11, 40):
            budget = step.activations(size, 0)
            planned = plan(encoder, sample, 64, memory_budget=budget, **run)
            measured = fit_chunk_size(sample, Replicas(encoder, None), budget, most=64)
            assert abs(measured - planned.chunk_size) <= 1
            assert planned.chunk_size == pytest.approx(size, rel=0.1)
            assert step.activations(planned.suggested_chunk_size, 0) <= budget
        assert plan(encoder, sample, 64, **run).chunk_size == 64
        assert plan(encoder, sample, 64, chunk_size="auto", memory=KIB).chunk_size == 1

    def test_a_fraction_of_the_memory_is_what_everything_else_leaves_of_it(self):
        step = step_of(vit(), two_views(1), 64)
        memory = 2 * (step.activations(4, 3) + step.besides(4, 3))
        half = plan(vit(), two_views(1), 64, chunk_size=4, memory=memory, memory_budget=0.5)
        assert half.retain == 3
        assert half.peak <= memory / 2
        in_bytes = memory / 2 - step.besides(4, 3)
        same = plan(vit(), two_views(1), 64, chunk_size=4, memory=memory, memory_budget=in_bytes)
        assert same.retain == 3

    def test_bytes_are_no_more_than_the_device_has(self):
        run = {"memory": 2**22, "chunk_size": 4}
        assert plan(vit(), two_views(1), 64, **run, memory_budget=MUCH) == plan(
            vit(), two_views(1), 64, **run
        )

    def test_calls_of_the_first_pass(self):
        encoder = DryRun(vit(), two_views(1), CPU, None)
        one, by_default, twelve, more = (
            StepCost(encoder, 64, 1, 2, torch.device("cuda"), size).memory(4, 0)["first pass"]["inputs"]
            for size in (1, None, 12, 23)
        )
        assert (by_default, twelve, more) == (4 * one, 3 * one, 5 * one)

    def test_no_budget_of_nothing(self):
        with pytest.raises(ValueError, match="memory_budget above 0, got 0"):
            plan(vit(), two_views(1), 64, memory=MUCH, memory_budget=0)
