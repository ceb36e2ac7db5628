"""NT-Xent, SupCon and SelfCon equal an explicit double loop and their dense twins, whatever the tiles."""

import subprocess
import sys
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gc_accel.losses import NTXentLoss, SelfConLoss, SupConLoss, dense
from gc_accel.losses.kernel import classes, streaming, tiling
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.memory.meters import LiveBytes
from tests.comparing import assert_equal

OPTIONS = [
    {"variant": variant, "contrast_mode": mode, "orphans": orphans}
    for variant, mode, orphans in product(("out", "in"), ("all", "one"), ("zero", "exclude"))
]
MEMORY = {  # of a tile budget
    "nt_xent": lambda budget: NTXentLoss(tile_budget=budget),
    "supcon": lambda budget: SupConLoss(tile_budget=budget),
    "supcon in": lambda budget: SupConLoss(variant="in", tile_budget=budget),
    "supcon one": lambda budget: SupConLoss(contrast_mode="one", tile_budget=budget),
    "selfcon_s_FG": lambda budget: SelfConLoss(selfcon_s_FG=True, tile_budget=budget),
}
FLAGS = [{}, {"supcon_s": True}, {"selfcon_s_FG": True}, {"selfcon_m_FG": True}]


def make_views(size, count, *, dim=6, dtype=torch.float64):
    return F.normalize(torch.randn(size, count, dim, dtype=dtype), dim=2)


def make_labels(kind, size):
    """None; classes of about three samples; or one class of two samples among classes of one."""
    if kind == "none":
        return None
    return (
        torch.arange(size) % max(1, size // 3) + 5 if kind == "classes" else torch.arange(size).clamp(min=1)
    )


def double_loop(views, classes, anchors, *, temperature, base_temperature, variant="out", orphans="zero"):
    """The loss by its definition: a class per sample of `views` `(B, V, D)`, anchors as (sample, view)."""
    terms, alone = [], 0
    for anchor in anchors:
        others = [row for row in np.ndindex(views.shape[:2]) if row != anchor]
        logits = {row: views[anchor] @ views[row] / temperature for row in others}
        positives = [logits[row] for row in others if classes[row[0]] == classes[anchor[0]]]
        if not positives:
            alone += 1
            continue
        everything = np.logaddexp.reduce(list(logits.values()))
        attraction = np.mean(positives) if variant == "out" else np.logaddexp.reduce(positives)
        terms.append(everything - attraction)
    count = len(terms) + (alone if orphans == "zero" else 0)
    return temperature / base_temperature * sum(terms) / max(1, count)


def value_and_gradient(loss_fn, views):
    views = views.detach().clone().requires_grad_()
    loss = loss_fn(views)
    loss.backward()
    return {"loss": loss.detach(), "views": views.grad}


def assert_same(found, expected):
    if float(expected["views"].norm()) > 1e-9:
        assert_equal(found, expected)
    else:  # nothing attracts, or all rows are positives
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", 3)
    monkeypatch.setattr(tiling, "TILE_COLUMNS", 5)
    monkeypatch.setattr(classes, "CLASSES_AT_ONCE", 2)
    monkeypatch.setattr(classes, "ROWS_AT_ONCE", 4)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["none", "classes", "one pair"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 13])
