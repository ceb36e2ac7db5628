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

    first pass    image 1, text 1, image 2, text 2, ..., image n (graph retained), text n, joint call
    second pass   the retained graph, image 1, text 1, ..., text n,                        joint call (synced)

The joint call takes a slice of the first chunk through all streams and globals. It alone syncs the ranks, so
it comes last and touches every parameter that trains; half a chunk of several streams does not set the peak.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from gc_accel.batch_norm import BatchNorms, Policy
from gc_accel.chunking import Inputs, batch_size, call, concatenate, named, slice_inputs, split, split_streams
from gc_accel.distributed import Piece, Replicas, Turn, without_rows
from gc_accel.numerics import check_finite
from gc_accel.rng import RngState

Named = dict[Any, Tensor]
Encoded = tuple[Named, Callable[[], Named]]  # leaves, which hold the cached gradients after the loss; replay


def encode(fn: Callable[..., Any], chunk: Inputs, *, device: torch.device, retain: bool = False) -> Encoded:
    """Encode a chunk now and be ready to encode it again: the primitive under every schedule.

    Returns its outputs as leaves in float32 (float64 stays), and `replay`, which gives them again with a graph
    from the same RNG state. `retain` keeps the graph of this pass for it.
    """

    def run() -> Named:
        outputs = named(call(fn, send_to_device(chunk, device, non_blocking=True)))
        return {key: out if out.dtype == torch.float64 else out.float() for key, out in outputs.items()}

    state = RngState.current(device)
    with torch.set_grad_enabled(retain):
        outputs = run()
    drew = not state.is_current()

    def replay() -> Named:
        with torch.enable_grad(), state.replayed() if drew else nullcontext():
            return outputs if retain else run()

    return {name: output.detach().requires_grad_() for name, output in outputs.items()}, replay


