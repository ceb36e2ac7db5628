"""An encoder that is called twice for the same samples: how far apart are its representations?"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from gc_accel.state.modules import in_mode

TOLERANCE = 1e-4  # relative difference of representations that rounding explains


def difference(again: Mapping[Any, Tensor], first: Mapping[Any, Tensor]) -> Tensor:
    """The largest distance of two representations of a sample, relative to the first's norm; 0-d, on their device.

    Zero over zero is zero, and NaN anywhere is NaN. Six small operations for each name.

    Args:
        again, first: `(C, ...)` or 0-d, by name; what has no row is left out.
    """
    pairs = [(_as_rows(again[name]), _as_rows(rep)) for name, rep in first.items()]
    errors = [_relative_distance(rows, reference).max() for rows, reference in pairs if len(reference)]
    if len(errors) == 1:
        return errors[0]
    return torch.stack(errors).max() if errors else torch.zeros(())


@torch.no_grad()
def is_inert(
    model: nn.Module, represent: Callable[[Any], Mapping[Any, Tensor]], chunk: Any, changed: Any
) -> bool:
    """Whether a model in eval mode represents the samples of a chunk alike after a change to the chunk.

    Args:
        model: whose mode counts and on whose device it is computed.
        represent: gives the representations `(C, ...)` of either, by name.
        chunk, changed: inputs on the host or on the device.
    """
    device = next(model.parameters()).device
    with in_mode(model, training=False):
        before, after = (represent(send_to_device(inputs, device)) for inputs in (chunk, changed))
    return bool(difference(after, before) <= TOLERANCE)


def _as_rows(rep: Tensor) -> Tensor:
    """`(C, ...)` to `(C, D)`, in float32 or float64; 0-d to `(1, 1)`."""
    rows = torch.atleast_1d(rep.detach()).unsqueeze(-1).flatten(1)
    return rows if rows.dtype == torch.float64 else rows.float()


def _relative_distance(rows: Tensor, reference: Tensor) -> Tensor:
    """Of each row `(C, D)`, `(C,)`."""
    norms = torch.linalg.vector_norm(reference, dim=1).clamp_min(torch.finfo(reference.dtype).tiny)
    return torch.linalg.vector_norm(rows - reference, dim=1) / norms
