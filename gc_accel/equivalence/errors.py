"""How two steps are compared: relative errors with a floor, and how large rounding may be.

A gradient that is zero in exact arithmetic (the bias of attention keys, to which softmax does not listen)
is noise of the size of the rounding errors of the others. Relative to itself it is always wrong, so the
error of a tensor is

    |a - b| / max(|b|, floor * the largest |b|),       floor 1e-5 in float64 and 1e-2 in lower precision.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-5}
LOW_FLOOR = 1e-2
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
ROUNDINGS = 8  # of half precision that may come together in one gradient

Gradients = Mapping[str, Tensor | None]


def allowed_error(precision: torch.dtype) -> float:
    """The largest error that rounding explains, for steps that compute in `precision`."""
    return TOLERANCE.get(precision, ROUNDINGS * torch.finfo(precision).eps)


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The floating-point type that rounds most."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def gradient_errors(got: Gradients, expected: Gradients) -> dict[str, float]:
    """Error of each gradient by name; one that is missing counts as zero.

    Names without a gradient on either side are left out.
    """
    pairs = {name: (got.get(name), expected.get(name)) for name in got.keys() | expected.keys()}
    present = {name: _in_full(a, b) for name, (a, b) in pairs.items() if a is not None or b is not None}
    largest = max((float(b.norm()) for _, b in present.values()), default=0.0)
    dtypes = [value.dtype for value in expected.values() if value is not None]
    floor = FLOOR.get(coarsest(*dtypes), LOW_FLOOR) if dtypes else LOW_FLOOR
    return {
        name: ratio(float((a - b).norm()), max(float(b.norm()), floor * largest))
        for name, (a, b) in present.items()
    }


def loss_error(got: Tensor, expected: Tensor) -> float:
    """Relative to the loss, or absolute where that is below 1."""
    a, b = _in_full(got, expected)
    return ratio(float((a - b).abs()), max(1.0, float(b.abs())))


def ratio(difference: float, size: float) -> float:
    """A difference over a size; zero over zero is zero."""
    return difference / size if size else (float("inf") if difference else 0.0)


def order(error: float) -> float:
    """A key that puts NaN above everything."""
    return float("inf") if error != error else error


def _in_full(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in float64 on the host, zeros for one that is missing."""
    present = a if b is None else b
    assert present is not None
    first, second = (torch.zeros_like(present) if each is None else each for each in (a, b))
    return first.detach().cpu().double(), second.detach().cpu().double()
