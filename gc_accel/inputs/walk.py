"""The walk over an encoder's nested inputs: everything that cuts, joins or measures them is a function on it.

    containers            a mapping (`dict`, `BatchEncoding`, `UserDict`), a list or tuple of inputs, such as the pair
                          of a list and a mapping
    per-sample values     a tensor `(B, ...)`, a list of B plain values, such as captions, or a `Packed` value, of
                          which a sample has any number of rows
    whole-batch values    anything else: `None`, a flag, a 0-d tensor, an empty list

Shape letters: B batch.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from gc_accel.inputs.packing import Packed

Inputs = Any
INPUTS = 64  # by position, at most: a longer list is one of samples


def map_samples(
    fn: Callable[..., Any],
    inputs: Inputs,
    *others: Inputs,
    drop: Callable[[Any], bool] = lambda value: False,
) -> Inputs:
    """The same structure with `fn` of every per-sample value; whole-batch values stay. A mapping becomes a `dict`.

    Args:
        fn: `(value, *values at the same place in the others) -> value`.
        inputs: nested inputs, whose structure counts.
        others: further inputs of this structure.
        drop: whether a mapping loses a value.
    """
    trees = (inputs, *others)
    if isinstance(inputs, Mapping):
        kept = [key for key, value in inputs.items() if not drop(value)]
        return {key: map_samples(fn, *(tree[key] for tree in trees), drop=drop) for key in kept}
    if is_sequence_of_inputs(inputs):
        columns = zip(*trees, strict=True)
        return type(inputs)(map_samples(fn, *column, drop=drop) for column in columns)
    return fn(*trees) if _is_per_sample(inputs) else inputs


def leaves(inputs: Inputs, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Every per-sample value of nested inputs, after its path, such as `batch['text']['input_ids']`."""
    if isinstance(inputs, Mapping) or is_sequence_of_inputs(inputs):
        for key, value in inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs):
            yield from leaves(value, f"{path}[{key!r}]")
    elif _is_per_sample(inputs):
        yield path, inputs


def flatten(values: Any) -> Iterator[Any]:
    """All that mappings, lists and tuples hold, at any depth and of any kind, whole-batch values too."""
    if isinstance(values, (Mapping, list, tuple)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from flatten(value)
    else:
        yield values


def is_sequence_of_inputs(inputs: Inputs) -> bool:
    """Whether a list or tuple holds inputs, rather than one plain value per sample."""
    if not isinstance(inputs, (list, tuple)) or isinstance(inputs, Packed):
        return False
    # Not all of them: a slice of a list of captions would take as long as the whole batch has captions.
    return any(isinstance(value, (Tensor, Mapping, Packed)) for value in inputs[:INPUTS])


def _is_per_sample(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, (list, tuple)) and bool(value)
