"""Gradient caching: the gradient of a loss over the whole batch, with the memory of one chunk.

One step (Gao et al. 2021, arXiv 2101.06983), for an encoder f and a loss L of all representations:

1. First pass. Encode every chunk without a graph, z_c = f(x_c), noting the RNG state before each.
2. Loss. With all z as leaves, L(z).backward() leaves the cached gradients dL/dz_c.
3. Second pass. Encode every chunk again from its RNG state, now with a graph, and push dL/dz_c in.

By the chain rule the sum over chunks of dL/dz_c . df(x_c)/dtheta *is* the full-batch gradient. Two things in
a model depend on the grouping: dropout draws masks by chunk, and BatchNorm, refused unless asked for by name.

An encoder may declare `streams`, parts of a sample that are encoded on their own (image, text), each with the
input keys that feed it, the costliest first; keys that feed none go to the loss. `global_names` are outputs
that are the same for every chunk (the logit scale), `frozen_streams` those that nothing trains. Streams are
called one by one, `encoder(image={...})`, so that one tower's graph is alive at a time:

    first pass    image 2, text 2, ..., image n (graph retained), text n, image 1, text 1, joint call
    second pass   the retained graph, image 2, text 2, ..., text n,       image 1, text 1, joint call (synced)

Of k graphs that are retained, the others are those of the chunks that come first. (Of a batch that comes whole all
chunks of a stream are encoded before those of the next.)

The joint call takes the head of chunk 1 through all streams and globals. It alone syncs the ranks, so it comes
last and touches every parameter that trains; half a chunk of several streams does not set the peak.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from gc_accel.accumulation import accumulate, is_accumulated, move_state
from gc_accel.distributed import Replicas, without_rows
from gc_accel.engine.batch_norm import BatchNorms, Policy
from gc_accel.engine.checks import check_finite, check_rows
from gc_accel.engine.encoding import Encoded, Parts, by_name, encode, encode_together
from gc_accel.engine.schedule import FirstPass, Rows
from gc_accel.inputs.nested import Inputs, batch_size, concatenate
from gc_accel.memory.chunk_sizes import ChunkSize, ChunkSizes
from gc_accel.memory.recovery import with_recovery
from gc_accel.memory.retention import Retain, Retention


class GradientCache:
    """Exact full-batch gradients, chunk by chunk.

    Args:
        encoder: any callable from a chunk to a tensor, tuple or mapping of representations, prepared or not.
        loss_fn: any callable on representations, in the structure that the encoder returns; on several ranks
            it sees the whole batch, but for a `GlobalLoss`, which reaches over ranks by itself at less cost.
        chunk_size: samples that the encoder sees at once, for all streams or by stream; "auto": as many as fit.
        accelerator: the one that prepared the encoder (precision, scaler, accumulation, reduction).
        retain: how many chunks of the costliest stream keep the graph of their first pass, "all", or "auto":
            as many as `memory_budget` allows.
        memory_budget: what "auto" may use: bytes, or up to 1 a fraction of the device's memory.
        forward_chunk_size: samples of a call of the first pass, where it draws no random numbers; by default
            a chunk, and four of them on an accelerator (one with gradient checkpointing).
        batch_norm: what to do about BatchNorm in training mode: "error", "frozen" or "ghost".
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        loss_fn: Callable[..., Tensor],
        chunk_size: ChunkSize = 16,
        accelerator: Accelerator | None = None,
        retain: Retain = 1,
        batch_norm: Policy = "error",
        *,
        memory_budget: float | None = None,
        forward_chunk_size: int | None = None,
    ) -> None:
        self.encoder, self.loss_fn = encoder, loss_fn
        self.replicas = Replicas(encoder, accelerator)
        self.model = self.replicas.model
        self.batch_norms = BatchNorms(self.model, batch_norm)
        self.streams: Mapping[Any, Iterable[str]] = getattr(self.model, "streams", {None: ()})
        self.global_names: frozenset[Any] = frozenset(getattr(self.model, "global_names", ()))
        if self.replicas.sharded or batch_norm == "ghost":  # calls count, or the statistics of each
            forward_chunk_size = 1
        self.sizes = ChunkSizes(chunk_size, forward_chunk_size, memory_budget, self.streams, self.replicas)
        self.retention = Retention(retain, memory_budget, self.replicas)

    @property
    def chunk_sizes(self) -> dict[Any, int]:
        """Samples that the encoder sees at once, by stream; fewer after memory has run out."""
        return self.sizes.chunks

    def forward_backward(self, batch: Inputs, **loss_kwargs: Any) -> Tensor:
        """Like `forward_backward_chunks`, for a batch that is whole."""
        self.sizes.settle(batch)
        return self.forward_backward_chunks([batch], **loss_kwargs)

    def forward_backward_chunks(self, chunks: Iterable[Inputs], **loss_kwargs: Any) -> Tensor:
        """Add the gradient of the loss of one batch to the weights; the optimizer step is the caller's.

        Chunks are read lazily; tensors in `loss_kwargs` are per-sample. Returns the loss of the global batch,
        0-d, detached. A step that runs out of memory is made again with half the chunk (`recovery.py`). Raises
        ValueError, before any gradient has changed, for inputs that do not pair up, BatchNorm in training mode,
        NaN, and a loss that ignores a representation.
        """
        return with_recovery(self, chunks, loss_kwargs)

    def step(self, chunks: Iterable[Inputs], loss_kwargs: Mapping[str, Any]) -> Tensor:
        """The step itself, which leaves things half done when memory runs out."""
        if is_accumulated(self.loss_fn):  # needs less than a cache
            return accumulate(self, chunks, loss_kwargs)
        self.batch_norms.begin_step()
        frozen = getattr(self.model, "frozen_streams", ())
        trained = [name for name in self.streams if name not in frozen] or list(self.streams)
        limits = self.retention.limits(trained, self.streams, self.chunk_sizes)
        limits.update(dict.fromkeys(frozen, 0))  # which have no graph
        kinds = {"nominal": self.retention.counts_chunks, "in_step": self.replicas.sharded}
        schedule = FirstPass(self.sizes.chunks, self.sizes.calls, limits, **kinds)
        joint, extras = dict[Any, Rows](), defaultdict[str, list[Any]](list)
        head, calls, retained, again = (list[Encoded]() for _ in range(4))
        turns = schedule.turns(chunks, self.streams, trained, joint, extras)
        for block in schedule.blocks(self.replicas.aligned(turns, joint, self.streams)):
            stream, parts = block.turns[0].stream, [{turn.stream: turn.rows.inputs} for turn in block.turns]
            whole = {stream: block.rows.inputs} if len(parts) > 1 else parts[0]
            encoded = self._encode_block(whole, parts, block.retain)
            for turn, each in zip(block.turns, encoded, strict=True):
                leaves, replay = each if turn.counts else without_rows(each)
                leaves = {name: leaf.requires_grad_(stream not in frozen) for name, leaf in leaves.items()}
                # In the order of the samples: the rest of the first chunk follows the joint call.
                (head if schedule.is_rest(turn) else calls).append(each := Encoded(leaves, replay))
                if stream not in frozen:
                    (retained if block.retain else again).append(each)
        if not joint:
            raise ValueError("expected a batch of at least one sample, got none")
        # Where calls reduce, the last one comes after the loss: until then there is a way back.
        everything = self.replicas.is_alone and schedule.has_room(joint, trained) and not again
        with self.replicas.reducing(everything):
            last = self._encode({name: rows.inputs for name, rows in joint.items()}, everything)
        self.replicas.agreement.check()
        if twice := loss_kwargs.keys() & extras:
            raise ValueError(f"expected {sorted(twice)} in the chunks or by keyword, got both")
        joined = {name: concatenate(values) for name, values in extras.items()}
        loss_kwargs = {**loss_kwargs, **send_to_device(joined, self.replicas.device)}
        loss = self._cache_gradients([last, *head, *calls], loss_kwargs)
        with self.replicas.second_pass():
            for each in retained + again:
                self._push(each, sync=False)
            self.replicas.begin_syncing()
            self._push(last, sync=True)
        self.retention.decide({name: schedule.samples[name] for name in trained})
        move_state(self.loss_fn, [last, *head, *calls])
        return loss

    def _encode_block(self, whole: Parts, parts: list[Parts], retain: bool) -> list[Encoded]:
        """First pass of adjacent chunks: in one call, if it keeps no graph."""
        with self.replicas.reducing(False):
            if len(parts) > 1:
                joined, *chunks = (each.get(None, each) for each in (whole, *parts))
                fn, device = self.encoder, self.replicas.device
                if encoded := encode_together(fn, joined, chunks, device=device, shared=self.global_names):
                    return encoded
                # Random draws: one by one from now on.
                self.sizes.calls.update({name: self.sizes.chunks[name] for name in whole})
            return [self._encode(part, retain) for part in parts]

    def _encode(self, parts: Parts, retain: bool) -> Encoded:
        fn = self.retention.metered(parts, self.encoder)
        encoded = encode(fn, parts.get(None, parts), device=self.replicas.device, retain=retain)
        check_rows(encoded.leaves, batch_size(next(iter(parts.values()))), self.global_names)
        return encoded

    def _cache_gradients(self, calls: list[Encoded], loss_kwargs: dict[str, Any]) -> Tensor:
        """Leave the gradient of the loss in the leaves of all calls, globals in the first; return the loss."""
        parts = by_name(calls)
        shared = {name: parts.pop(name)[0] for name in self.global_names}
        together = self.replicas.agreement.before_each_collective()
        with together, torch.enable_grad(), torch.autocast(self.replicas.device.type, enabled=False):
            reps = {name: torch.cat(leaves) for name, leaves in parts.items()}
            loss = self.replicas.global_loss(self.loss_fn, reps, shared, loss_kwargs)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"expected a scalar loss of the representations, got {loss}")
            check_finite(loss, reps)
            self.replicas.scaled(loss).sum().backward()
        if ignored := [
            name for name, (leaf, *_) in parts.items() if leaf.requires_grad and leaf.grad is None
        ]:
            raise ValueError(f"expected a loss of every representation, got one that ignores {ignored}")
        return loss.detach().reshape(())

    def _push(self, call: Encoded, *, sync: bool) -> None:
        """Second pass over one call: its cached gradients, through its graph, into the weights."""
        cached = {name: leaf.grad for name, leaf in call.leaves.items() if leaf.grad is not None}
        if not cached:
            return
        with self.replicas.reducing(sync), self.batch_norms.second_pass():
            outputs = {
                name: out for name, out in call.replay().items() if name in cached and out.requires_grad
            }
            self.replicas.backward(list(outputs.values()), [cached[name] for name in outputs], sync=sync)
