"""A loss of several ranks with different data equals that of one process with the whole batch.

    B = 11      rank 0    rank 1    rank 2    rank 3
    W = 1       11
    W = 2       4         7
    W = 4       3         1         5         2

Every rank has to return the loss of all 11 samples and the derivative with respect to its own.
"""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from gc_accel.distributed import GlobalLoss
from gc_accel.losses import CLIPLoss, NTXentLoss, SelfConLoss, SigLIPLoss, SupConLoss, streaming
from tests.comparing import assert_equal

SIZES = {1: [11], 2: [4, 7], 4: [3, 1, 5, 2]}
TIMEOUT = 150  # seconds
LABELS = torch.tensor([0, 1, 2, 0, 3, 1, 0, 4, 2, 5, 5])  # classes reach over ranks; 3 and 4 have one sample

LOSSES: dict[str, tuple[GlobalLoss, str, bool]] = {  # the loss, its kind of inputs, whether it has labels
    "clip": (CLIPLoss(), "pairs", False),
    "clip, labels": (CLIPLoss(), "pairs", True),
    "siglip, labels": (SigLIPLoss(), "pairs", True),
    "nt_xent": (NTXentLoss(), "two views", False),
    "supcon": (SupConLoss(), "two views", True),
    "supcon, no labels": (SupConLoss(), "two views", False),
    "supcon in": (SupConLoss(variant="in"), "two views", True),
    "supcon one": (SupConLoss(contrast_mode="one"), "two views", True),
    "supcon, orphans zero": (SupConLoss(), "one view", True),
    "supcon in, orphans excluded": (SupConLoss(variant="in", orphans="exclude"), "one view", True),
    "selfcon": (SelfConLoss(), "three views", True),
    "selfcon supcon_s": (SelfConLoss(supcon_s=True), "one view", True),
    "selfcon_s_FG": (SelfConLoss(selfcon_s_FG=True), "three views", True),
    "selfcon_m_FG": (SelfConLoss(selfcon_m_FG=True), "crops", True),
    "selfcon_m_FG, no labels": (SelfConLoss(selfcon_m_FG=True), "crops", False),
}


def inputs_of(kind: str, own: slice) -> dict[str, Tensor]:
    """Representations of some samples of the batch: what a rank hands in."""
    torch.manual_seed(len(kind))
    if kind == "pairs":
        image, text = (F.normalize(torch.randn(11, 6, dtype=torch.float64), dim=1)[own] for _ in range(2))
        return {"image": image, "text": text, "logit_scale": torch.tensor([9.0], dtype=torch.float64)}
    shape = {"one view": (11, 1), "two views": (11, 2), "three views": (11, 3), "crops": (11, 2, 2)}[kind]
    views = F.normalize(torch.randn(*shape, 6, dtype=torch.float64), dim=-1)[own]
    return {"views": views.transpose(0, 1).flatten(0, 1) if kind == "crops" else views}


def value_and_gradients(name: str, own: slice) -> dict[str, Tensor]:
    loss_fn, kind, labelled = LOSSES[name]
    leaves = {key: value.clone().requires_grad_() for key, value in inputs_of(kind, own).items()}
    loss = loss_fn(**leaves, **({"labels": LABELS[own]} if labelled else {}))
    loss.backward()
    return {"loss": loss.detach(), **{key: leaf.grad for key, leaf in leaves.items()}}


def rank_main(rank: int, sizes: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    streaming.TILE_ROWS, streaming.TILE_COLUMNS = 3, 5
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=len(sizes))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = {name: value_and_gradients(name, own) for name in LOSSES}
    refusal = ""
    try:
        SupConLoss(orphans="error")(**inputs_of("one view", own), labels=LABELS[own])
    except ValueError as error:
        refusal = str(error)
    torch.save((dist.get_world_size(), found, refusal), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_ranks(sizes: list[int], folder: Path) -> list[tuple[int, dict[str, dict[str, Tensor]], str]]:
    """What each rank found; ranks that hang are killed."""
    ranks = mp.spawn(rank_main, (sizes, str(folder)), nprocs=len(sizes), join=False)
    end = time.monotonic() + TIMEOUT
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < end, f"ranks still run after {TIMEOUT} s"
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(sizes))]


def whole(name: str, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients of all ranks as one process has them; a global's are shares of one sum."""
    per_rank = {key: [part[key] for part in parts] for key in parts[0] if key != "loss"}
    if LOSSES[name][1] == "crops":
        halves = [views.chunk(2) for views in per_rank["views"]]
        return {"views": torch.cat([torch.cat(crops) for crops in zip(*halves, strict=True)])}
    return {key: sum(v) if key == "logit_scale" else torch.cat(v) for key, v in per_rank.items()}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", SIZES)
def test_ranks_return_the_global_loss_and_the_gradient_of_their_own_samples(world_size: int, tmp_path: Path):
    sizes = SIZES[world_size]
    results = run_ranks(sizes, tmp_path)
    assert [size for size, _, _ in results] == [world_size] * world_size
    for name in LOSSES:
        expected = value_and_gradients(name, slice(0, 11))
        parts = [found[name] for _, found, _ in results]
        for part in parts:
            torch.testing.assert_close(part["loss"], expected["loss"], rtol=1e-12, atol=0)
        gradients = {key: value for key, value in expected.items() if key != "loss"}
        assert all(float(value.norm()) > 1e-3 for value in gradients.values()), name
        assert_equal(whole(name, parts), gradients)
    assert all("got 2 of 11 without" in refusal for _, _, refusal in results)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_part_differs_from_that_of_the_batch(name: str):
    """Else the test above could not see ranks that keep to themselves."""
    alone, together = (value_and_gradients(name, own)["loss"] for own in (slice(0, 4), slice(0, 11)))
    assert abs(float(alone - together)) > 1e-3
