"""A loss of several ranks with different data equals that of one process with the whole batch.

    B = 11      rank 0    rank 1    rank 2    rank 3
    W = 1       11
    W = 2       4         7
    W = 4       3         1         5         2

Every rank has to return the loss of all 11 samples and the derivative with respect to its own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gc_accel.distributed import GlobalLoss
from gc_accel.losses import (
    AlignUniformLoss,
    BarlowTwinsLoss,
    CLIPLoss,
    DCLLoss,
    DCLWLoss,
    DistillationLoss,
    HSICLoss,
    NTXentLoss,
    SelfConLoss,
    SigLIPLoss,
    SpectralLoss,
    SupConLoss,
    VICRegLoss,
)
from gc_accel.losses.kernel import tiling
from tests.comparing import assert_equal
from tests.ranks import run_on_ranks

SIZES = {1: [11], 2: [4, 7], 4: [3, 1, 5, 2]}
LABELS = torch.tensor([0, 1, 2, 0, 3, 1, 0, 4, 2, 5, 5])  # classes reach over ranks; 3 and 4 have one sample

LOSSES: dict[str, tuple[GlobalLoss, str, bool]] = {  # the loss, its kind of inputs, whether it has labels
    "clip": (CLIPLoss(), "pairs", False),
    "clip, labels": (CLIPLoss(), "pairs", True),
    "clip, labels masked": (CLIPLoss(duplicates="mask"), "pairs", True),
    "clip, hard negatives": (CLIPLoss(), "pairs and negatives", False),
    "clip, hard negatives, labels": (CLIPLoss(), "pairs and negatives", True),
    "clip, hard negatives, masked": (CLIPLoss(duplicates="mask"), "pairs and negatives", True),
    "distillation": (DistillationLoss(8.0), "pairs and teacher", False),
    "siglip, labels": (SigLIPLoss(), "pairs", True),
    "siglip": (SigLIPLoss(), "pairs", False),
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
    "dcl": (DCLLoss(), "two views", False),
    "dcl, three views": (DCLLoss(), "three views", False),
    "dclw": (DCLWLoss(), "two views", False),
    "dclw, weights detached": (DCLWLoss(detach_weight=True), "two views", False),
    "align_uniform": (AlignUniformLoss(), "two views", False),
    "spectral": (SpectralLoss(), "two views", False),
    "spectral, tiles": (SpectralLoss(0.5), "wide views", False),
    "barlow": (BarlowTwinsLoss(0.1), "projections", False),
    "barlow, tiles": (BarlowTwinsLoss(0.1), "wide projections", False),
    "vicreg": (VICRegLoss(), "projections", False),
    "vicreg, tiles": (VICRegLoss(), "wide projections", False),
    "hsic": (HSICLoss(features=8), "three views", False),
    "hsic, tiles": (HSICLoss(features=64), "three views", False),
}
SHAPES = {
    "one view": (11, 1, 6),
    "two views": (11, 2, 6),
    "three views": (11, 3, 6),
    "crops": (11, 2, 2, 6),
    "wide views": (11, 2, 17),
    "projections": (11, 2, 6),
    "wide projections": (11, 2, 17),
}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def inputs_of(kind: str, own: slice) -> dict[str, Tensor]:
    """Representations of some samples of the batch: what a rank hands in."""
    torch.manual_seed(len(kind))
    if kind.startswith("pairs"):
        image, text = unit(11, 6)[own], unit(11, 6)[own]
        inputs = {"image": image, "text": text, "logit_scale": torch.tensor([9.0], dtype=torch.float64)}
        if kind == "pairs and negatives":  # some ranks have none
            inputs["negatives"] = unit(3, 6)[own.start // 3 : own.stop // 3]
        if kind == "pairs and teacher":
            inputs |= {"teacher_image": unit(11, 5)[own], "teacher_text": unit(11, 5)[own]}
        return inputs
    views = unit(*SHAPES[kind])[own]
    if "projections" in kind:
        views = views * torch.linspace(0.2, 4, views.shape[-1]) + torch.linspace(0, 2, views.shape[-1])
    return {"views": views.transpose(0, 1).flatten(0, 1) if kind == "crops" else views}


def value_and_gradients(name: str, own: slice) -> dict[str, Tensor]:
    """Value, gradients and, by dotted names, statistics."""
    loss_fn, kind, labelled = LOSSES[name]
    inputs = inputs_of(kind, own)
    leaves = {key: value.clone().requires_grad_("teacher" not in key) for key, value in inputs.items()}
    loss = loss_fn(**leaves, **({"labels": LABELS[own]} if labelled else {}))
    loss.backward()
    noted = getattr(loss_fn, "statistics", {})
    return {
        "loss": loss.detach(),
        **{f"statistics.{key}": value for key, value in noted.items()},
        **{key: leaf.grad for key, leaf in leaves.items() if leaf.requires_grad},
    }


def on_rank(rank: int, sizes: list[int]) -> dict[str, Any]:
    """What one rank finds of its own samples, and why it refuses orphans and single samples."""
    tiling.TILE_ROWS, tiling.TILE_COLUMNS = 3, 5
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = {name: value_and_gradients(name, own) for name in LOSSES}
    refusal = ""
    try:
        SupConLoss(orphans="error")(**inputs_of("one view", own), labels=LABELS[own])
    except ValueError as error:
        refusal = str(error)
    return {"size": dist.get_world_size(), "found": found, "refusal": refusal}


def values(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is the same on all ranks."""
    return {key: value for key, value in found.items() if key == "loss" or "." in key}


def whole(name: str, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients of all ranks as one process has them; a global's are shares of one sum."""
    per_rank = {key: [part[key] for part in parts] for key in parts[0] if key not in values(parts[0])}
    if LOSSES[name][1] == "crops":
        halves = [views.chunk(2) for views in per_rank["views"]]
        return {"views": torch.cat([torch.cat(crops) for crops in zip(*halves, strict=True)])}
    return {key: sum(v) if key == "logit_scale" else torch.cat(v) for key, v in per_rank.items()}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", SIZES)
def test_ranks_return_the_global_loss_and_the_gradient_of_their_own_samples(world_size: int, tmp_path: Path):
    results = run_on_ranks(on_rank, world_size, tmp_path, SIZES[world_size], timeout=240)
    assert [result["size"] for result in results] == [world_size] * world_size
    for name in LOSSES:
        expected = value_and_gradients(name, slice(0, 11))
        parts = [result["found"][name] for result in results]
        for part in parts:
            for key, value in values(expected).items():
                torch.testing.assert_close(
                    part[key], value, rtol=1e-12, atol=1e-13, msg=lambda text, at=(name, key): f"{at}: {text}"
                )
        gradients = {key: value for key, value in expected.items() if key not in values(expected)}
        assert all(float(value.norm()) > 1e-3 for value in gradients.values()), name
        try:
            assert_equal(whole(name, parts), gradients)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    assert all("got 2 of 11 without" in result["refusal"] for result in results)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_part_differs_from_that_of_the_batch(name: str):
    """Else the test above could not see ranks that keep to themselves."""
    alone, together = (value_and_gradients(name, own) for own in (slice(0, 4), slice(0, 11)))
    for key in values(together):
        assert abs(float(alone[key] - together[key])) > 1e-3, key