def test_supcon_equals_the_double_loop_and_the_dense_twin(size, count, kind):
    views, labels = make_views(size, count), make_labels(kind, size)
    classes = list(range(size)) if labels is None else labels.tolist()
    temperatures = {"temperature": 0.2, "base_temperature": 0.3}
    for options in OPTIONS:
        found = value_and_gradient(partial(SupConLoss(**temperatures, **options), labels=labels), views)
        twin = partial(dense.supcon_loss, labels=labels, **temperatures, **options)
        expected = value_and_gradient(twin, views)
        anchors = np.ndindex(size, count if options["contrast_mode"] == "all" else 1)
        of_loop = {key: options[key] for key in ("variant", "orphans")}
        oracle = double_loop(views.numpy(), classes, anchors, **temperatures, **of_loop)
        assert float(found["loss"]) == pytest.approx(oracle, rel=1e-12, abs=1e-13), options
        assert_same(found, expected)
        if size > 3 and (count > 1 or kind != "none"):
            assert float(found["views"].norm()) > 1e-3, options


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("images", [1, 3, 5])
def test_selfcon_equals_the_double_loop_and_the_dense_twin(images, count, flags, labelled):
    crops = 2 if "selfcon_m_FG" in flags else 1
    views = make_views(crops * images, count)
    labels = make_labels("classes", images) if labelled else None
    found = value_and_gradient(partial(SelfConLoss(0.2, **flags), labels=labels), views)
    expected = value_and_gradient(partial(dense.selfcon_loss, labels=labels, temperature=0.2, **flags), views)
    classes = (list(range(images)) if labels is None else labels.tolist()) * crops
    exits = count - (("selfcon_s_FG" in flags) or ("selfcon_m_FG" in flags))
    anchors = np.ndindex(crops * images, exits)
    oracle = double_loop(views.numpy(), classes, anchors, temperature=0.2, base_temperature=0.2)
    assert float(found["loss"]) == pytest.approx(oracle, rel=1e-12, abs=1e-13)
    assert_same(found, expected)
    assert images == 1 or float(found["views"].norm()) > 1e-3


def test_supcon_s_leaves_single_views_without_a_positive_out():
    views, labels = make_views(5, 1), torch.tensor([0, 1, 0, 2, 3])
    found = SelfConLoss(0.2, supcon_s=True)(views, labels)
    anchors = [(0, 0), (2, 0)]
    assert float(found) == pytest.approx(
        double_loop(views.numpy(), labels.tolist(), anchors, temperature=0.2, base_temperature=0.2)
    )
    assert float(SelfConLoss(0.2)(views, labels)) == pytest.approx(float(found) * 2 / 5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", [1, 2, 3, 11])
def test_nt_xent_is_cross_entropy_with_the_other_view(size):
    """SimCLR's own layout: first views above second ones, row i belongs to row i + B."""

    def simclr(views):
        rows = views.transpose(0, 1).flatten(0, 1)
        logits = (rows @ rows.T / 0.5).masked_fill(torch.eye(2 * size, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.arange(2 * size).roll(size))

    views = make_views(size, 2)
    assert_same(value_and_gradient(NTXentLoss(), views), value_and_gradient(simclr, views))


@pytest.mark.usefixtures("small_tiles")
def test_nt_xent_of_several_views_equals_its_dense_twin():
    views = make_views(7, 3)
    twin = partial(dense.nt_xent_loss, temperature=0.3)
    assert_equal(value_and_gradient(NTXentLoss(0.3), views), value_and_gradient(twin, views))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_is_the_derivative_of_the_value(options):
    labels = torch.tensor([0, 1, 0, 2])
    loss = SupConLoss(0.3, **options)
    assert torch.autograd.gradcheck(
        lambda views: loss(views, labels), make_views(4, 2, dim=3).requires_grad_()
    )
    single = make_views(4, 1, dim=3).requires_grad_()  # of which two are orphans
    assert torch.autograd.gradcheck(lambda views: loss(views, labels), single)


def test_base_temperature_rescales_as_in_supcontrast():
    views, labels = make_views(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])
    plain = SupConLoss(0.5)(views, labels)
    rescaled = SupConLoss(0.5, base_temperature=0.07)(views, labels)
    torch.testing.assert_close(rescaled, plain * 0.5 / 0.07)


def test_orphans_are_counted_excluded_or_refused():
    views, labels = make_views(5, 1), torch.tensor([4, 0, 4, 1, 4])
    counted, excluded = (SupConLoss(orphans=how)(views, labels) for how in ("zero", "exclude"))
    assert float(excluded) > 0.1
    torch.testing.assert_close(counted, excluded * 3 / 5)
    with pytest.raises(ValueError, match="got 2 of 5 without"):
        SupConLoss(orphans="error")(views, labels)
    paired = torch.tensor([4, 0, 4, 0, 4])
    assert torch.equal(SupConLoss(orphans="error")(views, paired), SupConLoss()(views, paired))


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("orphans", ["zero", "exclude"])
def test_a_batch_of_orphans_is_zero_without_nan(orphans, variant, size):
    found = value_and_gradient(SupConLoss(variant=variant, orphans=orphans), make_views(size, 1))
    assert float(found["loss"]) == 0
    assert torch.equal(found["views"], torch.zeros_like(found["views"]))


@pytest.mark.parametrize("loss", [NTXentLoss(), SupConLoss(), SelfConLoss()])
def test_swapping_the_second_views_of_two_samples_changes_the_loss(loss):
    views = make_views(6, 2)
    swapped = views.clone()
    swapped[[0, 1], 1] = views[[1, 0], 1]
    assert abs(float(loss(views) - loss(swapped))) > 1e-3


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", OPTIONS)
def test_tile_budget_never_changes_the_result(options):
    views, labels = make_views(11, 2, dtype=torch.float32), torch.arange(11) % 4
    unlimited = value_and_gradient(partial(SupConLoss(**options), labels=labels), views)
    for budget in (0, 0, 100, 1000):
        found = value_and_gradient(partial(SupConLoss(**options, tile_budget=budget), labels=labels), views)
        assert all(torch.equal(found[name], unlimited[name]) for name in unlimited)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (5, 3), (4, 4), (1, 7)])
