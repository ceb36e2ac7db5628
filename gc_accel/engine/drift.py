"""The second pass is the first: representations of a chunk that is encoded again, against those of the first pass.

A cache is exact if they are equal. Whatever keeps them from it is seen here, whether anyone has thought of it: a
generator of NumPy's or of a model's own, a buffer that each forward moves, an input that is changed in place, a branch
on grad mode. One number for each chunk stays on the device, and the host reads them once, before gradients are reduced.
Ranks exchange the largest, so that all of them raise, or none.
"""

from collections.abc import Collection, Sequence
from math import inf
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.utils import logging

from gc_accel.distributed import Replicas
from gc_accel.engine.encoding import Encoded, Named
from gc_accel.state.repeat import difference
from gc_accel.state.snapshot import Snapshot

OnDrift = Literal["error", "warn", "ignore"]
# Relative to the norm of a sample's representation. Equal passes differ by nothing, joined calls by roundings.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
TOLERANCE_OF_HALF = 5e-2
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float16}
logger = logging.get_logger(__name__)


class Drift:
    """How far the second pass of a step is from its first.

    Args:
        on_drift: what to do about it.
        replicas: of the encoder.

    Raises:
        ValueError: there is no such thing to do.
    """

    def __init__(self, on_drift: OnDrift, replicas: Replicas) -> None:
        if on_drift not in get_args(OnDrift):
            raise ValueError(f"expected on_drift of {get_args(OnDrift)}, got {on_drift!r}")
        self.on_drift, self.replicas = on_drift, replicas
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what was noted."""
        self.errors = list[Tensor]()  # 0-d, on the device
        self.places = list[Any]()  # of their chunks
        self.dtypes = set[torch.dtype]()

    def note(self, encoded: Encoded, again: Named, global_names: Collection[Any]) -> None:
        """Compare a chunk with its leaves, unless its graph was kept, so that it was not encoded again."""
        if self.on_drift == "ignore" or encoded.keeps_graph:
            return
        reps = {name: leaf for name, leaf in encoded.leaves.items() if name not in global_names}
        self.errors.append(difference(again, reps).to(self.replicas.device))
        self.places.append(encoded.place)
        self.dtypes.update(leaf.dtype for leaf in encoded.leaves.values())

    def check(self, snapshot: Snapshot) -> None:
        """After all chunks were encoded again, before gradients are reduced: whether both passes were the same.

        To be called on all ranks.

        Raises:
            ValueError: they were not, on some rank; everything has been put back then.
        """
        finding = self.found()
        if finding is not None and self.on_drift == "warn":
            logger.warning(finding)
        elif finding is not None:
            snapshot.restore()
            self.replicas.reduction.forget()
            raise ValueError(finding)

    def found(self) -> str | None:
        """What there is to say of it, on all ranks or on none; None within the tolerance."""
        if self.on_drift == "ignore":
            return None
        errors = torch.stack(self.errors).nan_to_num(nan=inf).tolist() if self.errors else [0.0]
        own = max(errors)
        self.replicas.agreement.check()
        largest = -self.replicas.lowest([-own])[0]
        if largest <= self.tolerance:
            return None
        where = _place_of(errors, self.places) if own > self.tolerance else "a chunk of another rank"
        return (
            f"expected the same representations of {where} in both passes, got a relative difference of "
            f"{largest:.1e} ({self.tolerance:.0e} is allowed), so the gradient would be wrong. The encoder depends on "
            "something that a forward changes: a generator of its own, a buffer, an input changed in place, a branch "
            "on grad mode. check_equivalence(encoder, loss_fn, batch) looks for it; on_drift='warn' goes on"
        )

    @property
    def tolerance(self) -> float:
        """What rounding explains in the precision that the encoder computes in."""
        device, accelerator = self.replicas.device.type, self.replicas.accelerator
        mixed = torch.is_autocast_enabled(device) or (
            accelerator is not None and accelerator.mixed_precision in MIXED
        )
        weights = {weight.dtype for weight in self.replicas.parameters if weight.is_floating_point()}
        if mixed or weights & {torch.float16, torch.bfloat16}:
            return TOLERANCE_OF_HALF
        return max(
            (TOLERANCE[dtype] for dtype in self.dtypes if dtype in TOLERANCE),
            default=TOLERANCE[torch.float32],
        )


def _place_of(errors: Sequence[float], places: Sequence[Any]) -> str:
    stream, number = places[max(range(len(errors)), key=errors.__getitem__)] or (None, 0)
    return f"chunk {number}" if stream is None else f"chunk {number} of {stream!r}"
