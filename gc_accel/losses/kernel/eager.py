"""Functions that compute their gradient along with their value, because that costs least.

The backward pass multiplies the gradient in place and hands it over without a copy, so that it exists once. A
second backward pass through the same graph computes it again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradient = Tensor | None
Compute = Callable[[tuple[Any, ...], tuple[bool, ...]], tuple[Tensor, tuple[Gradient, ...]]]


def with_gradients(compute: Compute, *inputs: Tensor | None) -> Tensor:
    """The value, 0-d, of a function of tensors, differentiable once.

    Args:
        compute: takes the inputs, and for each whether it needs a gradient; returns the value, 0-d, and for
            each input a gradient of its shape, or None.
        inputs: tensors of any shapes, at least one; None for one that is left out.
    """
    device = next(x.device.type for x in inputs if x is not None)
    with torch.autocast(device, enabled=False):
        return _WithGradients.apply(compute, torch.is_grad_enabled(), *inputs)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, grad_enabled: bool, *inputs: Tensor | None) -> Tensor:
        ctx.compute = compute
        ctx.needed = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[2:])
        ctx.save_for_backward(*inputs)
        value, ctx.gradients = compute(inputs, ctx.needed)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Gradient, ...]:
        inputs, gradients, ctx.gradients = ctx.saved_tensors, ctx.gradients, None
        if gradients is None:
            with torch.autocast(grad.device.type, enabled=False):
                _, gradients = ctx.compute(inputs, ctx.needed)
        return None, None, *(None if x is None else x.mul_(grad) for x in gradients)