def test_tiles_above_the_diagonal_hold_each_pair_once(rows, columns, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", rows)
    monkeypatch.setattr(tiling, "TILE_COLUMNS", columns)
    size = 13
    visits, pairs = (
        torch.zeros(size, size),
        Pairs(torch.arange(size), torch.arange(size), above_diagonal=True),
    )
    computed = 0
    for at in tiling.tiles(size, size, above_diagonal=True):
        mask = pairs.left_out(*at)
        tile = visits[at]
        tile += 1 if mask is None else ~mask
        computed += tile.numel()
    assert torch.equal(visits, torch.ones(size, size).triu(1))
    assert computed <= size * (size + rows) / 2


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("budget", "passes"), [(0, 2), (2**20, 1)])
def test_rows_against_themselves_need_half_of_the_logits(budget, passes, monkeypatch):
    computed, logits_of = [], tiling.logits_of

    def counted(*args):
        logits = logits_of(*args)
        computed.append(logits.numel())
        return logits

    monkeypatch.setattr(tiling, "logits_of", counted)
    NTXentLoss(tile_budget=budget)(make_views(20, 2).requires_grad_())
    assert 40 * 39 / 2 <= sum(computed) / passes <= 40 * (40 + 3 + 5) / 2


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("same_class", [False, True])
def test_some_anchors_against_all_rows_equal_their_part_of_the_whole(same_class):
    """What a rank computes of its own rows is what one process computes of them."""
    rows = make_views(13, 1)[:, 0].requires_grad_()
    ids, scale, own = torch.arange(13), torch.tensor([7.0], dtype=torch.float64), slice(4, 9)
    classes = ids % 4 if same_class else None
    whole = Pairs(ids, ids, classes, classes, above_diagonal=True)
    part = Pairs(ids[own], ids, classes[own] if same_class else None, classes)
    expected = streaming.logsumexp_over_pairs(rows, rows, scale, whole)[own]
    found = streaming.logsumexp_over_pairs(rows[own], rows, scale, part)
    (of_expected,) = torch.autograd.grad(expected.sum(), rows)
    (of_found,) = torch.autograd.grad(found.sum(), rows)
    found, expected = found.detach(), expected.detach()
    assert_equal({"value": found, "rows": of_found}, {"value": expected, "rows": of_expected})


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures_stay_finite(temperature, variant):
    views, labels = make_views(6, 2).float(), torch.arange(6) // 2
    options = {"temperature": temperature, "variant": variant}
    found = value_and_gradient(partial(SupConLoss(**options), labels=labels), views)
    expected = value_and_gradient(partial(dense.supcon_loss, labels=labels, **options), views.double())
    assert all(value.isfinite().all() for value in found.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value, rtol=1e-3, atol=1e-5 * float(value.abs().max())
        )


def test_half_precision_is_lifted_to_float32():
    half, labels = make_views(9, 2).bfloat16(), torch.arange(9) // 2
    assert SupConLoss()(half, labels).dtype == torch.float32
    assert torch.equal(SupConLoss()(half, labels), SupConLoss()(half.float(), labels))


