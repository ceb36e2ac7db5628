"""Plain accumulation, for losses with which it is exact: the cheapest step for each.

    targets from    first pass              second pass, with a graph       forwards of n chunks
    nobody          none                    the encoder                     n         SimSiam
    the teacher     the teacher             the encoder                     n + n     BYOL, MoCo
    the encoder     the encoder             the encoder again, but for k    2n - k    SwAV
                                            chunks that kept their graph

(Regimes and derivation: `contracts.py`.) All chunks are read, and run through the first pass as they come, before the
first one is trained on, because each term weighs 1/N and only then is N known. Between the passes `loss.targets` sees
the whole batch, and ranks meet, however many chunks each has. The second pass is a forward and a backward pass of each
chunk, with the memory of one and of the graphs that were kept. A chunk runs through all streams of the encoder at once.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gc_accel.contracts import AccumulatedLoss, Streams
from gc_accel.distributed import RankedBatch, Replicas
from gc_accel.engine.checks import check_finite
from gc_accel.engine.encoding import Encoded, Named, by_name, encode
from gc_accel.engine.schedule import Call, Chunk
from gc_accel.inputs.nested import Inputs
from gc_accel.passes import Passes


class Waiting(NamedTuple):
    """A chunk that waits for the second pass."""

    encoded: Encoded  # what the targets are made of, and the encoder's forward, with a graph
    rows: slice  # where it is in the batch of this rank; empty if it only keeps sharded ranks in step

    @property
    def size(self) -> int:
        """Number of samples that count."""
        return self.rows.stop - self.rows.start


def accumulate(
    loss: AccumulatedLoss, passes: Passes, chunks: Iterable[Inputs], loss_kwargs: Mapping[str, Any]
) -> Tensor:
    """Add the gradient of the loss of one batch to the weights, and move the state of the loss.

    Inputs that feed no stream, such as labels, are not looked at.

    Args:
        loss: of a regime that needs less than a cache.
        passes: of an encoder that returns a mapping.
        chunks: any iterable.
        loss_kwargs: none, as no such loss takes any.

    Returns:
        The loss of the global batch, 0-d, detached.

    Raises:
        ValueError: the loss lacks its momentum encoder, or has one although parameters are sharded; no sample; NaN.
            What only the second pass can find is raised when gradients have been added to: clear them.
    """
    replicas = passes.replicas
    _check(loss, replicas, loss_kwargs)
    # 1. First pass: what the targets are made of.
    again, waiting = loss.targets_from == "encoder", list[Waiting]()
    for call in passes.calls(chunks, keep_graphs=again):
        for chunk, encoded in zip(call.chunks, _encode(loss, passes, call), strict=True):
            start = waiting[-1].rows.stop if waiting else 0
            waiting.append(Waiting(encoded, slice(start, start + chunk.size * chunk.counts)))
    # 2. The targets of the whole batch.
    reps = _representations(waiting, passes.streams)
    together = replicas.agreement.before_each_collective()
    with together, torch.no_grad(), torch.autocast(replicas.device.type, enabled=False):
        batch = RankedBatch(waiting[-1].rows.stop, replicas.device, loss.process_group)
        if reps:
            check_finite(batch.sum(torch.stack([rep.sum() for rep in reps.values()]).sum()), reps)
        targets = loss.targets(reps, batch)
    # 3. Second pass: the terms of every chunk; graphs that were kept go first, as they take memory.
    pairs = list[tuple[int, Tensor]]()
    with passes.batch_norms.second_pass() if again else nullcontext():
        for each in sorted(waiting, key=lambda each: not each.encoded.keeps_graph):
            pairs.append((each.rows.start, _push(loss, passes, each, targets, batch.total)))
    passes.guard.check(passes.snapshot)
    replicas.reduce()
    if again:
        passes.decide_retention()
    terms = torch.cat([part for _, part in sorted(pairs, key=lambda pair: pair[0])])
    with torch.no_grad():
        value = batch.sum(terms.sum()) / batch.total
        check_finite(value, {"loss": terms[:, None]})
        loss.update(reps)
    return value


def _check(loss: AccumulatedLoss, replicas: Replicas, loss_kwargs: Mapping[str, Any]) -> None:
    name = type(loss).__name__
    if loss_kwargs:
        raise ValueError(f"expected no keyword arguments for {name}, got {list(loss_kwargs)}: leave them out")
    if loss.targets_from == "teacher" and loss.teacher is None:
        raise ValueError(
            f"expected a momentum encoder in {name}, got none: pass teacher=MomentumEncoder(encoder)"
        )
    if loss.teacher is not None and replicas.sharded:
        raise ValueError(
            f"expected whole parameters for the momentum encoder of {name}, got sharded ones: train with DDP"
        )


def _encode(loss: AccumulatedLoss, passes: Passes, call: Call) -> list[Encoded]:
    """First pass of a call: what the targets are made of, and the forward that is left for the second pass."""
    if loss.targets_from == "encoder":
        return passes.encode(call)
    forwards = [partial(_forward, passes, chunk) for chunk in call.chunks]
    if loss.targets_from is None:
        return [Encoded({}, forward) for forward in forwards]
    accelerator = passes.replicas.accelerator
    with nullcontext() if accelerator is None else accelerator.autocast():
        taught = _by_teacher(loss, passes, call)
    return [Encoded(each.leaves, forward) for each, forward in zip(taught, forwards, strict=True)]


def _by_teacher(loss: AccumulatedLoss, passes: Passes, call: Call) -> list[Encoded]:
    device, streams = passes.replicas.device, passes.streams
    if len(call.chunks) > 1 and (encoded := passes.joined.encode(loss.teacher, call, streams, device)):
        return encoded
    inputs = [streams.arguments(chunk.stream, chunk.inputs) for chunk in call.chunks]
    return [encode(loss.teacher, each, device=device) for each in inputs]


def _forward(passes: Passes, chunk: Chunk) -> Named:
    """The only forward pass of a chunk, with a graph."""
    return passes.encode_chunk(chunk, True).replay()


def _representations(waiting: Iterable[Waiting], streams: Streams) -> Named:
    """What the targets are made of, `(B, ...)` by name, without a graph."""
    parts = by_name(
        each.encoded._replace(
            leaves={n: leaf.detach()[: each.size] for n, leaf in each.encoded.leaves.items()}
        )
        for each in waiting
    )
    return {name: torch.cat(rows) for name, rows in parts.items() if name not in streams.global_names}


def _push(loss: AccumulatedLoss, passes: Passes, chunk: Waiting, targets: Any, total: int) -> Tensor:
    """Second pass of a chunk, forward and backward; its terms of the loss `(C,)`."""
    replicas, global_names = passes.replicas, passes.streams.global_names
    with replicas.adding_up():
        outputs = chunk.encoded.replay()
        if loss.targets_from == "encoder":
            passes.guard.note(chunk.encoded, outputs, global_names)
        reps = {name: out if name in global_names else out[: chunk.size] for name, out in outputs.items()}
        with torch.autocast(replicas.device.type, enabled=False):
            terms = loss.per_sample(reps, targets, chunk.rows)
        if terms.shape != (chunk.size,) or not terms.requires_grad:
            raise ValueError(f"expected a term with a gradient for each of {chunk.size} samples, got {terms}")
        share = replicas.scaled(terms.sum() / total)
        passes.modules.note_gradients([share])
        replicas.backward([share], [torch.ones_like(share)])
    return terms.detach()
