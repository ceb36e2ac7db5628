"""Gradient caching: the gradient of a loss over the whole batch, with the memory of one chunk.

One step (Gao et al. 2021, arXiv 2101.06983), for an encoder f and a loss L of all representations:

1. First pass. Encode every chunk without a graph, z_c = f(x_c), noting the RNG state before each.
2. Loss. With all z as leaves, L(z).backward() leaves the cached gradients dL/dz_c.
3. Second pass. Encode every chunk again from its RNG state, now with a graph, and push dL/dz_c in.

By the chain rule the sum over chunks of dL/dz_c . df(x_c)/dtheta *is* the full-batch gradient. Two things in
a model depend on the grouping: dropout draws masks by chunk, and BatchNorm, refused unless asked for by name.

The streams of an encoder (`contracts.py`) are encoded one by one, so that one tower's graph is alive at a time. Some
chunks keep the graph of their first pass and need no second forward:

    first pass    image 1, image 2, ..., image n (its graph is kept), text 1, text 2, ..., text n
    second pass   image n,  then  image 1, image 2, ..., text 1, text 2, ..., text n
    reduction     over ranks, once, of what the second pass has added up (`distributed/reduction.py`)
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from gc_accel.accumulation import accumulate
from gc_accel.contracts import AccumulatedLoss
from gc_accel.differentiable import CachedLoss, refuse_forward_pass, within_ddp
from gc_accel.distributed import Replicas
from gc_accel.engine.batch_norm import BatchNorms, Policy
from gc_accel.engine.drift import Drift, OnDrift
from gc_accel.engine.encoding import Encoded
from gc_accel.engine.joining import JoinedCalls
from gc_accel.engine.loss_of_batch import LossOfBatch, check_all_seen
from gc_accel.inputs.nested import Inputs
from gc_accel.memory.attempts import Attempts
from gc_accel.memory.chunk_sizes import ChunkSize, ChunkSizes
from gc_accel.memory.recovery import Reread
from gc_accel.memory.retention import Retain, Retention
from gc_accel.passes import Passes
from gc_accel.state.snapshot import Snapshot

Kwargs = Mapping[str, Any]
Step = Callable[[Iterable[Inputs], Kwargs], Tensor]


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
        memory_budget: what the activations of a step may take: bytes, or up to 1 the fraction of the device to fill.
        forward_chunk_size: samples of a call of the first pass, where it draws no random numbers; by default
            a chunk, and four of them on an accelerator (one with gradient checkpointing).
        batch_norm: what to do about BatchNorm in training mode: "error", "frozen" or "ghost".
        reduce_every: after how many chunks of the second pass FSDP2 reduces, which holds the gradients of whole
            weights until then; None: once, at the end.
        on_drift: what to do if a chunk has other representations in the second pass than in the first: "error" (all
            gradients are put back), "warn" or "ignore".
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
        reduce_every: int | None = None,
        on_drift: OnDrift = "error",
    ) -> None:
        self.encoder, self.loss_fn = encoder, loss_fn
        self.replicas = Replicas(encoder, accelerator, reduce_every)
        self.model = self.replicas.model
        self.loss = LossOfBatch(loss_fn, self.replicas)
        self.batch_norms = BatchNorms(self.model, batch_norm)
        self.retention = Retention(retain, memory_budget, self.replicas)
        if self.replicas.sharded or batch_norm == "ghost":  # calls count, or the statistics of each
            forward_chunk_size = 1
        joined = JoinedCalls(self.model, forward_chunk_size, self.replicas.device)
        self.sizes = ChunkSizes(chunk_size, forward_chunk_size, memory_budget, self.replicas)
        guard = Drift(on_drift, self.replicas)
        parts = self.replicas, self.batch_norms, self.sizes, joined, self.retention, guard
        self.passes = Passes(encoder, *parts, in_one_call=isinstance(loss_fn, AccumulatedLoss))
        self.attempts = Attempts(self.replicas, self.sizes, self.retention, joined)
        self.cached_loss = CachedLoss(self.passes, self.loss, self.end_step)

    @property
    def chunk_sizes(self) -> dict[Any, int]:
        """Samples that the encoder sees at once, by stream; fewer after memory has run out."""
        return self.sizes.by_stream

    def forward_backward(self, batch: Inputs, **loss_kwargs: Any) -> Tensor:
        """Like `forward_backward_chunks`, for a batch that is whole."""
        self.sizes.settle(batch)
        return self.forward_backward_chunks([batch], **loss_kwargs)

    def forward_backward_chunks(self, chunks: Iterable[Inputs], **loss_kwargs: Any) -> Tensor:
        """Add the gradient of the loss of one batch to the weights; the optimizer step is the caller's.

        Chunks are read lazily; tensors in `loss_kwargs` are per-sample. Returns the loss of the global batch,
        0-d, detached. A step that runs out of memory is made again with half the chunk (`memory/recovery.py`). Raises
        ValueError, before any gradient has changed, for inputs that do not pair up, BatchNorm in training mode,
        NaN, and a loss that ignores a representation.
        """
        refuse_forward_pass(self.model)
        step = self.step
        if isinstance(self.loss_fn, AccumulatedLoss):  # needs less than a cache
            step = partial(accumulate, self.loss_fn, self.passes)
        return self._with_retries(step, chunks, loss_kwargs)

    def __call__(self, batch: Inputs, **loss_kwargs: Any) -> Tensor:
        """The loss of the global batch, 0-d, whose `backward()` makes the second pass and reduces over ranks.

        It is a loss like any other: what multiplies it (a gradient scaler, one over the accumulated batches, a weight)
        goes into the gradient, so any trainer that calls `backward` can hold it. Without grad mode it is a number.
        `forward_backward` takes less memory, and is made again where memory runs out in its second pass.

        Raises:
            ValueError: see `forward_backward_chunks` and `differentiable.py`.
        """
        with within_ddp(self.replicas):
            return self._with_retries(self.cached_loss, [batch], loss_kwargs)

    def step(self, chunks: Iterable[Inputs], loss_kwargs: Kwargs) -> Tensor:
        """One attempt at a step; `retry` undoes it if memory runs out."""
        # 1. First pass: the representations of every chunk, as leaves.
        calls = [encoded for call in self.passes.calls(chunks) for encoded in self.passes.encode(call)]
        # 2. The loss of the whole batch leaves its gradient in the leaves.
        loss = self.cache_gradients(calls, chunks, loss_kwargs)
        # 3. Second pass: every chunk again, and its cached gradient into the weights; graphs that were kept go first.
        for number, call in enumerate(sorted(calls, key=lambda call: not call.keeps_graph), start=1):
            self.passes.push(call)
            self.replicas.pushed(number)
        self.passes.guard.check(self.passes.snapshot)
        self.replicas.reduce()  # nothing on one process
        self.end_step(calls)
        return loss

    def cache_gradients(self, calls: list[Encoded], chunks: Iterable[Inputs], loss_kwargs: Kwargs) -> Tensor:
        """Leave the gradient of the loss in the leaves of all calls; return the loss, 0-d, detached."""
        loss = self.loss.of(calls, chunks, loss_kwargs)
        with self.replicas.agreement.before_each_collective():
            self.replicas.scaled(loss).backward()
        check_all_seen(calls, self.passes.streams)
        return loss.detach()

    def end_step(self, calls: list[Encoded]) -> None:
        """Decide how many graphs are kept from now on, and let a loss move its state."""
        self.passes.decide_retention()
        self.loss.update(calls)

    def _with_retries(self, step: Step, chunks: Iterable[Inputs], loss_kwargs: Kwargs) -> Tensor:
        """Make a step, again with half the chunk where memory runs out."""
        self.replicas.follow()
        reread = Reread(chunks)
        for first in islice(reread, not self.chunk_sizes):  # "auto" measures with the first chunk
            self.sizes.settle(first)

        def attempt(chunks: Iterable[Inputs], snapshot: Snapshot) -> Tensor:
            self.passes.begin_step(snapshot)
            self.loss.begin_step(snapshot, self.passes.streams)
            return step(chunks, loss_kwargs)

        return self.attempts.make(attempt, reread)
