"""The loss of the whole batch: how a loss is called on the representations of all chunks and all ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn

from gc_accel.contracts import StatefulLoss, Streams
from gc_accel.distributed import GlobalLoss, RankedBatch, Replicas, alone
from gc_accel.engine.checks import check_finite
from gc_accel.engine.encoding import Encoded, Named, by_name
from gc_accel.inputs.nested import Inputs, call, concatenate, unnamed
from gc_accel.state.graph import leaves_of
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

    def begin_step(self, snapshot: Snapshot, streams: Streams) -> None:
        """Note what the loss will change in a step.

        Args:
            snapshot: of the step.
            streams: of the encoder.

        Raises:
            ValueError: a loss with a state is inside of another, or the loss reaches over other ranks than the encoder.
        """
        _check_group(self.loss_fn, self.replicas)
        self.snapshot, self.streams = snapshot, streams
        if isinstance(self.loss_fn, nn.Module):
            for module in self.loss_fn.modules():
                self._refuse_inner_state(module)
            # A stateful loss moves its own at the end of a step, and a queue of 65,536 rows is not worth a copy.
            snapshot.note(self.loss_fn, buffers=not isinstance(self.loss_fn, StatefulLoss))

    def of(
        self,
        encoded: Sequence[Encoded],
        batches: Iterable[Inputs],
        loss_kwargs: Mapping[str, Any],
        *,
        graph: bool = True,
    ) -> Tensor:
        """The loss of the global batch, 0-d, with a graph that ends in the leaves, if one is wanted.

        Args:
            encoded: all chunks of this rank, in the order of the samples.
            batches: what they were cut from; inputs that feed no stream go to the loss.
            loss_kwargs: further keyword arguments of the loss.

        Raises:
            ValueError: for an argument that is given twice, a loss that is no number, NaN, or no function of the
                representations.
        """
        arguments = self._arguments(batches, loss_kwargs)
        global_names = self.streams.global_names
        shared = {name: leaf for name, leaf in self._first_trained(encoded).items() if name in global_names}
        # The modules behind a function are met when it calls them.
        met = nullcontext() if isinstance(self.loss_fn, nn.Module) else meeting(self._meet)
        together, device = self.replicas.agreement.before_each_collective(), self.replicas.device.type
        self.replicas.agreement.check()
        with met, together, torch.set_grad_enabled(graph), torch.autocast(device, enabled=False):
            reps = self._joined(encoded)
            loss = global_loss(self.loss_fn, self.replicas, reps, shared, arguments)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.requires_grad != graph:
            raise ValueError(f"expected a scalar loss of the representations, got {loss}")
        check_finite(loss, reps)
        self.snapshot.note_gradients(leaves_of([loss]))
        return loss.reshape(())

    @torch.no_grad()
    def update(self, encoded: Sequence[Encoded]) -> None:
        """Let a loss move its state, at the end of a step, if it has one."""
        if isinstance(self.loss_fn, StatefulLoss):
            self.loss_fn.update(self._joined(encoded))

    def _meet(self, module: nn.Module) -> None:
        self._refuse_inner_state(module)
        self.snapshot.note(module)

    def _refuse_inner_state(self, module: nn.Module) -> None:
        has_state = isinstance(module, StatefulLoss) and any(True for _ in module.buffers())
        if has_state and module is not self.loss_fn:
            raise ValueError(
                f"expected {type(module).__name__} as the loss itself, got it inside of another: its state would never "
                "move. Pass it, or a subclass of it that adds what is to be added"
            )

    def _joined(self, encoded: Sequence[Encoded]) -> Named:
        """The representations of all chunks, `(B, ...)` by name."""
        parts = by_name(encoded).items()
        return {name: torch.cat(rows) for name, rows in parts if name not in self.streams.global_names}

    def _first_trained(self, encoded: Sequence[Encoded]) -> Named:
        """The leaves of the first chunk of a stream that trains, or of the first one if none does."""
        for chunk in encoded:
            reps = [leaf for name, leaf in chunk.leaves.items() if name not in self.streams.global_names]
            if any(leaf.requires_grad for leaf in reps):
                return chunk.leaves
        return encoded[0].leaves

    def _arguments(self, batches: Iterable[Inputs], loss_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        extras = [self.streams.extras(batch) for batch in batches]
        joined = {key: concatenate([extra[key] for extra in extras]) for key in extras[0]}
        if twice := loss_kwargs.keys() & joined:
            raise ValueError(f"expected {sorted(twice)} in the chunks or by keyword, got both")
        return {**loss_kwargs, **send_to_device(joined, self.replicas.device)}


def _check_group(loss_fn: Any, replicas: Replicas) -> None:
    if replicas.world_size == 1 or not isinstance(loss_fn, GlobalLoss):
        return
    groups = getattr(loss_fn, "process_group", None), replicas.group
    of_loss, of_encoder = (dist.get_process_group_ranks(group or dist.group.WORLD) for group in groups)
    if of_loss != of_encoder:
        raise ValueError(
            f"expected a loss over the ranks {of_encoder} of the encoder, got {type(loss_fn).__name__} over {of_loss}: "
            "give it the process_group of DistributedDataParallel"
        )


def check_all_seen(encoded: Sequence[Encoded], streams: Streams) -> None:
    """Raise ValueError if a loss has left no gradient in some representation."""
    leaves = {name: leaves[0] for name, leaves in by_name(encoded).items()}
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
    1/W, so that the shares of all ranks add up to it. Losses that reach over ranks may be inside of it (in a function,
    a sum, a module that adds a term): to them the gathered batch is the whole one.

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
    with alone():
        loss = call(partial(loss_fn, **extras), unnamed({**reps, **shared}))
    return batch.sum(loss / replicas.world_size)
