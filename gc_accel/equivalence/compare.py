"""A cached step beside its reference, as a report."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import nan
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gc_accel.distributed import Replicas
from gc_accel.equivalence import examine, suspects
from gc_accel.equivalence.errors import allowed_error, coarsest, gradient_errors, loss_error, order
from gc_accel.equivalence.report import EquivalenceReport
from gc_accel.equivalence.steps import Steps

WHOLE, CHUNKED = "the whole batch in one graph", "the same chunks and masks in one graph"
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compare(steps: Steps, chunk_size: int | Mapping[str, int], tolerance: float | None) -> EquivalenceReport:
    """Take the steps that the model calls for, in the same order on every rank."""
    replicas = steps.cache.replicas
    direct, refused = steps.direct(), steps.refused
    precision = _precision(steps.parameters.values(), replicas)
    allowed = allowed_error(precision) if tolerance is None else tolerance
    suspected = examine.in_forward(steps, direct) + examine.in_loss(steps, direct, allowed)
    suspected += examine.in_gradients(direct.gradients)
    if torch.finfo(precision).bits < 32:
        suspected.append(suspects.autocast(precision, allowed))
    # What a cached step refuses BatchNorm for shows in the chunks in one graph.
    outcome = steps.cached() if refused is None else steps.in_chunks()
    ghosts = steps.cache.batch_norms.policy == "ghost"
    grouped = _over_ranks({"grouped": float(direct.drew or ghosts)}, replicas)["grouped"] > 0
    expected = steps.replayed() if grouped and refused is None else direct
    errors = _over_ranks(gradient_errors(outcome.gradients, expected.gradients), replicas)
    drift = float(steps.cache.passes.drift) if refused is None else nan
    rest = _over_ranks({"loss": loss_error(outcome.loss, expected.loss), "drift": drift}, replicas)
    report = EquivalenceReport(
        parameters=dict(sorted(errors.items(), key=lambda item: (-order(item[1]), item[0]))),
        loss=float(outcome.loss),
        loss_difference=rest["loss"],
        representation_difference=rest["drift"],
        suspects=suspected,
        tolerance=allowed,
        reference=WHOLE if expected is direct else CHUNKED,
        compared=refused is None and not examine.all_zero(expected.gradients),
        batch_size=steps.size,
        chunk_size=chunk_size,
        precision=str(precision).removeprefix("torch."),
    )
    if steps.padded and not report.ok:
        return replace(report, suspects=[*suspected, suspects.padding(steps.padded)])
    return report


def not_compared(
    parameters: Iterable[Tensor], size: int, chunk_size: int | Mapping[str, int]
) -> EquivalenceReport:
    """The report on an encoder whose `static_graph` no cached step works with."""
    precision = coarsest(*(parameter.dtype for parameter in parameters))
    return EquivalenceReport(
        parameters={},
        loss=nan,
        loss_difference=nan,
        representation_difference=nan,
        suspects=[suspects.static_graph()],
        tolerance=allowed_error(precision),
        reference=WHOLE,
        compared=False,
        batch_size=size,
        chunk_size=chunk_size,
        precision=str(precision).removeprefix("torch."),
    )


def _precision(parameters: Iterable[Tensor], replicas: Replicas) -> torch.dtype:
    """The floating-point type that the encoder computes in."""
    dtypes = [parameter.dtype for parameter in parameters]
    if replicas.accelerator is not None and replicas.accelerator.mixed_precision in MIXED:
        dtypes.append(MIXED[replicas.accelerator.mixed_precision])
    if torch.is_autocast_enabled(replicas.device.type):
        dtypes.append(torch.get_autocast_dtype(replicas.device.type))
    return coarsest(*dtypes)


def _over_ranks(errors: Mapping[str, float], replicas: Replicas) -> dict[str, float]:
    """The largest of each over all ranks, on all of them."""
    of_ranks: list[Any] = [errors] * replicas.world_size
    if replicas.world_size > 1:
        dist.all_gather_object(of_ranks, errors, group=replicas.group)
    largest = dict[str, float]()
    for name, error in (pair for of_rank in of_ranks for pair in of_rank.items()):
        largest[name] = max(largest.get(name, error), error, key=order)
    return largest
