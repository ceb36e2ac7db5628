"""What the compatibility classes refuse, where the published ones went on in silence or failed later."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from gc_accel.inputs.nested import Inputs

Model = Callable[..., Any]


def check_chunk_sizes(chunk_sizes: Sequence[int], models: Sequence[Model]) -> None:
    """Raise ValueError unless there is a chunk size for each model."""
    if len(chunk_sizes) != len(models) or min(chunk_sizes, default=0) < 1:
        raise ValueError(
            f"expected a chunk size of at least 1 for each of {len(models)} models, got {list(chunk_sizes)}"
        )


def check_scaler(fp16: bool, scaler: GradScaler | None) -> None:
    """Raise ValueError for float16 without a scaler: small gradients would become zero."""
    if fp16 and scaler is None:
        raise ValueError("expected a scaler with fp16=True, got None: pass torch.amp.GradScaler()")


def check_models(models: Sequence[Model], model_inputs: Sequence[Inputs], no_sync_except_last: bool) -> None:
    """Raise ValueError for inputs of other models than these, and for a model that no rank would reduce."""
    if len(model_inputs) != len(models):
        raise ValueError(f"expected inputs of each of {len(models)} models, got {len(model_inputs)}")
    wrapped = [is_wrapped(model) for model in models]
    if no_sync_except_last and not any(wrapped):
        raise ValueError(
            "expected models in DistributedDataParallel with no_sync_except_last=True, got none: wrap them, or "
            "leave it out"
        )
    alone = [i for i, model in enumerate(models) if not wrapped[i] and trains(model)]
    if any(wrapped) and alone:
        raise ValueError(
            f"expected all models that train in DistributedDataParallel, got those at {alone} without: their "
            "gradients would never be reduced over ranks"
        )


def check_splittable(model_input: Inputs) -> None:
    """Raise ValueError for inputs that nothing is known about: they need a `split_input_fn`."""
    if not _is_splittable(model_input):
        raise ValueError(
            "expected a tensor, a list of tensors, a mapping, or a tuple of such a list and a mapping, got "
            f"{type(model_input).__name__}: give a split_input_fn"
        )


def check_loss(loss: Tensor) -> None:
    """Raise ValueError unless the loss is a number that depends on the representations."""
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"expected a scalar loss of the representations, got {loss}")


def check_cache(gradients: Sequence[Tensor | None], models: Sequence[Model]) -> None:
    """Raise ValueError for a model that trains and whose representations the loss has ignored."""
    each = zip(gradients, models, strict=True)
    if ignored := [i for i, (gradient, model) in enumerate(each) if gradient is None and trains(model)]:
        raise ValueError(
            f"expected a loss that uses the representations of every model that trains, got one that ignores "
            f"those at {ignored}: use them, freeze the models, or leave them out"
        )


def check_paired(*sequences: Sequence[Any]) -> None:
    """Raise ValueError unless there are a gradient and a random state for each chunk."""
    lengths = [len(sequence) for sequence in sequences]
    if len(set(lengths)) > 1:
        raise ValueError(
            "expected as many chunks as pieces of the gradient and random states, got {}, {} and {}: all chunks "
            "but the last must have chunk_size samples, each with one representation".format(*lengths)
        )


def check_rows(rep: Tensor, gradient: Tensor) -> None:
    """Raise ValueError unless a chunk's representation has the shape of its gradient."""
    if rep.shape != gradient.shape:
        raise ValueError(
            f"expected a representation of shape {tuple(gradient.shape)}, got {tuple(rep.shape)}: all chunks but "
            "the last must have chunk_size samples, each with one representation"
        )


def is_wrapped(model: Model) -> bool:
    """Whether DistributedDataParallel reduces the gradients of a model."""
    return isinstance(model, DistributedDataParallel)


def trains(model: Model) -> bool:
    """Whether a model has parameters that train, as anything but a module is taken to have."""
    return not isinstance(model, nn.Module) or any(p.requires_grad for p in model.parameters())


def _is_splittable(model_input: Inputs) -> bool:
    if isinstance(model_input, list):
        return all(isinstance(each, Tensor) for each in model_input)
    if isinstance(model_input, tuple):
        is_pair = len(model_input) == 2 and isinstance(model_input[0], list)
        return is_pair and isinstance(model_input[1], Mapping) and _is_splittable(model_input[0])
    return isinstance(model_input, (Tensor, Mapping))
