"""BatchNorm under a gradient cache: what to do about statistics that every chunk has of its own.

    error    refuse layers in training mode: chunk statistics are not those of the batch
    frozen   normalise by the running statistics, which stay as they are; scale and shift still train
    ghost    each chunk by its own statistics (Hoffer et al. 2017, arXiv 1705.08741)

"frozen" is exact. "ghost" equals the chunked reference, the same chunks in one graph, and not the full batch;
its running statistics move in the first pass alone, as if every chunk had been encoded once. The statistics
of the full batch are out of reach for a layer of the backbone, as no chunk can be encoded before all have
been; a head may have them, after the cut (`FullBatchHead`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Policy = Literal["error", "frozen", "ghost"]


class BatchNorms:
    """The BatchNorm layers of an encoder under a policy.

    Args:
        encoder: not wrapped; of a function the modules are met when it calls them.
        policy: what to do about the layers.

    Raises:
        ValueError: there is no such policy.
    """

    def __init__(self, encoder: Callable[..., Any], policy: Policy) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"expected a BatchNorm policy of {get_args(Policy)}, got {policy!r}")
        self.encoder, self.policy = encoder, policy
        self.tracking = list[_BatchNorm]()  # those that move running statistics in this step

    def begin_step(self) -> None:
        """Freeze the layers, or refuse those that would see chunks for batches.

        Raises:
            ValueError: a layer is in training mode, or has no running statistics to be frozen at.
        """
        self.tracking = []  # another list, as a second pass may still be to come
        if isinstance(self.encoder, nn.Module):
            self.meet(self.encoder)

    def meet(self, module: nn.Module) -> None:
        """Likewise for the layers of one module, before it is called."""
        layers = dict(_layers(module))
        if self.policy == "ghost":
            moving = (each for each in layers.values() if each.training and each.track_running_stats)
            self.tracking += [each for each in moving if each not in self.tracking]
            return
        if self.policy == "frozen":
            for layer in layers.values():
                layer.eval()
        if names := [name for name, each in layers.items() if each.training or each.running_mean is None]:
            raise ValueError(
                f"expected no BatchNorm in training mode, got {names}: each chunk would have statistics of its own. "
                "Freeze it (batch_norm='frozen', or eval mode), accept them (batch_norm='ghost'), or use GroupNorm"
            )

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Normalise as in the first pass, without moving the running statistics again."""
        for layer in self.tracking:
            layer.track_running_stats = False
        try:
            yield
        finally:
            for layer in self.tracking:
                layer.track_running_stats = True


def _layers(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """All but those that see the whole batch."""
    after_cut = tuple(f"{name}." for name in getattr(module, "after_cut", ()))
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and not name.startswith(after_cut):
            yield name, layer
