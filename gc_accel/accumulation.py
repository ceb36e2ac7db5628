"""Plain accumulation, for losses with which it is exact: the cheapest schedule for each.

    targets from    first pass              second pass, with a graph       forwards of n chunks
    nobody          none                    the encoder                     n         SimSiam
    the teacher     the teacher             the encoder                     n + n     BYOL, MoCo
    the encoder     the encoder             the encoder again, but for k    2n - k    SwAV
                                            chunks that kept their graph

(Regimes and derivation: `losses/accumulated.py`.) All chunks are read, and run through the first pass as they
come, before the first one is trained on, because each term weighs 1/N and only then is N known. Between the passes
`loss.targets` sees the whole batch, and ranks meet, however many chunks each has. The second pass is a forward and
a backward pass of each chunk, with the memory of one and of the graphs that were kept. As in a gradient cache, the
first chunk comes last in both passes. It syncs the ranks, and touches every parameter that trains, as each chunk runs
through the whole encoder.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import accumulate as accumulated
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gc_accel.distributed import RankedBatch, Replicas
from gc_accel.engine.checks import check_finite
from gc_accel.engine.encoding import Encoded, Named, Parts, by_name, encode, encode_together
from gc_accel.engine.schedule import Block, FirstPass, Rows, Turn
from gc_accel.inputs.nested import Inputs, split_streams
from gc_accel.losses.stateful.accumulated import AccumulatedLoss, StatefulLoss


class Chunk(NamedTuple):
    """A chunk that waits for the second pass."""

    encoded: Encoded  # what the targets are made of, and the encoder's forward, with a graph
    rows: slice  # where it is in the batch of this rank; empty if it only keeps sharded ranks in step
    retained: bool

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


def is_accumulated(loss: Any) -> bool:
    """Whether plain accumulation is exact with a loss."""
    return isinstance(loss, AccumulatedLoss)


def accumulate(cache: Any, chunks: Iterable[Inputs], loss_kwargs: Mapping[str, Any]) -> Tensor:
    """Add the gradient of the loss of one batch to the weights, and move the state of the loss.

    Inputs that feed no stream, such as labels, are not looked at.

    Args:
        cache: a `GradientCache` of an `AccumulatedLoss` and an encoder that returns a mapping.
        chunks: any iterable.
        loss_kwargs: none, as no such loss takes any.

    Returns:
        The loss of the global batch, 0-d, detached.

    Raises:
        ValueError: the loss lacks its momentum encoder, or has one although parameters are sharded; no sample; NaN.
            What only the second pass can find is raised when gradients have been added to: clear them.
    """
    loss, replicas = cache.loss_fn, cache.replicas
    _check(loss, replicas, loss_kwargs)
    cache.batch_norms.begin_step()
    waiting = _first_pass(cache, chunks)
    reps = {name: rep for name, rep in _noted(waiting).items() if name not in cache.global_names}
    together = replicas.agreement.before_each_collective()
    with together, torch.no_grad(), torch.autocast(replicas.device.type, enabled=False):
        batch = RankedBatch(waiting[-1].rows.stop, replicas.device, loss.process_group)
        if reps:
            check_finite(batch.sum(torch.stack([rep.sum() for rep in reps.values()]).sum()), reps)
        targets = loss.targets(reps, batch)
    # Graphs that were kept come first, as they take memory, and the first chunk last.
    order = sorted(range(1, len(waiting)), key=lambda index: not waiting[index].retained)
    terms, again = dict[int, Tensor](), loss.targets_from == "encoder"
    with replicas.second_pass(), cache.batch_norms.second_pass() if again else nullcontext():
        for index in order:
            terms[index] = _push(cache, waiting[index], targets, batch.total, sync=False)
        replicas.begin_syncing()
        terms[0] = _push(cache, waiting[0], targets, batch.total, sync=True)
    if again:
        cache.retention.decide({_stream(cache): waiting[-1].rows.stop})
    own = torch.cat([terms[index] for index in range(len(waiting))])
    with torch.no_grad():
        value = batch.sum(own.sum()) / batch.total
        check_finite(value, {"loss": own[:, None]})
        loss.update(reps)
    return value


def move_state(loss: Any, calls: Iterable[Encoded]) -> None:
    """Let a loss in regime A move its state, at the end of a step, if it has one.

    Args:
        loss: any callable.
        calls: all of the first pass, in the order of the samples.
    """
    if isinstance(loss, StatefulLoss):
        with torch.no_grad():
            loss.update({name: torch.cat(leaves) for name, leaves in by_name(calls).items()})


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


def _first_pass(cache: Any, chunks: Iterable[Inputs]) -> list[Chunk]:
    """Read all chunks, and encode them as the targets want it, the first one last; in the order of the batch."""
    replicas, size = cache.replicas, min(cache.chunk_sizes.values())
    own_targets = cache.loss_fn.targets_from == "encoder"
    stream, limits = _stream(cache), {None: 0.0}
    if own_targets:
        limits = {None: cache.retention.limits([stream], [stream], {stream: size})[stream]}
    options = {"nominal": cache.retention.counts_chunks, "in_step": replicas.sharded}
    schedule = FirstPass({None: size}, {None: min(cache.sizes.calls.values())}, limits, **options)
    first, calls = dict[Any, Rows](), list[tuple[Encoded, int, bool]]()
    parts = (split_streams(chunk, cache.streams)[0] for chunk in chunks)  # all streams in one
    turns = replicas.aligned(schedule.turns(parts, {None: ()}, [None], first, {}), first, [None])
    for block in schedule.blocks(turns):
        for turn, encoded in zip(block.turns, _encode_block(cache, block), strict=True):
            calls.append((encoded, len(turn.rows) * turn.counts, block.retain))
        schedule.call_sizes = {None: min(cache.sizes.calls.values())}  # which random draws have changed
    if not first:
        raise ValueError("expected a batch of at least one sample, got none")
    # Ranks reduce in the call of the first chunk, after the targets: there is a way back until then.
    everything = schedule.has_room(first, [None]) and all(retained for *_, retained in calls)
    retain = own_targets and everything and replicas.is_alone
    (encoded,) = _encode_block(cache, Block([Turn(None, first[None])], retain))
    calls.insert(0, (encoded, len(first[None]), retain))
    stops = accumulated(count for _, count, _ in calls)
    return [
        Chunk(e, slice(stop - count, stop), kept) for (e, count, kept), stop in zip(calls, stops, strict=True)
    ]


def _stream(cache: Any) -> Any:
    """By what the bytes of a graph are counted: the encoder's only stream, or all of them."""
    return next(iter(cache.streams)) if len(cache.streams) == 1 else None


