"""A momentum encoder: an exponential moving average of an encoder, which nothing trains.

    theta' <- m theta' + (1 - m) theta        after every step of the optimizer

(He et al. 2020, arXiv 1911.05722, equation 2; BYOL's target network, arXiv 2006.07733, equation 1.)
"""

import copy
import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import nn

from gc_accel.distributed import world_size
from gc_accel.losses.checks import check_option

Schedule = Literal["constant", "cosine"]


class MomentumEncoder(nn.Module):
    """A copy of an encoder that follows it slowly.

    It is called as the encoder is, without a graph, and always in eval mode: the papers' have training mode for
    the batch statistics of BatchNorm alone, which under a cache would be those of a chunk. So it draws nothing.

    Args:
        encoder: before `accelerator.prepare`; is copied as it is now.
        momentum: m, from 0 to 1: 0.996 in BYOL, 0.999 in MoCo v2, 0.99 in MoCo v3. Short runs want less.
        schedule: "cosine" lets m rise to 1 over the training, as BYOL and MoCo v3 do; "constant" as MoCo v2.

    Raises:
        ValueError: for other options, for an encoder whose forward accelerate has replaced, and for one in half
            precision.

    Example:
        >>> teacher = MomentumEncoder(encoder, momentum=0.99)
        >>> cache = GradientCache(encoder, BYOLLoss(teacher=teacher), chunk_size=64)
        >>> cache.forward_backward(batch)
        >>> optimizer.step()
        >>> teacher.update(encoder, progress=step / steps)
    """

    def __init__(self, encoder: nn.Module, *, momentum: float = 0.996, schedule: Schedule = "cosine") -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"expected a momentum from 0 to 1, got {momentum}")
        check_option("schedule", schedule, Schedule)
        encoder = extract_model_from_parallel(encoder, keep_torch_compile=False)
        if "forward" in vars(encoder):  # bound to the original, so a copy would encode with its weights
            raise ValueError(
                "expected an encoder before accelerator.prepare, got one whose forward it has replaced: make the "
                "momentum encoder first"
            )
        weights = [p for p in encoder.parameters() if p.is_floating_point()]
        if half := {weight.dtype for weight in weights if torch.finfo(weight.dtype).bits < 32}:
            # Of a weight w they know steps of w/256 (bfloat16), and a step of the average is often smaller.
            raise ValueError(
                f"expected an encoder in float32, as an average stands still in half precision, got {half.pop()}: load "
                "the model in float32, and train under autocast (bf16=True) to compute in half precision"
            )
        self.momentum, self.schedule = momentum, schedule
        self.encoder: Any = copy.deepcopy(encoder).requires_grad_(False)
        self.train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the encoder returns, without a graph."""
        with torch.no_grad():
            return self.encoder(*args, **kwargs)

    def train(self, mode: bool = True) -> "MomentumEncoder":
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, encoder: nn.Module, *, progress: float = 0.0) -> None:
        """Follow the encoder by one step; once after each step of the optimizer.

        Averages of floating-point buffers are followed too, other buffers are copied; on several ranks they are
        those of rank 0 everywhere, so all ranks call this.

        Args:
            encoder: the one that was copied, prepared or not.
            progress: share of the training's steps that lay before this one, from 0 to 1, for the schedule.
        """
        encoder = extract_model_from_parallel(encoder, keep_torch_compile=False)
        share = 1 - self.momentum
        if self.schedule == "cosine":
            share *= (math.cos(math.pi * progress) + 1) / 2
        averages, sources = ([*x.parameters(), *x.buffers()] for x in (self.encoder, encoder))
        for average, source in zip(averages, sources, strict=True):
            if average.is_floating_point():
                average.lerp_(source, share)
            else:
                average.copy_(source)
        # Statistics of BatchNorm are each rank's own until DDP's next forward, which takes those of rank 0.
        for buffer in self.encoder.buffers() if world_size() > 1 else ():
            dist.broadcast(buffer, src=0)
