"""Gradient caching by hand: decorators for loops that collect small batches into a large one.

    reps, again = cached(encode)(model, chunk)      for every chunk: first pass, without a graph
    loss = cat_input_tensor(loss_fn)([reps, ...])   all chunks at once; then loss.backward()
    again(reps)                                     for every chunk: second pass, with its cached gradient

The names, arguments and order are those of the GradCache package (Gao et al. 2021, arXiv 2101.06983). Each call
is one call of `encode` (`gc_accel/engine/encoding.py`), so the random draws of the CPU and of the device are replayed.

Under DistributedDataParallel call all but the last `again` inside `no_sync()`, and hand W times the loss of the
global batch to `backward`, because the mean over W ranks is where the chain rule wants the sum: the rule stands
in `gc_accel/distributed/replicas.py`, and here no engine applies it.
"""

from collections.abc import Callable
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gc_accel.distributed import RankedBatch
from gc_accel.engine.encoding import encode
from gc_accel.inputs.walk import flatten
from gc_accel.state.rng import CPU, device_in_use


def cached(func: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Make a model call return its representations as leaves, and a closure that pushes their gradient back.

    The device whose random state is replayed is the accelerator of the arguments (tensors, modules and
    containers of them), or the current CUDA device; a model that draws on several is not supported.

    Args:
        func: any function that returns a tensor or a sequence of tensors, all in float32 or float64 afterwards.

    Returns:
        A function with the arguments of `func`. It returns a leaf for each representation and, last, a closure
        to be called with these leaves (as one tuple, if there are several) once they have their gradient.

    Raises:
        ValueError: for outputs that are not tensors, or on a device whose random state was not noted; by the
            closure, for other leaves than those it came with, or leaves without a gradient.

    Example:
        >>> rep, again = cached(model)(chunk)
        >>> loss_fn(rep).backward()
        >>> again(rep)
    """

    @wraps(func)
    def first_pass(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        device = _device(func, args, kwargs)
        outputs, replay, *_ = encode(partial(_tensors, func, *args, **kwargs), {}, device=device)
        strangers = {str(out.device) for out in outputs.values() if out.device not in (device, CPU)}
        if strangers:
            raise ValueError(
                f"expected representations on {device}, whose random state is replayed, got {sorted(strangers)}: "
                "pass the model or a tensor of that device as an argument"
            )

        @wraps(func)
        def second_pass(reps: Tensor | tuple[Tensor, ...]) -> None:
            leaves = (reps,) if isinstance(reps, Tensor) else tuple(reps)
            _check_leaves(leaves, tuple(outputs.values()))
            pairs = list(zip(replay().values(), leaves, strict=True))
            trained = [(out, leaf.grad) for out, leaf in pairs if out.requires_grad]
            if trained:  # a frozen model has nothing to push into
                torch.autograd.backward([out for out, _ in trained], [grad for _, grad in trained])

        return *outputs.values(), second_pass

    return first_pass


def cat_input_tensor(func: Callable[..., Any]) -> Callable[..., Any]:
    """Let a loss take lists of tensors, by position or keyword, each joined along its first dimension.

    Anything else, an empty list too, goes through as it is.
    """

    def joined(value: Any) -> Any:
        is_list = isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value)
        return torch.cat(value) if is_list else value

    return _on_inputs(func, joined)


def gather_input_tensor(func: Callable[..., Any], axis: int = 0) -> Callable[..., Any]:
    """Let a loss take the tensors of one rank, by position or keyword, and see those of all ranks.

    Every rank then computes the whole loss, and its gradient reaches the rank's own rows alone: together they are
    the gradient of the loss of the global batch, so multiply it by the world size under DistributedDataParallel.
    Ranks may differ in length along `axis`. 0-d tensors and anything else go through as they are, and so does
    everything in a single process.

    Args:
        func: a loss.
        axis: dimension along which the ranks' tensors are joined, in rank order.
    """

    def gathered(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        rows = value.movedim(axis, 0).contiguous()
        batch = RankedBatch(len(rows), rows.device)
        everyone = batch.gather(rows.detach())
        joined = torch.cat([everyone[: batch.own.start], rows, everyone[batch.own.stop :]])
        return joined.movedim(0, axis)

    return _on_inputs(func, gathered)


def _on_inputs(func: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    @wraps(func)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return func(*map(change, args), **{name: change(value) for name, value in kwargs.items()})

    return changed


def _tensors(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    outputs = func(*args, **kwargs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    if others := [type(out).__name__ for out in outputs if not isinstance(out, Tensor)]:
        raise ValueError(
            f"expected a tensor or a sequence of tensors, got {others}: return what the loss takes, such as "
            "`model(**inputs).pooler_output`"
        )
    return outputs


def _check_leaves(leaves: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    shapes, wanted = [tuple(leaf.shape) for leaf in leaves], [tuple(leaf.shape) for leaf in expected]
    if shapes != wanted:
        raise ValueError(
            f"expected representations of shapes {wanted}, got {shapes}: give each closure its own leaves"
        )
    if missing := [position for position, leaf in enumerate(leaves) if leaf.grad is None]:
        raise ValueError(
            f"expected a gradient in every representation, got none in {missing}: call backward on a loss that "
            "uses them first"
        )


def _device(*values: Any) -> torch.device:
    """The first accelerator that holds an argument, or the current CUDA device if CUDA is in use, or the CPU."""
    tensors = chain.from_iterable(
        value.parameters() if isinstance(value, nn.Module) else [value]
        for value in flatten(values)
        if isinstance(value, (nn.Module, Tensor))
    )
    return next((tensor.device for tensor in tensors if tensor.device != CPU), device_in_use())