class GradientCache:
    """Exact full-batch gradients, chunk by chunk.

    Args:
        encoder: any callable from a chunk to a tensor, tuple or mapping of representations, prepared or not.
        loss_fn: any callable on representations, in the structure that the encoder returns; on several ranks
            it sees the whole batch, but for a `GlobalLoss`, which reaches over ranks by itself at less cost.
        chunk_size: samples that the encoder sees at once, for all streams or by stream.
        accelerator: the one that prepared the encoder (precision, scaler, accumulation, reduction).
        retain: how many chunks of the costliest stream keep the graph of their first pass, or "all".
        batch_norm: what to do about BatchNorm in training mode: "error", "frozen" or "ghost".
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        loss_fn: Callable[..., Tensor],
        chunk_size: int | Mapping[str, int] = 16,
        accelerator: Accelerator | None = None,
        retain: int | Literal["all"] = 1,
        batch_norm: Policy = "error",
    ) -> None:
        self.encoder, self.loss_fn = encoder, loss_fn
        self.replicas = Replicas(encoder, accelerator)
        self.model = self.replicas.model
        self.batch_norms = BatchNorms(self.model, batch_norm)
        self.streams: Mapping[Any, Iterable[str]] = getattr(self.model, "streams", {None: ()})
        self.global_names: frozenset[Any] = frozenset(getattr(self.model, "global_names", ()))
        sizes = chunk_size if isinstance(chunk_size, Mapping) else dict.fromkeys(self.streams, chunk_size)
        if set(sizes) != set(self.streams) or min(sizes.values()) < 1:
            raise ValueError(f"expected chunks of at least 1 sample of {[*self.streams]}, got {chunk_size}")
        if retain != "all" and (isinstance(retain, str) or retain < 0):
            raise ValueError(f'expected retain to be "all" or a number of chunks from 0, got {retain!r}')
        self.chunk_sizes, self.retain = dict(sizes), float("inf") if retain == "all" else retain

    def forward_backward(self, batch: Inputs, **loss_kwargs: Any) -> Tensor:
        """Like `forward_backward_chunks`, for a batch that is already whole."""
        return self.forward_backward_chunks(split(batch, max(self.chunk_sizes.values())), **loss_kwargs)

    def forward_backward_chunks(self, chunks: Iterable[Inputs], **loss_kwargs: Any) -> Tensor:
        """Add the gradient of the loss of one batch to the weights; the optimizer step is the caller's.

        Chunks are read lazily; tensors in `loss_kwargs` are per-sample. Returns the loss of the global batch,
        0-d, detached. Raises ValueError, before any gradient has changed, for inputs that do not pair up,
        BatchNorm in training mode, NaN, and a loss that ignores a representation.
        """
        self.batch_norms.begin_step()
        frozen = getattr(self.model, "frozen_streams", ())
        trained = [name for name in self.streams if name not in frozen] or list(self.streams)
        joint, extras = dict[Any, Inputs](), defaultdict[str, list[Any]](list)
        retained, again = list[Encoded](), list[Encoded]()
        turns = self.replicas.aligned(self._pieces(chunks, trained, joint, extras), joint, self.streams)
        for (stream, inputs, counts), keep in self._look_ahead(turns, trained[0]):
            with self.replicas.reducing(False):
                encoded = self._encode({stream: inputs}, keep)
            leaves, replay = encoded if counts else without_rows(*encoded)
            leaves = {name: leaf.requires_grad_(stream in trained) for name, leaf in leaves.items()}
            (retained if keep else again).append((leaves, replay))
        if not joint:
            raise ValueError("expected a batch of at least one sample, got none")
        everything = not again and len(retained) < self.retain
        with self.replicas.reducing(everything):
            last = self._encode(joint, everything)
        if twice := loss_kwargs.keys() & extras:
            raise ValueError(f"expected {sorted(twice)} in the chunks or by keyword, got both")
        loss_kwargs |= send_to_device({k: concatenate(v) for k, v in extras.items()}, self.replicas.device)
        loss = self._cache_gradients(last, again + retained, loss_kwargs)
        with self.replicas.second_pass():
            for each in () if everything else retained + again:
                self._push([each], sync=False)
            self._push([*retained, last] if everything else [last], sync=True)  # one by one: ranks unsynced
        return loss

    def _pieces(self, chunks: Iterable[Inputs], trained: list, joint: dict, extras: dict) -> Iterator[Piece]:
        """Cut chunks to size, stream by stream; set the inputs of the joint call and of the loss aside."""
        smallest = min(self.chunk_sizes[name] for name in trained)
        for chunk in chunks:
            size, (parts, unfed) = batch_size(chunk), split_streams(chunk, self.streams)
            head = 0 if joint else min(size, smallest if len(trained) == 1 else (smallest + 1) // 2)
            if not joint:
                joint |= {name: slice_inputs(parts[name], 0, head) for name in trained}
            for name, part in parts.items():
                start = head if name in trained else 0
                if start < size:
                    rest = split(slice_inputs(part, start, size), self.chunk_sizes[name])
                    yield from ((name, piece) for piece in rest)
            for key, value in unfed.items():
                extras[key].append(value)

    def _look_ahead(self, turns: Iterable[Turn], costliest: Any) -> Iterator[tuple[Turn, bool]]:
        """Say of each turn whether to retain its graph: of the last `retain` of the costliest stream."""
        held = deque[Turn]()
        for turn in turns:
            held.append(turn)
            while sum(name == costliest for name, *_ in held) > self.retain:
                yield held.popleft(), False
            if self.retain == float("inf"):
                yield held.popleft(), True
        yield from ((turn, turn[0] == costliest) for turn in held)

    def _encode(self, parts: dict[Any, Inputs], retain: bool) -> Encoded:
        return encode(self.encoder, parts.get(None, parts), device=self.replicas.device, retain=retain)

    def _cache_gradients(self, last: Encoded, calls: list[Encoded], loss_kwargs: dict[str, Any]) -> Tensor:
        """Leave the gradient of the loss in the leaves of all calls, globals in the last; return the loss."""
        parts = defaultdict[Any, list[Tensor]](list)
        for leaves, _ in (last, *calls):
            for name in leaves:
                parts[name].append(leaves[name])
        shared = {name: parts.pop(name)[0] for name in self.global_names}
        with torch.enable_grad(), torch.autocast(self.replicas.device.type, enabled=False):
            reps = {name: torch.cat(leaves) for name, leaves in parts.items()}
            loss = self.replicas.global_loss(self.loss_fn, reps, shared, loss_kwargs)
            if loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"expected a scalar loss of the representations, got {loss}")
            check_finite(loss, reps)
            self.replicas.scaled(loss).sum().backward()
        ignored = [name for name, (leaf, *_) in parts.items() if leaf.requires_grad and leaf.grad is None]
        if ignored:
            raise ValueError(f"expected a loss of every representation, got one that ignores {ignored}")
        return loss.detach().reshape(())

    def _push(self, calls: list[Encoded], *, sync: bool) -> None:
        """Second pass over some calls: their cached gradients, through one graph, into the weights."""
        outputs, grads = [], []
        with self.replicas.reducing(sync), self.batch_norms.second_pass():
            for leaves, replay in calls:
                cached = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
                for name, output in replay().items() if cached else ():
                    if name in cached and output.requires_grad:
                        outputs.append(output)
                        grads.append(cached[name])
            self.replicas.backward(outputs, grads, sync=sync)
