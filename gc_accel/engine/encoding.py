"""Encode a chunk now and be ready to encode it again: the primitive under every schedule."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gc_accel.engine.checks import check_rows
from gc_accel.engine.transfer import to_device
from gc_accel.inputs.nested import Inputs, batch_size, call, named
from gc_accel.state.autocast import AutocastState
from gc_accel.state.rng import RngState

Named = dict[Any, Tensor]


class Encoded(NamedTuple):
    """A chunk after its first pass."""

    leaves: Named  # its representations, which hold the cached gradients after the loss
    replay: Callable[[], Named]  # the same again, with a graph
    keeps_graph: bool = False  # of the first pass, so that `replay` need not encode again
    place: tuple[Any, int] | None = None  # its stream, and its number there


def encode(fn: Callable[..., Any], chunk: Inputs, *, device: torch.device, retain: bool = False) -> Encoded:
    """Encode a chunk, on the host or on the device.

    Returns its outputs as leaves in float32 (float64 stays), and `replay`, which gives them again with a graph
    from the same RNG state. `retain` keeps the graph of this pass for it.
    """
    state, autocast = RngState.current(device), AutocastState.current(device)
    with torch.set_grad_enabled(retain):
        outputs = _run(fn, chunk, device)
    drew = not state.is_current()
    kept = outputs if retain else None  # without a graph they may be views of much more

    def replay() -> Named:
        with torch.enable_grad(), autocast.restored(), state.replayed() if drew else nullcontext():
            return kept or _run(fn, chunk, device)

    return Encoded(_leaves(outputs), replay, retain)


def encode_together(
    fn: Callable[..., Any],
    whole: Inputs,
    chunks: Sequence[Inputs],
    *,
    device: torch.device,
    shared: Collection[Any] = (),
) -> list[Encoded] | None:
    """Encode adjacent chunks in one call without a graph, each to be replayed on its own.

    Samples have to be independent of each other in `fn`. Where it draws random numbers each chunk has to draw its
    own: then the result is None, and the random state is that from before.

    Args:
        whole: the chunks end to end.
        shared: outputs that are the same for all samples.
    """
    state, autocast = RngState.current(device), AutocastState.current(device)
    with torch.no_grad():
        outputs = _run(fn, whole, device)
    if not state.is_current():
        state.restore()
        return None

    def replay(chunk: Inputs) -> Named:
        with torch.enable_grad(), autocast.restored():
            return _run(fn, chunk, device)

    sizes = [batch_size(chunk) for chunk in chunks]
    check_rows(outputs, sum(sizes), shared)
    parts = {
        name: [output] * len(sizes) if name in shared else output.split(sizes)
        for name, output in outputs.items()
    }
    rows = [{name: parts[name][number] for name in parts} for number in range(len(chunks))]
    return [Encoded(_leaves(own), partial(replay, chunk)) for own, chunk in zip(rows, chunks, strict=True)]


def by_name(encoded: Iterable[Encoded]) -> dict[Any, list[Tensor]]:
    """The leaves of several chunks, by name, in the order of the chunks."""
    found = defaultdict[Any, list[Tensor]](list)
    for each in encoded:
        for name, leaf in each.leaves.items():
            found[name].append(leaf)
    return found


def _run(fn: Callable[..., Any], chunk: Inputs, device: torch.device) -> Named:
    outputs = named(call(fn, to_device(chunk, device)))
    return {key: out if out.dtype == torch.float64 else out.float() for key, out in outputs.items()}


def _leaves(outputs: Named) -> Named:
    return {name: _alone(output.detach()).requires_grad_() for name, output in outputs.items()}


def _alone(output: Tensor) -> Tensor:
    """Not as a view that keeps more alive, such as the hidden states of all tokens behind those of the first."""
    return output.clone() if output.untyped_storage().nbytes() > output.nbytes else output
