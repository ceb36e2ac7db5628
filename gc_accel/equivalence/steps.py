"""The steps that are compared: the cached one, watched, and its references in one graph.

A reference calls the encoder without what wraps it and adds the gradients of all ranks up by itself, so that it
does not rest on the engine's passes, on its scaling, or on its reductions. Of the engine it takes one thing, how
a loss is called on the representations of all ranks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor

from gc_accel.engine.encoding import Encoded, Named, Parts
from gc_accel.equivalence.errors import Gradients, order, representation_error
from gc_accel.state.graph import leaves_and_nodes
from gc_accel.equivalence.state import State
from gc_accel.gradient_cache import GradientCache
from gc_accel.inputs.joining import join
from gc_accel.inputs.nested import Inputs, batch_size, call, named, split, split_streams
from gc_accel.losses import AccumulatedLoss


class WatchedCache(GradientCache):
    """A cache that notes the calls of its first pass, and how far its second pass is from it.

    Attributes:
        calls: inputs by stream, in the order in which they were encoded, the joint call last.
        by_samples: the places of these calls in that list, in the order of their samples.
        drift: largest difference between the two representations of a sample, relative.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sizes.calls = dict(self.sizes.chunks)  # one call for each chunk, to be noted
        self._forget()

    def _forget(self) -> None:
        self.calls: list[Parts] = []
        self.by_samples: Sequence[int] = ()
        self.place: dict[Tensor, int] = {}  # of the call that a leaf comes from
        self.drift = 0.0

    def step(self, chunks: Iterable[Inputs], loss_kwargs: Mapping[str, Any]) -> Tensor:
        self._forget()  # what an attempt that ran out of memory has noted
        return super().step(chunks, loss_kwargs)

    def _encode(self, parts: Parts, retain: bool) -> Encoded:
        leaves, replay = super()._encode(parts, retain)
        self.place.update(dict.fromkeys(leaves.values(), len(self.calls)))
        self.calls.append(parts)

        def watched() -> Named:
            outputs = replay()
            self.drift = max(self.drift, representation_error(outputs, leaves), key=order)
            return outputs

        return Encoded(leaves, watched)

    def _cache_gradients(self, calls: list[Encoded], loss_kwargs: dict[str, Any]) -> Tensor:
        self.by_samples = [self.place[next(iter(each.leaves.values()))] for each in calls]
        return super()._cache_gradients(calls, loss_kwargs)


@dataclass(frozen=True)
class Step:
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
        batch, self.padded = join(chunks)
        self.size = batch_size(batch)
        self.parts, extras = split_streams(batch, cache.streams)
        self.all_kwargs = {**loss_kwargs, **send_to_device(extras, cache.replicas.device)}

    def direct(self) -> Step:
        """The whole batch in one call."""
        return self._reference([self.parts])

    def in_chunks(self) -> Step:
        """The chunks in one graph, each with all its streams."""
        size = max(self.cache.chunk_sizes.values())
        first, *others = [
            split_streams(piece, self.cache.streams)[0]
            for chunk in self.chunks
            for piece in split(chunk, size)
        ]
        return self._reference([*others, first])

    def replayed(self) -> Step:
        """The calls of the cached step's first pass, from the same random numbers, in one graph."""
        return self._reference(self.cache.calls, self.cache.by_samples)

    def cached(self) -> Step:
        """The step that training takes, without what a scaler and accumulation put into its gradients."""
        self.state.rewind()
        loss = self.cache.forward_backward_chunks(self.chunks, **self.loss_kwargs)
        factor, accelerator = 1.0, self.cache.replicas.accelerator
        if accelerator is not None:
            factor = 1 / accelerator.gradient_accumulation_steps
            factor *= 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        grads = {name: p.grad for name, p in self.parameters.items()}
        return Step(loss, {name: None if grad is None else grad / factor for name, grad in grads.items()})

    def encode(
        self,
        calls: Iterable[Mapping[Any, Inputs]],
        by_samples: Sequence[int] = (),
        encoder: Callable[..., Any] | None = None,
    ) -> Named:
        """Representations of all calls, in float32 (float64 stays).

        Args:
            calls: inputs by stream, in the order in which to encode them.
            by_samples: the places of the calls in the order of their samples; without, the last one is the first.
            encoder: by default that of the cache.
        """
        encoded = [self._call(encoder or self.cache.model, parts) for parts in calls]
        found: dict[Any, list[Tensor]] = {}
        for place in by_samples or range(-1, len(encoded) - 1):
            for name, output in encoded[place].items():
                found.setdefault(name, []).append(output)
        shared = self.cache.global_names
        return {name: rows[0] if name in shared else torch.cat(rows) for name, rows in found.items()}

    def teach(self, calls: Iterable[Mapping[Any, Inputs]]) -> Named | None:
        """What the momentum encoder makes of all calls, in the order of `encode`, if the loss has one."""
        loss_fn, accelerator = self.cache.loss_fn, self.cache.replicas.accelerator
        if not isinstance(loss_fn, AccumulatedLoss) or loss_fn.teacher is None:
            return None
        with nullcontext() if accelerator is None else accelerator.autocast():  # the encoder brings its own
            return self.encode(calls, encoder=loss_fn.teacher)

    def loss(self, outputs: Named, taught: Named | None) -> Tensor:
        """The loss of the global batch, 0-d; its gradient is this rank's share."""
        shared = {name: outputs[name] for name in self.cache.global_names}
        reps = {name: output for name, output in outputs.items() if name not in shared}
        loss_fn: Any = self.cache.loss_fn
        with torch.autocast(self.cache.replicas.device.type, enabled=False):
            if taught is None:
                loss = self.cache.replicas.global_loss(loss_fn, reps, shared, self.all_kwargs)
            else:
                loss = loss_fn.in_one_graph(reps, taught)
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"expected a scalar loss of the representations, got {loss}")
        return loss.reshape(())

    def _reference(self, calls: Sequence[Mapping[Any, Inputs]], by_samples: Sequence[int] = ()) -> Step:
        self.state.rewind()
        if self.cache.batch_norms.policy == "frozen":
            self.cache.batch_norms.begin_step()
        outputs = self.encode(calls, by_samples)
        drew, changed = not self.state.rng.is_current(), self.state.changed()
        taught = self.teach(calls)
        loss = self.loss(outputs, taught)
        leaves, nodes = leaves_and_nodes(loss)
        self._add(leaves)
        self.state.take_gradients(self.parameters.values())
        loss.backward()
        gradients = {name: self._summed(parameter) for name, parameter in self.parameters.items()}
        outputs = {name: output.detach() for name, output in outputs.items()}
        return Step(loss.detach(), gradients, outputs, taught, drew, changed, nodes)

    def _call(self, encoder: Callable[..., Any], parts: Mapping[Any, Inputs]) -> Named:
        inputs = send_to_device(parts.get(None, parts), self.cache.replicas.device)
        outputs = named(call(encoder, inputs))
        return {name: out if out.dtype == torch.float64 else out.float() for name, out in outputs.items()}

    def _add(self, leaves: Iterable[Tensor]) -> None:
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
        for each in (present, total):
            dist.all_reduce(each, group=replicas.group)
        return total if present else None
