"""Functions whose gradient costs least along with their value, and is then only multiplied.

It is given away in the backward pass, not copied, so that it exists once. A second backward pass through the
same graph computes it again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradient = Tensor | None
Compute = Callable[[tuple[Any, ...], tuple[bool, ...]], tuple[Tensor, tuple[Gradient, ...]]]


def with_gradients(compute: Compute, *inputs: Tensor | None) -> Tensor:
    """A scalar function of tensors, differentiable once.

    Args:
        compute: from the inputs, and which of them need a gradient, to the value, 0-d, and the gradients.
        inputs: tensors, or None for those that are left out.
    """
    device = next(each.device.type for each in inputs if each is not None)
    with torch.autocast(device, enabled=False):
        return _WithGradients.apply(compute, torch.is_grad_enabled(), *inputs)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, wanted: bool, *inputs: Tensor | None) -> Tensor:
        ctx.compute, ctx.needed = compute, tuple(wanted and each for each in ctx.needs_input_grad[2:])
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
        return None, None, *(None if each is None else each.mul_(grad) for each in gradients)
