"""A projection head on the full batch, after the cut: exact for heads with BatchNorm.

A head inside of the encoder sees chunks, and its BatchNorm their statistics. Behind the cut it sees the
features of the whole global batch, gathered from all ranks:

    chunks --encoder--> features | cut | --gather, head--> representations --> loss

Its parameters are globals: leaves of the loss like the features, whose cached gradients are pushed through
the encoder with the first chunk. On W ranks each runs the head on all B features, a cost that is small beside
the encoder's, and hands its own rows on to the loss.

Shape letters: B batch, C chunk, F features, D dim.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from gc_accel.distributed import GlobalLoss, RankedBatch
from gc_accel.losses.stateful.accumulated import StatefulLoss

HEADS = "heads"


class FullBatchHead(nn.Module):
    """An encoder whose heads run on the full batch.

    Args:
        encoder: returns a mapping of features, such as `VisionEncoder(backbone, head="none",
            normalize=False)`.
        heads: by the name of the features that it takes, `(N, F)` to `(N, D)`; further dimensions between
            batch and features, such as views, count as rows of their own.

    In training mode the forward pass returns features; the heads run in `loss(...)`. In eval mode, in which
    BatchNorm does not look at the batch, they run in the forward pass as usual.

    Example:
        >>> head = nn.Sequential(nn.Linear(384, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128))
        >>> encoder = FullBatchHead(features, {"views": head})
        >>> cache = GradientCache(encoder, encoder.loss(BarlowTwinsLoss()), chunk_size=64)
    """

    after_cut = (HEADS,)

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.heads = nn.ModuleDict(dict(heads))

    @property
    def streams(self) -> Mapping[str, Sequence[str]]:
        return self.encoder.streams

    @property
    def frozen_streams(self) -> set[str]:
        return set(self.encoder.frozen_streams)

    @property
    def global_names(self) -> Sequence[str]:
        """Globals of the encoder, and in training mode the parameters of the heads."""
        own = [name for name, _ in self._head_parameters()] if self.training else []
        return (*self.encoder.global_names, *own)

    def forward(self, **streams: Any) -> dict[str, Tensor]:
        """As the encoder: features and the heads' parameters, or in eval mode representations."""
        outputs = dict(self.encoder(**streams))
        if self.training:
            # Clones, so that a reducer finds the parameters in the graph of the outputs.
            return outputs | {name: parameter.clone() for name, parameter in self._head_parameters()}
        present = {name: head for name, head in self.heads.items() if name in outputs}
        return outputs | {name: _on_rows(head, outputs[name]) for name, head in present.items()}

    def loss(
        self, loss_fn: Callable[..., Tensor], *, process_group: dist.ProcessGroup | None = None
    ) -> "LossBehindHeads":
        """The loss of what the heads make of the features.

        Raises:
            ValueError: for a loss with a queue or a momentum encoder, which nobody would move.
        """
        if isinstance(loss_fn, StatefulLoss) and loss_fn.state_dict():
            raise ValueError(
                f"expected a loss without a state behind heads, got {type(loss_fn).__name__}: give the encoder a head "
                "of its own, without BatchNorm"
            )
        return LossBehindHeads(self.heads, loss_fn, process_group)

    def _head_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{HEADS}.{name}", value) for name, value in self.heads.named_parameters()]


class LossBehindHeads(GlobalLoss):
    """A loss of features: heads on the global batch, then the loss on the rows of this rank.

    Args:
        heads: by the name of the features.
        loss_fn: on several ranks a `GlobalLoss`.
        process_group: ranks whose batches make up the global batch; None is the default group.

    Raises:
        ValueError: on a call, for several ranks and a loss that is no `GlobalLoss`.
    """

    def __init__(
        self,
        heads: nn.ModuleDict,
        loss_fn: Callable[..., Tensor],
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.heads = [heads]  # in a list: the encoder owns them
        self.loss_fn = loss_fn
        self.process_group = process_group

    def forward(self, **inputs: Any) -> Tensor:
        """The loss of the global batch, 0-d, of features `(B, ..., F)`, globals and what else the loss takes."""
        parameters = {name: inputs.pop(name) for name in list(inputs) if name.startswith(f"{HEADS}.")}
        for name, head in self.heads[0].items() if parameters else ():
            prefix = f"{HEADS}.{name}."
            own = {key.removeprefix(prefix): v for key, v in parameters.items() if key.startswith(prefix)}
            batch = RankedBatch(len(inputs[name]), inputs[name].device, self.process_group)
            if len(batch.sizes) > 1 and not isinstance(self.loss_fn, GlobalLoss):
                raise ValueError(
                    f"expected a GlobalLoss behind heads on several ranks, got {self.loss_fn}: derive it from "
                    "gc_accel.distributed.GlobalLoss"
                )
            features = batch.gather(inputs[name])
            inputs[name] = _on_rows(partial(functional_call, head, own), features)[batch.own]
        return self.loss_fn(**inputs)


def _on_rows(head: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Apply a head to `(..., F)` as to rows `(N, F)`."""
    return head(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
