"""Outputs that are not of each sample, losses that are no number, and whose fault it is."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

SHOWN = 10  # samples named in an error


def check_finite(loss: Tensor, reps: Mapping[Any, Tensor]) -> None:
    """Stop before one sample's NaN reaches every weight.

    The loss of the global batch is the same on every rank, so all of them stop.

    Args:
        loss: of the global batch, one element.
        reps: representations of this rank, `(B, ...)` each.

    Raises:
        ValueError: the loss is infinite or no number; named are the samples that are, by their index in the
            batch of this rank.
    """
    if loss.isfinite():
        return
    for name, rep in reps.items():
        broken = (~rep.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if broken:
            what = "representations" if name is None else f"{name!r}"
            more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
            raise ValueError(
                f"expected finite {what}, got infinity or NaN for samples {broken[:SHOWN]}{more} of the batch: look "
                "at these inputs, or, if they are many, lower the learning rate"
            )
    raise ValueError(
        f"expected a finite loss, got {loss.item()} although this process's representations are finite: look at the "
        "logit scale, at the loss, and at the other processes' samples"
    )


def check_rows(outputs: Mapping[Any, Tensor], count: int, shared: Collection[Any]) -> None:
    """Refuse outputs that are not of each sample.

    Args:
        outputs: of an encoder, by name.
        count: of the samples that it was called with.
        shared: names of outputs that are the same for all of them.

    Raises:
        ValueError: naming the output.
    """
    for name, output in outputs.items():
        if name not in shared and (not output.ndim or len(output) != count):
            raise ValueError(
                f"expected a representation of each of {count} samples, got {tuple(output.shape)} as output {name!r} "
                "of the encoder: name what is the same for all chunks in its global_names"
            )
