"""What the engine asks of an encoder and of a loss.

An encoder may declare, as attributes of the module,

    streams         parts of a sample that are encoded on their own (image, text), each with the input keys that
                    feed it, the costliest first; keys that feed none go to the loss
    global_names    outputs that are the same for every chunk, such as the logit scale
    frozen_streams  streams that nothing trains

Streams are called one by one, `encoder(image={...})`, so that one tower's graph is alive at a time. Without `streams`
the encoder takes a chunk as it is.

A loss is any callable on representations. Where samples meet decides which step is exact, and the cheapest of those is
taken; a loss that declares nothing is in regime A:

    A   through gradients                       the gradient cache: two forwards of every sample
    B   through tensors without a gradient      one pass without a graph for those tensors, then accumulation
    C   nowhere                                 accumulation

In B and C the loss of N samples is a mean of terms, each of one sample and of targets t without a gradient,

    L = 1/N sum_i l(z_i, t_i),      so      dL = sum over chunks of  d [ 1/N sum_{i in chunk} l(z_i, t_i) ]

and each chunk can be taken forward and backward on its own (`accumulation.py`).

Shape letters: N samples of the global batch, B those of this rank, C those of a chunk.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gc_accel.distributed import GlobalLoss, RankedBatch

Reps = Mapping[str, Tensor]


@dataclass(frozen=True)
class Streams:
    """What an encoder declares.

    Attributes:
        keys: by stream the input keys that feed it; `{None: ()}` is the single stream of any other encoder.
        global_names: outputs that are the same for every chunk.
        frozen: streams that nothing trains.
        together: whether a chunk runs through all of them in one call, as a single stream.
    """

    keys: Mapping[Any, Iterable[str]] = field(default_factory=lambda: {None: ()})
    global_names: frozenset[Any] = frozenset()
    frozen: frozenset[Any] = frozenset()
    together: bool = False

    @property
    def names(self) -> list[Any]:
        """All streams, the costliest first."""
        return [None] if self.together else list(self.keys)

    @property
    def trained(self) -> list[Any]:
        """Streams that train, the costliest first."""
        return [name for name in self.names if name not in self.frozen]

    def as_one(self) -> "Streams":
        """A single stream of all inputs, for an encoder that is called with all of them at once."""
        return replace(self, together=True, frozen=frozenset())

    def split(self, batch: Any) -> dict[Any, Any]:
        """The inputs of each stream.

        Raises:
            ValueError: a stream has no input.
        """
        if None in self.keys:
            return {None: batch}
        parts = {name: {key: batch[key] for key in keys if key in batch} for name, keys in self.keys.items()}
        for name, part in parts.items():
            if not part:
                raise ValueError(
                    f"expected an input of {name!r} among {list(self.keys[name])}, got {list(batch)}"
                )
        return {None: parts} if self.together else parts

    def extras(self, batch: Any) -> dict[str, Any]:
        """Inputs that feed no stream, such as labels."""
        if None in self.keys:
            return {}
        fed = {key for keys in self.keys.values() for key in keys}
        return {key: value for key, value in batch.items() if key not in fed}

    @staticmethod
    def arguments(stream: Any, inputs: Any) -> Any:
        """What the encoder is called with to encode these inputs of one stream."""
        return inputs if stream is None else {stream: inputs}


def streams_of(encoder: Callable[..., Any]) -> Streams:
    """What an encoder declares; it is not to be wrapped."""
    if not hasattr(encoder, "streams"):
        return Streams(global_names=frozenset(getattr(encoder, "global_names", ())))
    names, frozen = getattr(encoder, "global_names", ()), getattr(encoder, "frozen_streams", ())
    return Streams(encoder.streams, frozenset(names), frozenset(frozen))


class StatefulLoss(GlobalLoss):
    """A loss with buffers, such as a queue, that move once per batch.

    Args:
        process_group: ranks whose batches make up the global batch; None is the default group.
    """

    def __init__(self, *, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.process_group = process_group

    def update(self, reps: Reps) -> None:
        """Move the state: called by the engine, on all ranks, once the gradients of a batch are there.

        Args:
            reps: of this rank's whole batch, from the first pass, without a gradient.
        """

    def everywhere(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, in rank order, so that the state is the same on each of them."""
        return RankedBatch(len(rows), rows.device, self.process_group).gather(rows)


class AccumulatedLoss(StatefulLoss):
    """A loss in regime B or C, as `targets` of a whole batch and terms, `per_sample`, of each of its chunks.

    Args:
        teacher: the momentum encoder whose representations the targets are made of, where the loss asks for one.
        process_group: ranks whose batches make up the global batch; None is the default group.

    `targets_from` says whose representations `targets` wants, without a graph, of the whole batch before the first
    term is taken: the "teacher"'s, the "encoder"'s own, or nobody's.
    """

    regime: Literal["A", "B", "C"] = "C"
    targets_from: ClassVar[Literal["teacher", "encoder"] | None] = None

    def __init__(self, *, teacher: Any = None, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(process_group=process_group)
        self.teacher = teacher

    def targets(self, reps: Reps, batch: RankedBatch) -> Any:
        """From representations without a gradient to targets. Ranks may meet here, and only here.

        Args:
            reps: `(B, ...)` by name, as `targets_from` says; nothing, if it says so.
            batch: the ranks.
        """
        return None

    def per_sample(self, reps: Reps, targets: Any, rows: slice) -> Tensor:
        """The terms `(C,)` of the samples of a chunk.

        Args:
            reps: `(C, ...)` by name, of the encoder.
            targets: of the whole batch.
            rows: where in the batch of this rank the chunk is.
        """
        raise NotImplementedError

    def forward(self, labels: Tensor | None = None, **reps: Tensor) -> Tensor:
        """The loss of the global batch, 0-d, from the representations of all of its samples at once.

        What a gradient cache or an evaluation would do. A momentum encoder has no part in it: in eval mode the
        encoder stands in for it, which is another number than that of a training step.

        Args:
            labels: not looked at, so that a labelled data set can be used as it is.
            reps: `(B, ...)` by name, of this rank.

        Raises:
            ValueError: in training mode for a loss with a momentum encoder, which `GradientCache` runs.
        """
        if self.targets_from == "teacher" and self.training:
            raise ValueError(
                f"expected {type(self).__name__} in eval mode, where the encoder stands in for its momentum encoder, "
                "got it in training mode: let GradientCache train with it, or call loss.eval() first"
            )
        return self.in_one_graph(reps, reps)

    def in_one_graph(self, reps: Reps, source: Reps) -> Tensor:
        """The loss of the global batch, 0-d, with targets from the representations of a `source`.

        Args:
            reps: `(B, ...)` by name, of the encoder, for all samples of this rank.
            source: likewise, of whom `targets_from` names; no gradient goes into them.
        """
        reps, source = ({name: _in_full(rep) for name, rep in part.items()} for part in (reps, source))
        first = next(iter(reps.values()))
        batch = RankedBatch(len(first), first.device, self.process_group)
        with torch.no_grad():
            targets = self.targets({name: rep.detach() for name, rep in source.items()}, batch)
        return batch.sum(self.per_sample(reps, targets, slice(0, len(first))).sum() / batch.total)


def _in_full(rep: Tensor) -> Tensor:
    return rep.float() if rep.dtype in (torch.float16, torch.bfloat16) else rep
