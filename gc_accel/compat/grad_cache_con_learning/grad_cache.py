"""In place of `grad_cache_con_learning.GradCache`: one model, views of images, SimCLR, SupCon or SelfCon.

The batch is that of the original training scripts. Chunks are cut from it as it is; the pairs are made of the
representations of the whole batch, so no chunk size can pair samples that do not belong together:

    SimCLR, SupCon    (2B, ...) first views, then second views   ->  (2B, D)  ->  (B, 2, D), rows i and B + i
    SelfCon           (B, ...) images, two outputs               ->  (B, V, D), exits first, backbone last
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from gc_accel.compat import grad_cache
from gc_accel.engine.batch_norm import Policy

LossType = Literal["SupCon", "SimCLR", "SelfCon"]


class GradCache(grad_cache.GradCache):
    """Gradients of a batch of any size; the optimizer step, and unscaling before it, are the caller's.

    Args:
        model: the encoder, wrapped in DistributedDataParallel or not. Frozen parameters stay frozen.
        chunk_size: images that the model sees at once.
        loss_fn: a function of views `(B, V, D)` and labels `(B,)`, from `.losses` or `gc_accel.losses`.
        loss_type: "SupCon" (with labels), "SimCLR" (without), or "SelfCon".
        fp16: autocast model and loss to float16; needs a scaler.
        scaler: scales the loss before its backward pass, with `fp16`.
        chunk_sizes: another name of `chunk_size`.
        batch_norm: what to do about BatchNorm in training mode: "error", "frozen" or "ghost".

    Raises:
        ValueError: for arguments that are missing, given twice or unknown, fp16 without a scaler.

    Example:
        >>> cache = GradCache(model, chunk_size=64, loss_fn=SupConLoss(), loss_type="SupCon")
        >>> loss = cache(torch.cat([first_views, second_views]), labels)
    """

    def __init__(
        self,
        model: nn.Module,
        chunk_size: int | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        loss_type: LossType = "SupCon",
        fp16: bool = False,
        scaler: GradScaler | None = None,
        *,
        chunk_sizes: int | None = None,
        batch_norm: Policy = "error",
    ) -> None:
        sizes = [size for size in (chunk_size, chunk_sizes) if size is not None]
        if len(sizes) != 1 or loss_fn is None:
            raise ValueError(
                "expected a chunk_size, once, and a loss_fn, got one of them missing or given twice"
            )
        if loss_type not in get_args(LossType):
            raise ValueError(f"expected loss_type to be one of {get_args(LossType)}, got {loss_type!r}")
        super().__init__([model], sizes, loss_fn, fp16=fp16, scaler=scaler, batch_norm=batch_norm)
        self.model = model
        self.chunk_size = sizes[0]
        self.loss_type = loss_type

    def cache_step(  # type: ignore[override]
        self,
        model_input: Tensor,
        labels: Tensor | None = None,
        no_sync_except_last: bool = False,
        **loss_kwargs: Any,
    ) -> Tensor:
        """Add the gradient of the loss of one batch to the weights; under `no_grad`, only compute the loss.

        Args:
            model_input: `(2B, ...)` first views, then second views; `(B, ...)` images for SelfCon, or `(2B, ...)`
                first crops, then second crops, with the loss's `selfcon_m_FG`.
            labels: `(B,)`; SupCon needs them or a `mask`, SimCLR must not have them.
            no_sync_except_last: the model has to be in DistributedDataParallel. Such a model is reduced once per
                step, whatever is said here.
            loss_kwargs: for the loss, such as `mask` or `selfcon_s_FG`.

        Returns:
            the loss, detached, not scaled.

        Raises:
            ValueError: for labels that do not fit the type of the loss, an odd number of views, BatchNorm in
                training mode.
        """
        if self.loss_type == "SimCLR" and labels is not None:
            raise ValueError(
                'expected no labels for SimCLR, got some: leave them out, or set loss_type="SupCon"'
            )
        if self.loss_type == "SupCon" and labels is None and "mask" not in loss_kwargs:
            raise ValueError('expected labels for SupCon, got none: give them, or set loss_type="SimCLR"')
        return super().cache_step(
            model_input, labels=labels, no_sync_except_last=no_sync_except_last, **loss_kwargs
        )

    def get_reps(self, model_out: Any) -> Tensor:
        """Of SelfCon, exits and backbone as views `(C, V, D)`; else the output `(C, D)`."""
        if self.loss_type != "SelfCon":
            return model_out
        exits, backbone = model_out
        return torch.stack([*([exits] if isinstance(exits, Tensor) else exits), backbone], dim=1)

    def compute_loss(self, *reps: Tensor, labels: Tensor | None = None, **loss_kwargs: Any) -> Tensor:
        """The loss of the batch, from the representation of all rows."""
        (rows,) = reps
        if self.loss_type == "SelfCon":
            return self.loss_fn(rows, labels, **loss_kwargs)
        if len(rows) % 2:
            raise ValueError(
                f"expected two views of every image, got {len(rows)} rows: all first views, then all second ones"
            )
        return self.loss_fn(torch.stack(rows.chunk(2), dim=1), labels, **loss_kwargs)
