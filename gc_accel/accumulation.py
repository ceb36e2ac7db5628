"""Plain accumulation, for losses with which it is exact: the cheapest schedule for each.

    targets from    first pass, no graph    second pass, with a graph      forwards of n chunks
    nobody          none                    the encoder                    n        SimSiam
    the teacher     the teacher             the encoder                    n + n    BYOL, MoCo
    the encoder     the encoder             the encoder again, replayed    2n       SwAV

(Regimes and derivation: `losses/accumulated.py`.) All chunks are read, and run through the first pass as they
come, before the first one is trained on, because each term weighs 1/N and only then is N known. Between the passes
`loss.targets` sees the whole batch, and ranks meet, however many chunks each has. The second pass is a forward and
a backward pass of each chunk, with the memory of one. The last one syncs the ranks; it touches every parameter that
trains, as each chunk runs through the whole encoder.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gc_accel.chunking import Inputs, batch_size, split_streams
from gc_accel.distributed import RankedBatch, Replicas
from gc_accel.encoding import Encoded, Named, by_name, encode
from gc_accel.losses.accumulated import AccumulatedLoss, StatefulLoss
from gc_accel.numerics import check_finite
from gc_accel.schedule import Rows, Turn


class Chunk(NamedTuple):
    """A chunk that waits for the second pass."""

    rows: slice  # where it is in the batch of this rank; empty if it only keeps sharded ranks in step
    forward: Callable[[], Named]  # through the encoder, with a graph


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
    waiting, reps = _first_pass(cache, chunks)
    together = replicas.agreement.before_each_collective()
    with together, torch.no_grad(), torch.autocast(replicas.device.type, enabled=False):
        batch = RankedBatch(waiting[-1].rows.stop, replicas.device, loss.process_group)
        if reps:
            check_finite(batch.sum(torch.stack([rep.sum() for rep in reps.values()]).sum()), reps)
        targets = loss.targets(reps, batch)
    again = loss.targets_from == "encoder"
    with replicas.second_pass(), cache.batch_norms.second_pass() if again else nullcontext():
        terms = [_push(cache, each, targets, batch.total, sync=False) for each in waiting[:-1]]
        with replicas.synced_call():
            terms.append(_push(cache, waiting[-1], targets, batch.total, sync=True))
    own = torch.cat(terms)
    with replicas.agreement.before_each_collective(), torch.no_grad():
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


def _first_pass(cache: Any, chunks: Iterable[Inputs]) -> tuple[list[Chunk], Named]:
    """Read all chunks; what the targets are made of, `(B, ...)` by name, none of it with a graph."""
    first, noted, waiting = dict[Any, Rows](), defaultdict[Any, list[Tensor]](list), list[Chunk]()
    done = 0
    for turn in cache.replicas.aligned(_turns(cache, chunks, first), first, [None]):
        reps, forward = _encode(cache, turn.rows.inputs)
        rows = slice(done, done + len(turn.rows) * turn.counts)
        waiting.append(Chunk(rows, forward))
        done = rows.stop
        for name in reps.keys() - cache.global_names if turn.counts else ():
            noted[name].append(reps[name].detach())
    if not waiting:
        raise ValueError("expected a batch of at least one sample, got none")
    return waiting, {name: torch.cat(parts) for name, parts in noted.items()}


def _turns(cache: Any, chunks: Iterable[Inputs], first: dict[Any, Rows]) -> Iterator[Turn]:
    """Cut chunks to size, with all streams in one."""
    for chunk in chunks:
        parts, _ = split_streams(chunk, cache.streams)
        for rows in Rows(parts, 0, batch_size(chunk)).cut(min(cache.chunk_sizes.values())):
            first.setdefault(None, rows)
            yield Turn(None, rows)


def _encode(cache: Any, parts: dict[Any, Inputs]) -> tuple[Named, Callable[[], Named]]:
    """First pass of a chunk: representations for the targets, and the forward that is left for the second."""
    loss, replicas = cache.loss_fn, cache.replicas
    if loss.targets_from == "encoder":
        with replicas.reducing(False):
            return cache._encode(parts, False)

    def forward() -> Named:
        return cache._encode(parts, True).replay()

    if loss.targets_from is None:
        return {}, forward
    with nullcontext() if replicas.accelerator is None else replicas.accelerator.autocast():
        return encode(loss.teacher, parts.get(None, parts), device=replicas.device).leaves, forward


def _push(cache: Any, chunk: Chunk, targets: Any, total: int, *, sync: bool) -> Tensor:
    """Second pass of a chunk, forward and backward; its terms of the loss `(C,)`."""
    count = chunk.rows.stop - chunk.rows.start
    with cache.replicas.reducing(sync):
        outputs = chunk.forward()
        reps = {name: out if name in cache.global_names else out[:count] for name, out in outputs.items()}
        with torch.autocast(cache.replicas.device.type, enabled=False):
            terms = cache.loss_fn.per_sample(reps, targets, chunk.rows)
        if terms.shape != (count,) or not terms.requires_grad:
            raise ValueError(f"expected a term with a gradient for each of {count} samples, got {terms}")
        share = cache.replicas.scaled(terms.sum() / total)
        cache.replicas.backward([share], [torch.ones_like(share)], sync=sync)
    return terms.detach()
