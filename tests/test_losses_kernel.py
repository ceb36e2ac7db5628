"""The streaming log-sum-exp: one shift where it is exact, running maxima where it is not, the same either way."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from gc_accel.losses.kernel import exponentials, tiling
from gc_accel.losses.kernel.pairs import Pairs
from gc_accel.losses.kernel.streaming import logsumexp_both_ways, logsumexp_over_pairs
from tests.comparing import assert_equal


@pytest.fixture(params=[(3, 5), (4, 4), (5, 3), (512, 1024)])
def tile_sizes(request, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", request.param[0])
    monkeypatch.setattr(tiling, "TILE_COLUMNS", request.param[1])


@pytest.fixture
def passes(monkeypatch):
    """Which way the sums were taken, tile by tile."""
    taken = []
    for name in ("FixedShift", "RunningMaxima"):
        way = getattr(exponentials, name)
        add = way.add
        monkeypatch.setattr(way, "add", lambda *args, add=add, name=name: (taken.append(name), add(*args))[1])
    return taken


def make_factors(size=7, columns=11, *, scale=5.0, dtype=torch.float64):
    rows, others = (F.normalize(torch.randn(n, 6, dtype=dtype), dim=1) for n in (size, columns))
    return rows.requires_grad_(), others.requires_grad_(), torch.tensor([scale], dtype=dtype).requires_grad_()


def mask_of(pairs, rows, columns):
    whole = pairs.left_out(slice(0, rows), slice(0, columns))
    return torch.zeros(rows, columns, dtype=torch.bool) if whole is None else whole


def gradients(outputs, factors, weights):
    total = sum((each * weight).sum() for each, weight in zip(outputs, weights, strict=True))
    return dict(zip(("rows", "columns", "scale"), torch.autograd.grad(total, factors), strict=True))


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("budget", [0, tiling.DEFAULT_TILE_BUDGET])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [5.0, 5000.0])  # the latter is beyond one shift, even in float64
@pytest.mark.parametrize("start", [0, 3])
def test_both_ways_equals_autograd_through_the_whole_matrix(start, scale, masked, budget, passes):
    factors = make_factors(scale=scale)
    classes, ids = torch.tensor([0, 1, 2, 0, 3, 1, 0, 4, 2, 5, 5]), torch.arange(11)
    own = slice(start, start + 7)
    pairs = Pairs(ids[own], ids, classes[own], classes, classes="other", equal_ids="in") if masked else None
    found = logsumexp_both_ways(*factors, start=start, pairs=pairs, tile_budget=budget)
    assert "RunningMaxima" in passes if scale == 5000 else set(passes) == {"FixedShift"}
    logits = factors[2] * factors[0] @ factors[1].T
    diagonal = logits.diagonal(start)
    if masked:
        mask = mask_of(pairs, 7, 11)
        assert 0 < mask.sum() < 15
        logits = logits.masked_fill(mask, -torch.inf)
    expected = (logits.logsumexp(1), logits.logsumexp(0), diagonal)
    for a, b in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.nearest, logits.argmax(1))
    weights = [torch.randn_like(each) for each in expected]
    assert_equal(gradients(found[:3], factors, weights), gradients(expected, factors, weights))


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("run", [1, 2, 3])
@pytest.mark.parametrize("scale", [5.0, 5000.0])
def test_above_the_diagonal_equals_all_pairs_of_different_ids(scale, run):
    rows, _, scale = make_factors(12, scale=scale)
    ids = torch.arange(12) // run
    halved = logsumexp_over_pairs(rows, rows, scale, Pairs(ids, ids, above_diagonal=True, run=run))
    logits = (scale * rows @ rows.T).masked_fill(ids[:, None] == ids, -torch.inf)
    torch.testing.assert_close(halved, logits.logsumexp(1), rtol=1e-12, atol=1e-12)
    weights = torch.randn(12, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((each * weights).sum(), rows)[0] for each in (halved, logits.logsumexp(1))
    )
    assert_equal({"rows": found}, {"rows": expected})


@pytest.mark.parametrize(
    ("scale", "aligned", "way"),
    [
        (20.0, 0.0, "FixedShift"),  # the bound alone says so
        (100.0, 1.0, "FixedShift"),  # it does not, but the sums are large enough
        (100.0, -1.0, "RunningMaxima"),  # logits near -100 underflow beside a shift for +100
        (400.0, 1.0, "FixedShift"),
        (400.0, 0.2, "RunningMaxima"),
    ],
)
def test_float32_falls_back_where_one_shift_would_lose_something(scale, aligned, way, passes):
    """Rows at a given cosine from all columns: their sums are about exp(scale * aligned)."""
    axis = torch.eye(8)[:1]
    noise = F.normalize(F.pad(torch.randn(9, 7), (1, 0)), dim=1)
    rows = F.normalize(aligned * axis + (1 - aligned**2) ** 0.5 * noise + 1e-3 * torch.randn(9, 8), dim=1)
    columns = F.normalize(axis + 1e-3 * torch.randn(13, 8), dim=1)
    found = logsumexp_both_ways(rows, columns, torch.tensor([scale]))
    assert passes[-1] == way
    logits = scale * rows.double() @ columns.double().T
    torch.testing.assert_close(found.by_row.double(), logits.logsumexp(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.by_column.double(), logits.logsumexp(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [5.0, 5000.0])
def test_a_row_without_pairs_is_minus_infinity_with_gradient_zero(scale):
    rows, columns, scale = make_factors(3, 4, scale=scale)
    classes = torch.tensor([0, 1, 2])
    pairs = Pairs(torch.arange(3), torch.arange(3, 7), classes, torch.tensor([0, 2, 2, 2]))
    found = logsumexp_over_pairs(rows, columns, scale, pairs)
    assert found[1] == -torch.inf
    assert found[[0, 2]].isfinite().all()
    (grad,) = torch.autograd.grad(found[[0, 2]].sum(), rows)
    assert torch.equal(grad[1], torch.zeros(6, dtype=torch.float64))
    assert grad.isfinite().all()


def test_not_a_number_is_not_hidden():
    rows, columns, scale = make_factors()
    spoiled = rows.detach().clone()
    spoiled[2, 3] = torch.nan
    found = logsumexp_both_ways(spoiled, columns, scale)
    assert found.by_row[2].isnan()
    assert found.by_column.isnan().all()


@pytest.mark.parametrize("scale", [5.0, 5000.0])
def test_a_graph_that_is_let_go_is_freed(scale):
    """No cycle between an output and the context that made it, which would keep tiles until a collection."""
    factors = make_factors(scale=scale)
    found = logsumexp_both_ways(*factors)
    node = weakref.ref(found.by_row.grad_fn)
    assert node() is not None
    gc.disable()
    try:
        del found
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("tile_sizes")
def test_kept_tiles_stay_within_the_budget_and_save_products(monkeypatch):
    products = []
    compute = tiling.logits_of
    monkeypatch.setattr(tiling, "logits_of", lambda *args: (products.append(1), compute(*args))[1])
    factors = make_factors(16, 16)
    tile_bytes = min(tiling.TILE_ROWS, 16) * min(tiling.TILE_COLUMNS, 16) * 8
    count = len(list(tiling.tiles(16, 16)))
    for budget, recomputed in ((0, count), (tile_bytes, count - 1), (2**20, 0)):
        products.clear()
        logsumexp_both_ways(*factors, tile_budget=budget).by_row.sum().backward()
        assert len(products) == count + recomputed


@pytest.mark.parametrize("budget", [0, 1000, 2**20])
def test_what_autograd_saves_is_inputs_and_budget_and_goes_with_the_backward_pass(budget, monkeypatch):
    monkeypatch.setattr(tiling, "TILE_ROWS", 4)
    monkeypatch.setattr(tiling, "TILE_COLUMNS", 4)
    saved = []
    factors = make_factors(32, 32)

    def pack(tensor):
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        by_row = logsumexp_both_ways(*factors, tile_budget=budget).by_row
    inputs, matrix = sum(each.nbytes for each in factors), 32 * 32 * 8
    assert sum(saved) <= inputs + budget
    assert sum(saved) >= inputs + min(budget - 4 * 4 * 8, matrix)
    by_row.sum().backward()
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        by_row.grad_fn.saved_tensors  # noqa: B018


@pytest.mark.parametrize(("start", "size", "columns"), [(0, 7, 7), (3, 7, 11), (4, 7, 11), (0, 1, 9)])
@pytest.mark.usefixtures("tile_sizes")
def test_the_diagonal_is_visited_once(start, size, columns):
    seen = torch.zeros(size, columns)
    for at in tiling.tiles(size, columns):
        tile = seen[at]
        rows, diagonal = tiling.diagonal_of(tile, at, start)
        assert rows.stop - rows.start == len(diagonal)
        diagonal += torch.arange(1.0, size + 1)[rows]
    expected = torch.zeros(size, columns)
    expected.diagonal(start)[:] = torch.arange(1.0, size + 1)
    assert torch.equal(seen, expected)
