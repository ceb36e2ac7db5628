"""The steps that are compared: the cached one, watched, and its references in one graph.

A reference calls the encoder without what wraps it and adds the gradients of all ranks up by itself, so that it
does not rest on the engine's passes, on its scaling, or on its reductions. Of the engine it takes one thing, how
a loss is called on the representations of all ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn

from gc_accel.contracts import AccumulatedLoss, streams_of
from gc_accel.engine.encoding import Encoded, Named
from gc_accel.engine.loss_of_batch import global_loss
from gc_accel.engine.schedule import Chunk
from gc_accel.equivalence.errors import Gradients
from gc_accel.equivalence.state import State
from gc_accel.gradient_cache import GradientCache
from gc_accel.inputs.joining import join
from gc_accel.inputs.nested import Inputs, batch_size, call, named, split
from gc_accel.passes import Passes
from gc_accel.state.graph import leaves_and_nodes
from gc_accel.state.modules import meeting
from gc_accel.state.repeat import difference
from gc_accel.state.snapshot import Snapshot


class WatchedPasses(Passes):
    """Passes that note what was encoded, and how far the second pass is from the first.

    Attributes:
        encoded: what the encoder was called with, call by call, in the order of the samples of each stream.
        drift: largest difference between the two representations of a sample, relative, 0-d.
    """

    def begin_step(self, snapshot: Snapshot) -> None:
        super().begin_step(snapshot)
        self.encoded, self.drift = list[Inputs](), torch.zeros((), device=self.replicas.device)

    def encode_chunk(self, chunk: Chunk, keep_graph: bool) -> Encoded:
        encoded = super().encode_chunk(chunk, keep_graph)
        self.encoded.append(self.streams.arguments(chunk.stream, chunk.inputs))

        def watched() -> Named:
            outputs = encoded.replay()
            self.drift = torch.maximum(self.drift, difference(outputs, encoded.leaves))
            return outputs

        return encoded._replace(replay=watched)


class WatchedCache(GradientCache):
    """A cache that is watched, with a call for each chunk."""

    passes: WatchedPasses

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, forward_chunk_size=1, on_drift="ignore", **options)
        passes = self.passes
        parts = (
            passes.replicas,
            passes.batch_norms,
            passes.chunk_sizes,
            passes.joined,
            passes.retention,
            passes.guard,
        )
        self.passes = WatchedPasses(passes.encoder, *parts, in_one_call=passes.in_one_call)


@dataclass(frozen=True)
class Outcome:
    """Loss and gradients of a step; of a reference also what its forward did besides."""

    loss: Tensor  # 0-d
    gradients: Gradients
    outputs: Named = field(default_factory=dict)
    taught: Named | None = None  # outputs of a momentum encoder
    drew: bool = False  # random numbers
    changed: Sequence[str] = ()  # in the model
    nodes: frozenset[str] = frozenset()  # of the graph


class Steps:
    """Steps on one batch, each on the weights and from the generators that a state has noted.

    Args:
        cache: the one that is checked.
        state: of the encoder; put back before every step.
        parameters: by name; leaves that only a graph knows are added.
        chunks: of the batch.
        loss_kwargs: as the cached step gets them.

    Attributes:
        refused: what the cached step says against the BatchNorm layers of the encoder, if anything; known once a
            reference was taken.
    """

    def __init__(
        self,
        cache: WatchedCache,
        state: State,
        parameters: dict[str, Tensor],
        chunks: Sequence[Inputs],
        loss_kwargs: Mapping[str, Any],
    ) -> None:
        self.cache, self.state, self.parameters = cache, state, parameters
        self.chunks, self.loss_kwargs = chunks, loss_kwargs
        self.refused: str | None = None
        batch, self.padded = join(chunks)
        self.size = batch_size(batch)
        self.streams = streams_of(cache.model)
        extras = send_to_device(self.streams.extras(batch), cache.replicas.device)
        self.inputs, self.all_kwargs = self._whole(batch), {**loss_kwargs, **extras}

    def direct(self) -> Outcome:
        """The whole batch in one call."""
        return self._reference([self.inputs])

    def in_chunks(self) -> Outcome:
        """The chunks in one graph, each with all its streams."""
        size = max(self.cache.chunk_sizes.values())
        return self._reference([self._whole(piece) for chunk in self.chunks for piece in split(chunk, size)])

    def replayed(self) -> Outcome:
        """The calls of the cached step's first pass, from the same random numbers, in one graph."""
        return self._reference(self.cache.passes.encoded)

    def cached(self) -> Outcome:
        """The step that training takes, without what a scaler and accumulation put into its gradients."""
        self.state.rewind()
        loss = self.cache.forward_backward_chunks(self.chunks, **self.loss_kwargs)
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        unscaled = self.cache.replicas.unscaled
        return Outcome(
            loss, {name: grad if grad is None else unscaled(grad) for name, grad in gradients.items()}
        )

    def encode(self, calls: Iterable[Inputs], encoder: Callable[..., Any] | None = None) -> Named:
        """Representations of all calls, in float32 (float64 stays).

        Args:
            calls: what the encoder is called with, in the order of the samples.
            encoder: by default that of the cache.
        """
        parts: dict[Any, list[Tensor]] = {}
        for inputs in calls:
            for name, output in self._call(encoder or self.cache.model, inputs).items():
                parts.setdefault(name, []).append(output)
        shared = self.streams.global_names
        return {name: rows[0] if name in shared else torch.cat(rows) for name, rows in parts.items()}

    def teach(self, calls: Iterable[Inputs]) -> Named | None:
        """What the momentum encoder makes of all calls, in the order of `encode`, if the loss has one."""
        loss_fn, accelerator = self.cache.loss_fn, self.cache.replicas.accelerator
        if not isinstance(loss_fn, AccumulatedLoss) or loss_fn.teacher is None:
            return None
        with nullcontext() if accelerator is None else accelerator.autocast():  # the encoder brings its own
            return self.encode(calls, loss_fn.teacher)

    def loss(self, outputs: Named, taught: Named | None) -> Tensor:
        """The loss of the global batch, 0-d; its gradient is this rank's share."""
        shared = {name: outputs[name] for name in self.streams.global_names}
        reps = {name: output for name, output in outputs.items() if name not in shared}
        loss_fn: Any = self.cache.loss_fn
        with torch.autocast(self.cache.replicas.device.type, enabled=False):
            if taught is None:
                loss = global_loss(loss_fn, self.cache.replicas, reps, shared, self.all_kwargs)
            else:
                loss = loss_fn.in_one_graph(reps, taught)
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"expected a scalar loss of the representations, got {loss}")
        return loss.reshape(())

    def _whole(self, batch: Inputs) -> Inputs:
        """What the encoder is called with to encode all streams at once."""
        parts = self.streams.split(batch)
        return parts.get(None, parts)

    def _reference(self, calls: Sequence[Inputs]) -> Outcome:
        self.state.rewind()
        with self._under_policy():
            outputs = self.encode(calls)
        drew, changed = self.state.has_drawn(), self.state.changed()
        taught = self.teach(calls)
        loss = self.loss(outputs, taught)
        leaves, nodes = leaves_and_nodes(loss)
        self._name(leaves)
        self.state.take_gradients(self.parameters.values())
        loss.backward()
        gradients = {name: self._summed(parameter) for name, parameter in self.parameters.items()}
        outputs = {name: output.detach() for name, output in outputs.items()}
        return Outcome(loss.detach(), gradients, outputs, taught, drew, changed, nodes)

    @contextmanager
    def _under_policy(self) -> Iterator[None]:
        """A block in which BatchNorm layers are as in the cached step, but for those that it would refuse."""
        norms = self.cache.batch_norms

        def meet(module: nn.Module) -> None:
            try:
                norms.meet(module)
            except ValueError as error:
                if norms.policy != "error":
                    raise
                self.refused = self.refused or str(error)

        if isinstance(self.cache.model, nn.Module):
            meet(self.cache.model)
            yield
        else:
            with meeting(meet):
                yield

    def _call(self, encoder: Callable[..., Any], inputs: Inputs) -> Named:
        outputs = named(call(encoder, send_to_device(inputs, self.cache.replicas.device)))
        return {name: out if out.dtype == torch.float64 else out.float() for name, out in outputs.items()}

    def _name(self, leaves: Iterable[Tensor]) -> None:
        """Name leaves of a graph that are no parameters of the encoder or the loss as modules."""
        known, names = set(self.parameters.values()), self.state.parameter_names()
        for leaf in leaves:
            if leaf not in known:
                name = names.get(leaf, f"tensor {len(self.parameters)} of shape {tuple(leaf.shape)}")
                self.parameters[name] = leaf

    def _summed(self, parameter: Tensor) -> Tensor | None:
        """The gradients of all ranks, added up; none if no rank has one."""
        replicas = self.cache.replicas
        if replicas.world_size == 1:
            return parameter.grad
        present = torch.tensor(float(parameter.grad is not None), device=replicas.device)
        total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(present, group=replicas.group)
        dist.all_reduce(total, group=replicas.group)
        return total if present else None
