"""In place of `grad_cache.GradCache`: any number of models, each with its inputs, one representation each.

A schedule over `encode` (`gc_accel/engine/encoding.py`), cut into the methods that subclasses override:

    cache_step
        split_inputs                    of each model
        forward_no_grad                 of each model; of each chunk: get_input_tensors, model_call, get_reps
        build_cache, compute_loss       the gradient of every representation
        forward_backward                of each model; of each chunk: model_call, get_reps, in its random state

The last chunk of the last model keeps the graph of its first pass and is pushed first, which costs no memory and
saves a forward. Gradients are added up on each rank and reduced at the end, once per model. What reaches over ranks is
the loss: a `GlobalLoss` gets the factor of the scaling rule (`gc_accel/distributed/replicas.py`) here, any other
brings it, as it always had to.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from gc_accel.compat import checks
from gc_accel.compat.checks import Model
from gc_accel.compat.grad_cache.context_managers import RandContext
from gc_accel.distributed import GlobalLoss, Replicas
from gc_accel.engine.batch_norm import BatchNorms, Policy
from gc_accel.engine.encoding import Encoded, encode
from gc_accel.inputs.nested import Inputs, call, split
from gc_accel.state.modules import meeting


class GradCache:
    """Gradients of a batch of any size; the optimizer step, and unscaling before it, are the caller's.

    Args:
        models: encoders, wrapped in DistributedDataParallel or not; one that is tied is listed twice.
        chunk_sizes: samples that a model sees at once, for all models or for each.
        loss_fn: a function of one representation per model and of the keyword arguments of a step.
        split_input_fn: `(model_input, chunk_size) -> list of chunks`, for inputs that `split_inputs` refuses.
        get_rep_fn: what makes the representation `(C, ...)` of that which a model returned.
        fp16: autocast models and loss to float16; needs a scaler.
        scaler: scales the loss before its backward pass, with `fp16`.
        batch_norm: what to do about BatchNorm in training mode: "error", "frozen" or "ghost".

    Raises:
        ValueError: for chunk sizes that do not fit the models, fp16 without a scaler, an unknown policy.

    Example:
        >>> cache = GradCache([query_tower, passage_tower], [64, 8], SimpleContrastiveLoss(n_hard_negatives=7))
        >>> loss = cache(queries, passages)
    """

    def __init__(
        self,
        models: Sequence[Model],
        chunk_sizes: int | Sequence[int],
        loss_fn: Callable[..., Tensor],
        split_input_fn: Callable[[Any, int], Sequence[Any]] | None = None,
        get_rep_fn: Callable[[Any], Tensor] | None = None,
        fp16: bool = False,
        scaler: GradScaler | None = None,
        *,
        batch_norm: Policy = "error",
    ) -> None:
        self.models = models
        self.chunk_sizes = [chunk_sizes] * len(models) if isinstance(chunk_sizes, int) else list(chunk_sizes)
        checks.check_chunk_sizes(self.chunk_sizes, models)
        checks.check_scaler(fp16, scaler)
        self.loss_fn = loss_fn
        self.split_input_fn = split_input_fn
        self.get_rep_fn = get_rep_fn
        self.fp16 = fp16
        self.scaler = scaler
        # Once, because they are slow to make: one per chunk took a fifth of a step of tiny models.
        self.replicas = {id(model): Replicas(model, None) for model in models}
        self.batch_norms = {key: BatchNorms(each.model, batch_norm) for key, each in self.replicas.items()}
        self._get_input_tensors_strict = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The same as `cache_step`."""
        return self.cache_step(*args, **kwargs)

    def cache_step(
        self, *model_inputs: Inputs, no_sync_except_last: bool = False, **loss_kwargs: Any
    ) -> Tensor:
        """Add the gradient of the loss of one batch to the weights; under `no_grad`, only compute the loss.

        Args:
            model_inputs: those of each model, in order.
            no_sync_except_last: the models have to be in DistributedDataParallel. Such models are reduced once per
                step, whatever is said here.
            loss_kwargs: for the loss. Outputs of other encoders among them get their gradient too.

        Returns:
            the loss, detached, not scaled.

        Raises:
            ValueError: for inputs that do not fit the models or differ in length, BatchNorm in training mode, a
                model that would not be reduced over ranks, a representation that the loss ignores.
        """
        checks.check_models(self.models, model_inputs, no_sync_except_last)
        for norms in self.batch_norms.values():
            norms.begin_step()
        with ExitStack() as stack:
            for replicas in self.replicas.values():
                stack.enter_context(replicas.adding_up())
            loss = self._both_passes(model_inputs, loss_kwargs)
        if torch.is_grad_enabled():
            for replicas in self.replicas.values():  # once each: a tied model is listed twice
                replicas.reduce()
        return loss

    def _both_passes(self, model_inputs: Sequence[Inputs], loss_kwargs: Mapping[str, Any]) -> Tensor:
        """A step on this rank."""
        chunked = [self.split_inputs(*each) for each in zip(model_inputs, self.chunk_sizes, strict=True)]
        last = chunked[-1][-1:] if self._keeps_graph(chunked[-1]) else []
        chunked[-1] = chunked[-1][: len(chunked[-1]) - len(last)]
        encoded = [self.forward_no_grad(*each) for each in zip(self.models, chunked, strict=True)]
        retained = [self._encode(self.models[-1], chunk, retain=True) for chunk in last]
        reps = [rep for rep, _ in encoded]
        reps[-1] = torch.cat([reps[-1], *(each.leaves[None].detach() for each in retained)])
        if not torch.is_grad_enabled():
            with self._autocast(reps[0].device):
                return self.compute_loss(*reps, **loss_kwargs)
        gradients, loss = self.build_cache(*reps, **loss_kwargs)
        checks.check_cache(gradients, self.models)
        pieces = [
            [] if gradient is None else list(gradient.split(size))
            for gradient, size in zip(gradients, self.chunk_sizes, strict=True)
        ]
        for each in retained if pieces[-1] else ():  # first, so that no second graph is alive beside it
            self._push(self.models[-1], each, pieces[-1].pop())
        for model, chunks, parts, (_, states) in zip(self.models, chunked, pieces, encoded, strict=True):
            if parts:
                with self.batch_norms[id(model)].second_pass():
                    self.forward_backward(model, chunks, parts, states, checks.is_wrapped(model))
        return loss

    def split_inputs(self, model_input: Inputs, chunk_size: int) -> Sequence[Inputs]:
        """The chunks of one model's inputs: a tensor, a list of tensors, a mapping, a tuple of such list and mapping.

        Raises:
            ValueError: for inputs of another kind without a `split_input_fn`, or that differ in length.
        """
        if self.split_input_fn is not None:
            return self.split_input_fn(model_input, chunk_size)
        checks.check_splittable(model_input)
        return list(split(model_input, chunk_size))

    def get_input_tensors(self, model_input: Inputs) -> list[Tensor]:
        """The tensors in a chunk; the random states of their devices are noted.

        Raises:
            ValueError: if `_get_input_tensors_strict`, for anything but tensors in lists, tuples and mappings.
        """
        if isinstance(model_input, Tensor):
            return [model_input]
        if isinstance(model_input, Mapping):
            model_input = list(model_input.values())
        if isinstance(model_input, (list, tuple)):
            return [tensor for each in model_input for tensor in self.get_input_tensors(each)]
        if self._get_input_tensors_strict:
            raise ValueError(
                f"expected tensors in lists, tuples and mappings, got {type(model_input).__name__}: override "
                "get_input_tensors, or leave _get_input_tensors_strict off"
            )
        return []

    def model_call(self, model: Model, model_input: Inputs) -> Any:
        """Call a model: a list by position, a mapping by keyword, a tuple of both by both, or one argument."""
        with self._autocast(self._device(model, model_input)):
            return model(*model_input) if isinstance(model_input, list) else call(model, model_input)

    def get_reps(self, model_out: Any) -> Tensor:
        """The representation `(C, ...)` in a model's output."""
        return model_out if self.get_rep_fn is None else self.get_rep_fn(model_out)

    def compute_loss(self, *reps: Tensor, **loss_kwargs: Any) -> Tensor:
        """The loss of the batch, from one representation `(B, ...)` per model."""
        return self.loss_fn(*reps, **loss_kwargs)

    def forward_no_grad(
        self, model: Model, model_inputs: Sequence[Inputs]
    ) -> tuple[Tensor, Sequence[AbstractContextManager[Any]]]:
        """First pass: the representation of all chunks `(B, ...)`, and the random states before each."""
        weights = self.replicas[id(model)].parameters
        reps, states = list[Tensor](), list[RandContext]()
        for chunk in model_inputs:
            states.append(RandContext(*self.get_input_tensors(chunk), *weights))
            reps.append(self._encode(model, chunk).leaves[None].detach())
        if not reps:
            raise ValueError("expected a batch of at least one sample, got no chunk")
        return torch.cat(reps), states

    def build_cache(self, *reps: Tensor, **loss_kwargs: Any) -> tuple[Sequence[Tensor | None], Tensor]:
        """The gradient of the loss at each representation, times the scaler's scale; the loss, detached."""
        leaves = [rep.detach().requires_grad_() for rep in reps]
        with self._autocast(reps[0].device):
            loss = self.compute_loss(*leaves, **loss_kwargs)
        checks.check_loss(loss)
        scaled = self.scaler.scale(loss) if self.fp16 and self.scaler is not None else loss
        if isinstance(self.loss_fn, GlobalLoss):
            scaled = max(self.replicas.values(), key=lambda each: each.world_size).scaled(scaled)
        scaled.sum().backward()
        return [leaf.grad for leaf in leaves], loss.detach()

    def forward_backward(
        self,
        model: Model,
        model_inputs: Sequence[Inputs],
        cached_gradients: Sequence[Tensor],
        random_states: Sequence[AbstractContextManager[Any]],
        no_sync_except_last: bool = False,
    ) -> None:
        """Second pass: each chunk again, from its random states and with a graph, and its gradient into it.

        Args:
            no_sync_except_last: add gradients up on this rank but for the last chunk. Within a step all are.

        Raises:
            ValueError: for chunks and gradients that do not pair up.
        """
        checks.check_paired(model_inputs, cached_gradients, random_states)
        chunks = list(zip(model_inputs, cached_gradients, random_states, strict=True))
        for number, (chunk, gradient, state) in enumerate(chunks, 1):
            adds_up = no_sync_except_last and number < len(chunks)
            with self.replicas[id(model)].adding_up() if adds_up else nullcontext():
                with state:
                    encoded = self._encode(model, chunk, retain=True)
                if not self._push(model, encoded, gradient):
                    return  # nothing in this model trains, so no other chunk needs a second pass either

    def _keeps_graph(self, chunks: Sequence[Inputs]) -> bool:
        """Whether the last chunk of the last model keeps its graph: not if others encode chunks or cut them."""
        passes = type(self).forward_no_grad, type(self).forward_backward
        is_ours = passes == (GradCache.forward_no_grad, GradCache.forward_backward)
        return is_ours and self.split_input_fn is None and len(chunks) > 1 and torch.is_grad_enabled()

    def _push(self, model: Model, encoded: Encoded, gradient: Tensor) -> bool:
        """Second pass of a chunk: its gradient through its graph; whether it has one."""
        rep = encoded.replay()[None]
        checks.check_rows(rep, gradient)
        if rep.requires_grad:
            self.replicas[id(model)].backward([rep], [gradient])
        return rep.requires_grad

    def _encode(self, model: Model, chunk: Inputs, retain: bool = False) -> Encoded:
        # Inside of `represent`, because the device of the inputs is the caller's business.
        def represent() -> Tensor:
            rep = self.get_reps(self.model_call(model, chunk))
            if not isinstance(rep, Tensor):
                raise ValueError(
                    f"expected a tensor as representation, got {type(rep).__name__}: give a get_rep_fn"
                )
            return rep

        is_module = isinstance(model, nn.Module)
        with nullcontext() if is_module else meeting(self.batch_norms[id(model)].meet):
            return encode(represent, {}, device=self._device(model, chunk), retain=retain)

    def _device(self, model: Model, chunk: Inputs) -> torch.device:
        if isinstance(model, nn.Module):
            return self.replicas[id(model)].device
        return next((tensor.device for tensor in self.get_input_tensors(chunk)), torch.device("cpu"))

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.float16) if self.fp16 else nullcontext()
