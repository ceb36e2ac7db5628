"""What losses with a state, or in a cheaper regime, are declared over (see `gc_accel/contracts.py`)."""

from torch import Tensor

from gc_accel.contracts import AccumulatedLoss, Reps, StatefulLoss

__all__ = ["AccumulatedLoss", "Reps", "StatefulLoss", "output_of"]


def output_of(reps: Reps, name: str, option: str) -> Tensor:
    """An output that an encoder has if it was asked for one.

    Raises:
        ValueError: it has none of that name.
    """
    if name not in reps:
        raise ValueError(
            f"expected {name!r} among the outputs of the encoder, got {list(reps)}: make it with "
            f"VisionEncoder(..., {option}=...)"
        )
    return reps[name]
