"""The loss of the whole batch: how a loss is called on the representations of all chunks and all ranks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gc_accel.contracts import StatefulLoss, Streams
from gc_accel.distributed import GlobalLoss, RankedBatch, Replicas
from gc_accel.engine.checks import check_finite
from gc_accel.engine.encoding import Encoded, Named, by_name
from gc_accel.inputs.nested import call, unnamed
from gc_accel.state.graph import leaves_and_nodes
from gc_accel.state.modules import meeting
from gc_accel.state.snapshot import Snapshot


class LossOfBatch:
    """A loss on what the first pass has encoded.

    Args:
        loss_fn: any callable on representations.
        replicas: the ranks.
    """

    def __init__(self, loss_fn: Callable[..., Tensor], replicas: Replicas) -> None:
        self.loss_fn, self.replicas = loss_fn, replicas

    def of(
        self,
        calls: Sequence[Encoded],
        streams: Streams,
        loss_kwargs: Mapping[str, Any],
        snapshot: Snapshot,
        *,
        graph: bool = True,
    ) -> Tensor:
        """The loss of the global batch, 0-d, with a graph that ends in the leaves, if one is wanted.

        Raises:
            ValueError: for a loss that is no number, NaN, or not of the representations.
        """
        shared = {n: leaf for n, leaf in _first_trained(calls, streams).items() if n in streams.global_names}
        leaves = {n: leaves for n, leaves in by_name(calls).items() if n not in streams.global_names}
        # The modules behind a function are met when it calls them.
        met = nullcontext() if isinstance(self.loss_fn, nn.Module) else meeting(snapshot.note)
        self.replicas.agreement.check()
        with met, torch.set_grad_enabled(graph), torch.autocast(self.replicas.device.type, enabled=False):
            reps = {name: torch.cat(parts) for name, parts in leaves.items()}
            loss = global_loss(self.loss_fn, self.replicas, reps, shared, loss_kwargs)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.requires_grad != graph:
            raise ValueError(f"expected a scalar loss of the representations, got {loss}")
        check_finite(loss, reps)
        snapshot.note_gradients(leaves_and_nodes(loss)[0])
        return loss.reshape(())

    def note(self, snapshot: Snapshot) -> None:
        """Note what the loss will change in a step."""
        if isinstance(self.loss_fn, nn.Module):
            # A stateful loss moves its own at the end of a step, and a queue of 65,536 rows is not worth a copy.
            snapshot.note(self.loss_fn, buffers=not isinstance(self.loss_fn, StatefulLoss))

    @torch.no_grad()
    def update(self, calls: Sequence[Encoded], streams: Streams) -> None:
        """Let a loss move its state, at the end of a step, if it has one."""
        if isinstance(self.loss_fn, StatefulLoss):
            parts = {n: leaves for n, leaves in by_name(calls).items() if n not in streams.global_names}
            self.loss_fn.update({name: torch.cat(leaves) for name, leaves in parts.items()})


def check_seen(calls: Sequence[Encoded], streams: Streams) -> None:
    """Raise ValueError for a loss that has left a representation without a gradient."""
    leaves = {name: leaves[0] for name, leaves in by_name(calls).items()}
    unseen = [name for name, leaf in leaves.items() if leaf.requires_grad and leaf.grad is None]
    if ignored := [name for name in unseen if name not in streams.global_names]:
        raise ValueError(f"expected a loss of every representation, got one that ignores {ignored}")


def global_loss(
    loss_fn: Callable[..., Tensor],
    replicas: Replicas,
    reps: Mapping[Any, Tensor],
    shared: Mapping[Any, Tensor],
    extras: Mapping[str, Any],
) -> Tensor:
    """Loss of the global batch, from a `GlobalLoss` or from a loss written for one process.

    With the latter every rank gathers the representations and computes the whole loss, of which it backpropagates
    1/W, so that the shares of all ranks add up to it.

    Args:
        loss_fn: called with representations in the structure that the encoder returned.
        replicas: the ranks.
        reps: representations of this rank, `(B, ...)`.
        shared: globals, equal on all ranks, not gathered.
        extras: keyword arguments of the loss; tensors among them are per-sample, and gathered.
    """
    if replicas.world_size == 1 or isinstance(loss_fn, GlobalLoss):
        return call(partial(loss_fn, **extras), unnamed({**reps, **shared}))
    batch = RankedBatch(len(next(iter(reps.values()))), replicas.device, replicas.group)
    reps = {name: batch.gather(value) for name, value in reps.items()}
    extras = {k: batch.gather(v) if isinstance(v, Tensor) and v.ndim else v for k, v in extras.items()}
    share = call(partial(loss_fn, **extras), unnamed({**reps, **shared})) / replicas.world_size
    return batch.sum(share)


def _first_trained(calls: Sequence[Encoded], streams: Streams) -> Named:
    """The leaves of the first call of a stream that trains, or of the first one if none does: its globals count."""
    for each in calls:
        if any(leaf.requires_grad for name, leaf in each.leaves.items() if name not in streams.global_names):
            return each.leaves
    return calls[0].leaves
