"""Does a cached step give the gradient of the whole batch, on this model, this loss and this batch?

    1. direct     the whole batch in one graph, without a cache
    2. cached     the step that training takes, on the same weights, from the same random numbers
    3. chunked    where the encoder draws random numbers: the same chunks and masks in one graph

Everything that a step changes is put back before each of them and at the end. The direct step needs the memory
of the whole batch, so a batch of a few chunks is enough: that of one step would not fit where a cache is needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gc_accel.engine.batch_norm import Policy
from gc_accel.equivalence.compare import compare, not_compared
from gc_accel.equivalence.report import EquivalenceReport
from gc_accel.equivalence.state import State
from gc_accel.equivalence.steps import Steps, WatchedCache
from gc_accel.inputs.nested import Inputs, batch_size, split

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_equivalence(
    encoder: Callable[..., Any],
    loss_fn: Callable[..., Tensor],
    batch: Inputs,
    chunk_size: int | Mapping[str, int] = 16,
    *,
    accelerator: Accelerator | None = None,
    retain: int | Literal["all"] = 1,
    batch_norm: Policy = "error",
    tolerance: float | None = None,
    **loss_kwargs: Any,
) -> EquivalenceReport:
    """Compare a cached step with a direct one, and leave everything as it was found.

    Weights, gradients, buffers, modes and random generators are put back, also when something raises. Of an
    encoder that is no module, parameters and modules are found while it runs. Every rank calls this with its
    own part of the batch, and all get the same errors.

    Args:
        encoder, loss_fn, chunk_size, accelerator, retain, batch_norm: as for `GradientCache`, in the modes to train in.
        batch: nested inputs of a few chunks; it must fit into memory with its graph.
        tolerance: the largest error that counts as equal; by default what rounding explains: 1e-9 in float64,
            1e-5 in float32, 8 roundings in half precision.
        loss_kwargs: keyword arguments of the loss; tensors among them are per-sample.

    Raises:
        ValueError: for an encoder that FSDP or DeepSpeed prepared, an empty batch, and for what `GradientCache`
            refuses, but for BatchNorm and static_graph, which are reported as suspects.

    Example:
        >>> report = check_equivalence(encoder, CLIPLoss(), batch, chunk_size=16)
        >>> assert report.ok, report
    """
    largest = max(chunk_size.values()) if isinstance(chunk_size, Mapping) else chunk_size
    return check_equivalence_chunks(
        encoder,
        loss_fn,
        split(batch, max(largest, 1)),
        chunk_size,
        accelerator=accelerator,
        retain=retain,
        batch_norm=batch_norm,
        tolerance=tolerance,
        **loss_kwargs,
    )


def check_equivalence_chunks(
    encoder: Callable[..., Any],
    loss_fn: Callable[..., Tensor],
    chunks: Iterable[Inputs],
    chunk_size: int | Mapping[str, int] = 16,
    *,
    accelerator: Accelerator | None = None,
    retain: int | Literal["all"] = 1,
    batch_norm: Policy = "error",
    tolerance: float | None = None,
    **loss_kwargs: Any,
) -> EquivalenceReport:
    """Like `check_equivalence`, for a batch that comes as any iterable of chunks, of which all are read."""
    chunks = list(chunks)
    if not chunks:
        raise ValueError("expected a batch of at least one sample, got none: pass some chunks")
    if accelerator is not None and accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"expected an encoder of which every rank has the whole (one process, DDP), got one prepared by "
            f"{accelerator.distributed_type.value}: check it on one process before it is sharded"
        )
    if isinstance(encoder, DistributedDataParallel) and encoder.static_graph:
        size = sum(batch_size(chunk) for chunk in chunks)
        return not_compared(encoder.parameters(), size, chunk_size)
    cache = WatchedCache(encoder, loss_fn, chunk_size, accelerator, retain, batch_norm)
    roots = [
        (name, each) for name, each in (("", cache.model), ("loss", loss_fn)) if isinstance(each, nn.Module)
    ]
    modules = [named for prefix, root in roots for named in root.named_modules(prefix=prefix)]
    trained: dict[str, Tensor] = {
        n: p for prefix, root in roots for n, p in root.named_parameters(prefix=prefix) if p.requires_grad
    }
    state = State(modules, cache.replicas.device)
    watching = nullcontext() if isinstance(cache.model, nn.Module) else state.watching()
    with _synced(accelerator), state.kept(), watching:
        return compare(Steps(cache, state, trained, chunks, loss_kwargs), chunk_size, tolerance)


@contextmanager
def _synced(accelerator: Accelerator | None) -> Iterator[None]:
    """A block in which a step reduces over ranks, wherever accumulation of batches stands."""
    if accelerator is None:
        yield
        return
    outer = accelerator.sync_gradients
    accelerator.gradient_state._set_sync_gradients(True)
    try:
        yield
    finally:
        accelerator.gradient_state._set_sync_gradients(outer)