def test_evaluation_keeps_and_computes_nothing_for_backward(monkeypatch):
    views, labels = make_views(9, 2).requires_grad_(), torch.arange(9) // 2
    expected = [float(loss(views, labels).detach()) for loss in (NTXentLoss(), SupConLoss(variant="in"))]
    budgets, forward_pass = [], streaming._forward_pass
    monkeypatch.setattr(
        streaming, "_forward_pass", lambda *args: (budgets.append(args[-1]), forward_pass(*args))[1]
    )
    monkeypatch.setattr(streaming, "_backward_pass", None)  # a call would raise
    with torch.no_grad():
        found = [float(loss(views, labels)) for loss in (NTXentLoss(), SupConLoss(variant="in"))]
    assert found == expected
    assert budgets == [0, 0, 0]
    assert float(NTXentLoss()(views.detach())) == expected[0]


def test_inputs_that_make_no_sense_are_refused():
    views = make_views(4, 2)
    for loss in (NTXentLoss(), SupConLoss(), SelfConLoss()):
        with pytest.raises(ValueError, match=r"shape \(B, V, D\).*\(4, 6\)"):
            loss(views[:, 0])
    with pytest.raises(ValueError, match="V of at least 2"):
        NTXentLoss()(views[:, :1])
    with pytest.raises(ValueError, match="V of at least 2"):
        SelfConLoss(selfcon_s_FG=True)(views[:, :1])
    for loss in (SupConLoss(), SelfConLoss()):
        with pytest.raises(ValueError, match=r"a label per sample, shape \(4,\), got \(3,\)"):
            loss(views, torch.zeros(3))
    with pytest.raises(ValueError, match=r"a label per sample, shape \(2,\), got \(4,\)"):
        SelfConLoss(selfcon_m_FG=True)(views, torch.zeros(4))
    with pytest.raises(ValueError, match="two crops of every image, got 3"):
        SelfConLoss(selfcon_m_FG=True)(views[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperatures above 0, got 0.0"),
        ({"base_temperature": -1.0}, "got 0.07 and -1.0"),
        ({"variant": "both"}, "expected variant to be one of .*'out'.*got 'both'"),
        ({"orphans": "nan"}, "expected orphans to be one of .*'exclude'.*got 'nan'"),
        ({"contrast_mode": "two"}, "expected contrast_mode to be one of .*'all'.*got 'two'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SupConLoss(**options)


def test_contradicting_flags_are_refused():
    with pytest.raises(ValueError, match="got both"):
        SelfConLoss(selfcon_s_FG=True, selfcon_m_FG=True)


@pytest.mark.parametrize("kind", ["none", "classes"])
@pytest.mark.parametrize("options", [{}, {"variant": "in", "contrast_mode": "one"}])
def test_statistics_are_means_over_all_pairs_of_views(kind, options):
    views, labels = make_views(7, 3), make_labels(kind, 7)
    loss = SupConLoss(**options)
    loss(views, labels)
    rows = views.flatten(0, 1)
    classes = (torch.arange(7) if labels is None else labels).repeat_interleave(3)
    similarity, alike = rows @ rows.T, classes[:, None] == classes
    siblings = alike & ~torch.eye(21, dtype=torch.bool)
    expected = {"positive_similarity": siblings, "negative_similarity": ~alike}
    assert loss.statistics.keys() == expected.keys()
    for name, pairs in expected.items():
        torch.testing.assert_close(loss.statistics[name], similarity[pairs].mean(), rtol=1e-12, atol=1e-12)
        assert not loss.statistics[name].requires_grad


@pytest.mark.parametrize("loss", [NTXentLoss(), SupConLoss(), SupConLoss(variant="in", contrast_mode="one")])
def test_autocast_around_a_loss_changes_nothing(loss):
    views, labels = make_views(33, 2, dtype=torch.float32), torch.arange(33) % 5
    expected, noted = value_and_gradient(partial(loss, labels=labels), views), loss.statistics
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(partial(loss, labels=labels), views)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert noted.keys() == loss.statistics.keys()
    assert all(torch.equal(noted[name], loss.statistics[name]) for name in noted)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [*OPTIONS, {"tile_budget": 0}])
def test_a_second_backward_pass_adds_the_same_gradient(options):
    views, labels = make_views(9, 2), torch.arange(9) % 4
    expected = value_and_gradient(partial(SupConLoss(**options), labels=labels), views)
    leaf = views.clone().requires_grad_()
    loss = SupConLoss(**options)(leaf, labels)
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    assert_equal({"views": leaf.grad / 3}, {"views": expected["views"]})


@pytest.mark.parametrize("loss", [NTXentLoss(), SupConLoss(), SelfConLoss(selfcon_s_FG=True)])
def test_views_may_lie_in_memory_in_any_order(loss):
    views, labels = make_views(7, 3), torch.arange(7) % 3
    strided = views.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    found, expected = (value_and_gradient(partial(loss, labels=labels), each) for each in (strided, views))
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", ["none", "classes", "one pair", "one class"])
@pytest.mark.parametrize(("block", "slab"), [(1, 1), (2, 5), (3, 4), (1024, 1024)])
def test_attraction_equals_the_sum_over_all_pairs_of_a_class(block, slab, kind, monkeypatch):
    """Of any weights, in any blocks of classes and slabs of samples."""
    monkeypatch.setattr(classes, "CLASSES_AT_ONCE", block)
    monkeypatch.setattr(classes, "ROWS_AT_ONCE", slab)
    views, weights = make_views(13, 3).requires_grad_(), torch.randn(13, 3, dtype=torch.float64)
    labels = torch.zeros(13) if kind == "one class" else make_labels(kind, 13)
    labels = (torch.arange(13) if labels is None else labels)[torch.randperm(13)]
    rows, of_rows = views.flatten(0, 1), labels.repeat_interleave(3)
    alike = (of_rows[:, None] == of_rows).fill_diagonal_(False)
    expected = (weights.flatten()[:, None] * alike * (rows @ rows.T)).sum()
    expected.backward()
    gradient = torch.ones_like(views).detach()
    found = classes.attraction(views.detach(), classes.classes_of(labels), weights, gradient)
    assert_equal({"value": found, "views": gradient - 1}, {"value": expected.detach(), "views": views.grad})


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [0, 2**16])
@pytest.mark.parametrize("labelled", ["all alone", "few classes"])
@pytest.mark.parametrize("name", MEMORY)
def test_memory_beyond_the_gradient_and_the_budget_is_flat(name, labelled, budget, monkeypatch):
    """Per row there may be some integers, but no copy, in a forward and a backward pass."""
    monkeypatch.setattr(tiling, "TILE_ROWS", 32)
    monkeypatch.setattr(tiling, "TILE_COLUMNS", 32)

    def peak(size):
        views = make_views(size // 3, 3, dim=256, dtype=torch.float32).requires_grad_()
        labels = torch.arange(size // 3) % (size if labelled == "all alone" else 7)
        with LiveBytes([views, labels]) as live:
            MEMORY[name](budget)(views, labels).backward()
        assert live.peak >= views.nbytes + budget
        return live.peak

    copies = (peak(600) - peak(300)) / (300 * 256 * 4)
    assert 1 <= copies < 1.15


PEAK = """
import resource, sys, torch
from gc_accel.losses import SupConLoss
size, variant, mode, budget = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
loss = SupConLoss(variant=variant, contrast_mode=mode, tile_budget=budget)
torch.set_num_threads(1)
def step(n):
    views = torch.nn.functional.normalize(torch.randn(n // 2, 2, 32), dim=2).requires_grad_()
    loss(views, torch.arange(n // 2) % 100).backward()
step(1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(size)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "mode", "budget"), [("out", "all", 0), ("in", "one", 0), ("out", "all", 64 * 2**20)]
)
def test_memory_is_linear_in_the_rows_plus_the_budget(variant, mode, budget):
    """At 16,384 rows their similarity matrix has 1,024 MiB; representations and gradients have 4 MiB."""
    command = [sys.executable, "-c", PEAK, "16384", variant, mode, str(budget)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    assert float(run.stdout) < budget / 2**20 + 16
