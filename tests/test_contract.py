"""The contract: a configuration never changes the result, for every kind of model on every kind of ranks.

One process with the whole batch in one graph is what all are held against. Each topology runs all its cells
in one process group, once; a cell that did not run fails its test.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from gc_accel import GradientCache, VisionEncoder
from gc_accel.losses import CLIPLoss, NTXentLoss, SigLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import IMAGE, dual_encoder, image_text_batch
from tests.ranks import run_on_ranks
from tests.topologies import (
    DDP_2,
    FSDP2,
    ONE_PROCESS,
    WORLD_SIZES,
    ZERO,
    Reductions,
    forget_accelerators,
    prepare,
)

SIZE = 12
PLAIN = (ONE_PROCESS, DDP_2)  # quick
MIXED = (*PLAIN, FSDP2)
SHARDED = (FSDP2, *ZERO)
BF16 = 1.2  # times the error of the direct step
SPREAD = {"initializer_range": 0.1}  # samples that look alike would leave nothing but rounding in float32
Batch = dict[str, Tensor]


class TiedEncoder(nn.Module):
    """Two streams through the same tower, with a scale that is learned."""

    streams: ClassVar[dict[str, tuple[str, ...]]] = {
        "image": ("pixel_values",),
        "text": ("other_pixel_values",),
    }
    global_names = ("logit_scale",)

    def __init__(self) -> None:
        super().__init__()
        self.tower = ViTModel(ViTConfig(**IMAGE, **SPREAD), add_pooling_layer=False)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))
        self._no_split_modules = self.tower._no_split_modules

    def forward(self, **streams: Batch) -> dict[str, Tensor]:
        outputs = {}
        for name, inputs in streams.items():
            (pixels,) = inputs.values()
            outputs[name] = nn.functional.normalize(self.tower(pixels).last_hidden_state[:, 0], dim=-1)
        return outputs | {"logit_scale": self.logit_scale.exp()}


def tied() -> nn.Module:
    torch.manual_seed(1)
    return TiedEncoder().double()


def dinov2() -> nn.Module:
    torch.manual_seed(1)
    return VisionEncoder(Dinov2Model(Dinov2Config(**IMAGE, **SPREAD)).train(), projection_dim=8).double()


def views(size: int, *, seed: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(size, 2, 3, 8, 8, dtype=torch.float64, generator=generator)}


def pairs(size: int, *, seed: int = 2) -> Batch:
    both = views(size, seed=seed)["pixel_values"]
    return {"pixel_values": both[:, 0], "other_pixel_values": both[:, 1]}


@dataclass(frozen=True)
class Model:
    """An encoder in float64, and what trains it."""

    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    batch: Callable[..., Batch] = image_text_batch


NT_XENT = partial(dense.nt_xent_loss, temperature=0.3)
MODELS = {
    "CLIP": Model(partial(dual_encoder, "clip"), CLIPLoss(), dense.clip_loss),
    "SigLIP": Model(partial(dual_encoder, "siglip"), SigLIPLoss(), dense.siglip_loss),
    "two towers with heads": Model(partial(dual_encoder, "vision_text"), CLIPLoss(), dense.clip_loss),
    "DINOv2": Model(dinov2, NTXentLoss(0.3), NT_XENT, views),
    "one tower frozen": Model(
        partial(dual_encoder, "siglip", freeze=("image",)), SigLIPLoss(), dense.siglip_loss
    ),
    "tied encoder": Model(tied, CLIPLoss(), dense.clip_loss, pairs),
}


@dataclass(frozen=True)
class Case:
    """A step: how many samples each rank has (by world size; equal ones by default), and how it is cut."""

    shares: dict[int, tuple[int, ...]] = field(default_factory=dict)
    chunk_size: Any = 2
    retain: Any = 1
    batches: int = 1


RAGGED_CHUNKS = {"image": 2, "text": 3}
CASES = {
    "even": Case(),
    "ragged": Case({2: (1, 11), 4: (1, 5, 4, 2)}, retain=0),  # one rank has a single sample
    "ragged, one retained": Case({2: (8, 4), 4: (5, 3, 3, 1)}),
    "ragged, all retained": Case({2: (7, 5), 4: (7, 1, 2, 2)}, RAGGED_CHUNKS, retain="all"),
    "accumulated": Case(batches=2),
}
MODELS_OF_CASE = {"even": [*MODELS], "ragged": [*MODELS]}  # the others one model is enough for
CELLS = [
    (topology, model, case)
    for topology, world in WORLD_SIZES.items()
    for case in CASES
    for model in MODELS_OF_CASE.get(case, ["SigLIP"])
    if world > 1 or not CASES[case].shares
]


@dataclass
class Found:
    """What one rank saw of an optimizer step, its gradient in the end."""

    world_size: int
    own: Tensor
    losses: list[Tensor]
    gradients: dict[str, Tensor]
    steps: int
    reductions: float


def dtype_of(topology: str) -> torch.dtype:
    return torch.float32 if topology in SHARDED else torch.float64


def batch_of(model: str, dtype: torch.dtype, index: int = 0) -> Batch:
    batch = MODELS[model].batch(SIZE, seed=2 + index)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def own_part(batch: Batch, case: Case) -> Batch:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sizes = case.shares.get(world, (SIZE // world,) * world)
    return {key: value.split(sizes)[rank] for key, value in batch.items()}


def take_step(topology: str, encoder: nn.Module, model: str, case: Case) -> Found:
    """One optimizer step as a user writes it."""
    prepared = prepare(topology, encoder, gradient_accumulation_steps=case.batches)
    cache = GradientCache(
        prepared.encoder, MODELS[model].loss, case.chunk_size, prepared.accelerator, case.retain
    )
    losses, reductions = [], Reductions()
    for index in range(case.batches):
        own = own_part(batch_of(model, dtype_of(topology), index), case)
        with prepared.accelerator.accumulate(prepared.encoder):
            with reductions:
                losses.append(cache.forward_backward(own))
            prepared.optimizer.step()
    size = sum(prepared.before[name].numel() for name in prepared.trained)
    return Found(
        prepared.accelerator.num_processes,
        next(iter(own.values())),
        losses,
        prepared.gradients(),
        len(prepared.steps),
        reductions.numbers / size,
    )


def bf16_gradients(topology: str, encoder: nn.Module, model: str) -> dict[str, Tensor]:
    prepared = prepare(topology, encoder, mixed_precision="bf16")
    cache = GradientCache(prepared.encoder, MODELS[model].loss, 2, prepared.accelerator)
    cache.forward_backward(own_part(batch_of(model, torch.float32), CASES["even"]))
    return prepared.gradients()


def scaled_gradients(topology: str, encoder: nn.Module, model: str) -> tuple[bool, dict[str, Tensor]]:
    """Whether the first step was skipped, and the unscaled gradient of the second.

    The first overflows; its scale of 2^127 then falls to 2^15, at which the second does not.
    """
    scaler = GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-112)
    prepared = prepare(topology, encoder, scaler=scaler)
    cache = GradientCache(prepared.encoder, MODELS[model].loss, 2, prepared.accelerator)
    own = own_part(batch_of(model, torch.float32), CASES["even"])
    cache.forward_backward(own)
    prepared.optimizer.step()
    skipped = prepared.optimizer.step_was_skipped and not prepared.steps
    prepared.optimizer.zero_grad()
    cache.forward_backward(own)
    scaler.unscale_(prepared.optimizer.optimizer)
    unscaled = prepared.gradients()
    prepared.optimizer.step()
    assert len(prepared.steps) == 1
    return skipped, unscaled


def refusal(topology: str, encoder: nn.Module) -> str:
    """What each rank says when the first has no sample."""
    prepared = prepare(topology, encoder)
    cache = GradientCache(prepared.encoder, MODELS["CLIP"].loss, 2, prepared.accelerator)
    own = own_part(batch_of("CLIP", torch.float32), CASES["even"])
    with pytest.raises(ValueError, match="sample") as caught:
        cache.forward_backward_chunks([own] if dist.get_rank() else [])
    return str(caught.value)


def run_cells(rank: int, topology: str) -> dict[Any, Any]:
    """All cells of a topology, on one rank; encoders are built before there is any accelerator."""
    cells = [(model, case) for name, model, case in CELLS if name == topology]
    encoders = [MODELS[model].build().to(dtype_of(topology)) for model, _ in cells]
    others = {model: [MODELS[model].build().float() for _ in range(3)] for model in MODELS}
    found: dict[Any, Any] = {}
    for (model, case), encoder in zip(cells, encoders, strict=True):
        found[model, case] = take_step(topology, encoder, model, CASES[case])
    for model, (one, another, _) in others.items():
        if topology in MIXED:
            found[model, "bf16"] = bf16_gradients(topology, one, model)
        if topology in PLAIN:
            found[model, "scaled"] = scaled_gradients(topology, another, model)
    if topology in SHARDED:
        found["refusal"] = refusal(topology, others["CLIP"][-1])
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[Any, Any]]]:
    """What every rank of a topology found; run when first asked for, and never again, even if it failed."""

    @cache
    def outcome(topology: str) -> list[dict[Any, Any]] | Exception:
        try:
            if topology == ONE_PROCESS:
                return [run_cells(0, topology)]
            folder = tmp_path_factory.mktemp("ranks")
            return run_on_ranks(run_cells, WORLD_SIZES[topology], folder, topology, timeout=240)
        except Exception as error:
            return error
        finally:
            forget_accelerators()

    def found(topology: str) -> list[dict[Any, Any]]:
        result = outcome(topology)
        if isinstance(result, Exception):
            raise result
        return result

    return found


def direct_step(model: str, dtype: torch.dtype, index: int = 0, autocast: bool = False) -> Any:
    """The oracle: one process, the whole batch, one graph, a dense loss."""
    encoder, batch = MODELS[model].build().to(dtype), batch_of(model, dtype, index)
    streams = {name: {k: batch[k] for k in keys if k in batch} for name, keys in encoder.streams.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = encoder(**streams)
    reps = {name: out if out.dtype == torch.float64 else out.float() for name, out in outputs.items()}
    loss = MODELS[model].dense(**reps)
    loss.backward()
    return loss.detach(), {name: grad for name, grad in gradients(encoder).items() if grad is not None}


@cache
def expected(model: str, dtype: torch.dtype, batches: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    losses, grads = zip(*(direct_step(model, dtype, index) for index in range(batches)), strict=True)
    mean = {name: sum(each[name] for each in grads) / batches for name in grads[0]}
    for name in ("logit_scale", "logit_bias", "patch_embedding", "patch_embeddings"):
        assert all(float(grad.norm()) > 0 for key, grad in mean.items() if name in key)
    return list(losses), mean


def marked(cells: list[tuple[str, ...]]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(*cell, marks=() if cell[0] in PLAIN else slow, id=", ".join(cell)) for cell in cells]


@pytest.mark.parametrize(("topology", "model", "case"), marked(CELLS))
def test_a_step_equals_that_of_one_process(topology: str, model: str, case: str, results: Any) -> None:
    ranks = [found[model, case] for found in results(topology)]
    losses, grads = expected(model, dtype_of(topology), CASES[case].batches)
    assert [rank.world_size for rank in ranks] == [WORLD_SIZES[topology]] * len(ranks)
    assert len({float(rank.own.double().sum()) for rank in ranks}) == len(ranks), "ranks hold the same data"
    for rank in ranks:
        rtol = 1e-5 if topology in SHARDED else 1e-12
        torch.testing.assert_close(rank.losses, losses, rtol=rtol, atol=0)
        assert_equal(rank.gradients, grads)
        assert rank.steps == 1


@pytest.mark.parametrize(("topology", "model", "case"), marked([c for c in CELLS if c[0] != ONE_PROCESS]))
def test_gradients_are_reduced_once(topology: str, model: str, case: str, results: Any) -> None:
    for rank in (found[model, case] for found in results(topology)):
        assert 1 <= rank.reductions < 1.5, "what the loss reduces, and padding, are no second one"


@pytest.mark.parametrize(("topology", "model"), marked([*itertools.product(MIXED, MODELS)]))
def test_bf16_is_no_less_exact_than_in_a_direct_step(topology: str, model: str, results: Any) -> None:
    _, exact = expected(model, torch.float32, 1)
    if topology == FSDP2:  # which has the weights themselves in bf16
        _, direct = direct_step(model, torch.bfloat16)
    else:
        _, direct = direct_step(model, torch.float32, autocast=True)
    allowed = BF16 * distance(direct, exact)
    assert allowed > 1e-3, "bf16 was not on"
    for found in results(topology):
        assert 1e-3 < distance(found[model, "bf16"], exact) <= allowed


def distance(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of two gradients, relative."""
    differences = torch.cat([(got[name].float() - exact[name]).flatten() for name in exact])
    return float(differences.norm() / torch.cat([grad.flatten() for grad in exact.values()]).norm())


@pytest.mark.parametrize(("topology", "model"), marked([*itertools.product(PLAIN, MODELS)]))
def test_a_gradient_scaler_leaves_no_trace_and_skips_what_overflows(
    topology: str, model: str, results: Any
) -> None:
    _, exact = expected(model, torch.float32, 1)
    for skipped, unscaled in (found[model, "scaled"] for found in results(topology)):
        assert skipped
        assert_equal(unscaled, exact)


@pytest.mark.parametrize("topology", [pytest.param(name, marks=pytest.mark.slow) for name in SHARDED])
def test_a_rank_without_a_sample_is_refused_on_all(topology: str, results: Any) -> None:
    for found in results(topology):
        assert "expected a sample on every rank" in found["refusal"]
