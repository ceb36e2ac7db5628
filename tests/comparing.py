"""How errors are measured: relative, with a floor for gradients that are zero in exact arithmetic."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FLOOR = {torch.float64: 1e-5, torch.float32: 1e-2}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """A copy of every parameter's gradient."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def errors(got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Error of each tensor, |a - b| / max(|b|, floor of the largest |b|); None counts as zero."""
    present = {name: value for name, value in expected.items() if value is not None}
    largest = max(float(value.norm()) for value in present.values())
    assert largest > 0, "a comparison of nothing but zeros proves nothing"
    result = {}
    for name in got.keys() | expected.keys():
        a, b = got.get(name), expected.get(name)
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        floor = FLOOR[b.dtype] * largest
        result[name] = float((a - b).norm()) / max(float(b.norm()), floor)
    return result


def assert_equal(got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    """Fail with the name of the tensor that differs most."""
    found = errors(got, expected)
    worst = max(found, key=found.__getitem__)
    dtype = next(value for value in expected.values() if value is not None).dtype
    assert found[worst] <= TOLERANCE[dtype], f"{worst} is off by {found[worst]:.2e}"