def _noted(chunks: Iterable[Chunk]) -> Named:
    """What the targets are made of, `(B, ...)` by name, without a graph."""
    found = defaultdict[Any, list[Tensor]](list)
    for chunk in chunks:
        for name, leaf in chunk.encoded.leaves.items():
            found[name].append(leaf.detach()[: chunk.size])
    return {name: torch.cat(parts) for name, parts in found.items()}


def _encode_block(cache: Any, block: Block) -> list[Encoded]:
    """First pass of adjacent chunks: representations for the targets, and the forward that is left for the second."""
    loss, parts = cache.loss_fn, [turn.rows.inputs for turn in block.turns]
    whole = block.rows.inputs if len(parts) > 1 else parts[0]
    if loss.targets_from == "encoder":
        return cache._encode_block(whole, parts, block.retain)
    forwards = [partial(_forward, cache, part) for part in parts]
    if loss.targets_from is None:
        return [Encoded({}, forward) for forward in forwards]
    accelerator = cache.replicas.accelerator
    with nullcontext() if accelerator is None else accelerator.autocast():
        targets = _by_teacher(cache, whole, parts)
    return [Encoded(each.leaves, forward) for each, forward in zip(targets, forwards, strict=True)]


def _by_teacher(cache: Any, whole: Parts, parts: list[Parts]) -> list[Encoded]:
    teacher, device = cache.loss_fn.teacher, cache.replicas.device
    joined, *chunks = (each.get(None, each) for each in (whole, *parts))
    together = encode_together(teacher, joined, chunks, device=device, shared=cache.global_names)
    return together or [encode(teacher, chunk, device=device) for chunk in chunks]


def _forward(cache: Any, parts: Parts) -> Named:
    return cache._encode(parts, True).replay()


def _push(cache: Any, chunk: Chunk, targets: Any, total: int, *, sync: bool) -> Tensor:
    """Second pass of a chunk, forward and backward; its terms of the loss `(C,)`."""
    count = chunk.size
    with cache.replicas.reducing(sync):
        outputs = chunk.encoded.replay()
        reps = {name: out if name in cache.global_names else out[:count] for name, out in outputs.items()}
        with torch.autocast(cache.replicas.device.type, enabled=False):
            terms = cache.loss_fn.per_sample(reps, targets, chunk.rows)
        if terms.shape != (count,) or not terms.requires_grad:
            raise ValueError(f"expected a term with a gradient for each of {count} samples, got {terms}")
        share = cache.replicas.scaled(terms.sum() / total)
        cache.replicas.backward([share], [torch.ones_like(share)], sync=sync)
    return terms.detach()
