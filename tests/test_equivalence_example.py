"""The experiment of docs/exactness.md in small: direct and cached coincide, the two wrong ways do not."""

import json

import numpy as np
import pytest

from tests.launching import ROOT, assert_drawn, launch

STEPS, SEEDS = 6, 2
TINY = {
    "steps": STEPS,
    "seeds": SEEDS,
    "width": 16,
    "layers": 1,
    "batch_size": 24,
    "chunk_size": 8,
    "train_size": 120,
    "eval_size": 40,
    "probe_size": 80,
}
LOSSES, DTYPES = ("dot product", "CLIP"), ("float64", "float32")
WAYS = ("direct", "cached", "accumulated", "diagonal")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    flags = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    run = launch("equivalence_check.py", "--output_dir", folder, *flags)
    found = json.loads((folder / "equivalence.json").read_text())["runs"]
    return folder, run, {(r["loss"], r["dtype"], r["way"], r["seed"]): r for r in found}


def gap(a, b):
    return np.abs(np.subtract(a["curve"], b["curve"])).max()


def test_everything_is_written(outcome):
    folder, run, runs = outcome
    assert len(runs) == len(LOSSES) * len(DTYPES) * len(WAYS) * SEEDS
    assert_drawn(folder / "equivalence.png")
    table = (folder / "equivalence.md").read_text()
    assert table in run.stdout
    assert len(table.splitlines()) == 2 + len(LOSSES) * len(DTYPES) * len(WAYS)
    assert run.stdout.count("equal: largest error") == len(LOSSES), "the check of one step"
    assert "32/32" in run.stderr, "no progress bar"
    assert len((ROOT / "examples" / "equivalence_check.py").read_text().splitlines()) < 200


@pytest.mark.parametrize("loss", LOSSES)
def test_cached_is_direct(outcome, loss):
    _, _, runs = outcome
    for seed in range(SEEDS):
        for dtype, gradient, curve, weights in (("float64", 1e-9, 1e-9, 1e-6), ("float32", 1e-5, 1e-3, 0.05)):
            direct, cached = (runs[loss, dtype, way, seed] for way in ("direct", "cached"))
            assert len(direct["curve"]) == STEPS
            assert 0 < max(cached["gradient_errors"].values()) <= gradient
            assert gap(direct, cached) <= curve
            assert 0 < cached["distance"] <= weights
        direct, cached = (runs[loss, "float64", way, seed] for way in ("direct", "cached"))
        assert (direct["retrieval"], direct["probe"]) == (cached["retrieval"], cached["probe"])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_ways_differ_and_are_one_and_the_same(outcome, loss, dtype):
    _, _, runs = outcome
    for seed in range(SEEDS):
        direct, accumulated, diagonal = (
            runs[loss, dtype, way, seed] for way in ("direct", "accumulated", "diagonal")
        )
        for wrong in (accumulated, diagonal):
            assert max(wrong["gradient_errors"].values()) > 0.05
            assert gap(direct, wrong) > 1e-4
            assert wrong["distance"] > 0.05
            assert wrong["curve"][0] == pytest.approx(direct["curve"][0], rel=1e-5), "the same start"
        assert gap(accumulated, diagonal) <= (1e-9 if dtype == "float64" else 1e-3)


def test_seeds_are_runs_of_their_own(outcome):
    _, _, runs = outcome
    first, second = (runs["CLIP", "float64", "direct", seed] for seed in range(SEEDS))
    assert gap(first, second) > 1e-4
