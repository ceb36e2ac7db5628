"""What the calls of a step cost, found by running them on tensors that have shapes but no values.

Weights and inputs are replaced by fake tensors on the device in question, so a model of any size can be run at
any chunk size, in about a second, without its memory and, made under `torch.device("meta")`, without weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode

from gc_accel.contracts import streams_of
from gc_accel.inputs.nested import Inputs, batch_size, call, named
from gc_accel.inputs.packing import Packed
from gc_accel.inputs.walk import map_samples
from gc_accel.memory.meters import LiveBytes, tensors_in
from gc_accel.state.modules import in_mode

SampleCounts = Mapping[Any, int]  # samples of each stream in one call of the encoder


@dataclass(frozen=True)
class CallCost:
    """Bytes that one call of the encoder takes, beyond weights, inputs and, but for `fresh`, gradients."""

    graph: int  # kept after a forward with a graph
    building: int  # at most, during such a forward
    backward: int  # at most, during its backward pass, where gradients are there to be added to
    fresh: int  # the same with the gradients that it makes, where none are there
    gradients: int  # of the weights that it reaches


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample, and the shape of each of its representations."""

    forward: float
    backward: float
    shapes: dict[Any, tuple[int, ...]]


class DryRun:
    """An encoder in training mode, without values.

    Args:
        model: as `GradientCache` takes it, on any device or on "meta".
        sample: a chunk as the collator gives it, of any number of samples.
        device: where the step would run.
        autocast: the dtype of mixed precision, or None.
    """

    def __init__(
        self, model: nn.Module, sample: Inputs, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        self.model, self.device, self.autocast = model, device, autocast
        self.streams = streams_of(model)
        self.parts = self.streams.split(sample)
        self.sample_bytes = sum(tensor.nbytes for tensor in tensors_in(sample)) // batch_size(sample)
        self.remembered: dict[Any, Any] = {}

    def forward(self, counts: SampleCounts) -> int:
        """Bytes of one call on so many samples of some streams, at most, without a graph."""
        return self._run(self._forward, counts)

    def cost(self, counts: SampleCounts) -> CallCost:
        """Bytes of one call with a graph, and of its backward pass."""
        return self._run(self._cost, counts)

    def work(self, stream: Any) -> Work:
        """FLOPs of a stream: those of two samples, halved."""
        return self._run(self._work, {stream: 2})

    def _run(self, measure: Callable[..., Any], counts: SampleCounts) -> Any:
        """What is measured with a fake of the encoder and its inputs, once for the same ones."""
        key = measure.__name__, *counts.items()
        if key not in self.remembered:
            self.remembered[key] = self._measured(measure, counts)
        return self.remembered[key]

    def _measured(self, measure: Callable[..., Any], counts: SampleCounts) -> Any:
        task = _Task(self.model, measure)
        with in_mode(self.model, True), FakeTensorMode(allow_non_fake_inputs=True):
            weights = {name: self._fake(tensor) for name, tensor in _tensors(task)}
            inputs = {name: self._fake_inputs(self.parts[name], count) for name, count in counts.items()}
            try:
                return torch.func.functional_call(task, weights, (inputs.get(None, inputs),))
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ValueError(
                    "expected an encoder whose steps depend on the shapes of its inputs, got one that looks at "
                    f"their values ({error.func}): it cannot be planned without running it"
                ) from error

    def _fake(self, tensor: Tensor) -> Tensor:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        return fake.requires_grad_(tensor.requires_grad)

    def _fake_inputs(self, inputs: Inputs, count: int) -> Inputs:
        """The same structure with another number of samples."""
        resized = map_samples(partial(self._fake_samples, count=count), inputs)
        return send_to_device(resized, self.device)  # the whole-batch tensors, which have no fake

    def _fake_samples(self, value: Any, count: int) -> Any:
        """A per-sample value for another number of samples."""
        if isinstance(value, Tensor):
            return torch.empty((count, *value.shape[1:]), dtype=value.dtype, device=self.device)
        if isinstance(value, Packed):
            counts = tuple(islice(cycle(value.counts), count))
            return Packed(self._fake_samples(value.rows, sum(counts)), counts)
        return list(islice(cycle(value), count))

    def _encode(self, encoder: nn.Module, inputs: Inputs) -> dict[Any, Tensor]:
        """Representations in float32, as the cache takes them."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            outputs = named(call(encoder, inputs))
        return {key: out if out.dtype == torch.float64 else out.float() for key, out in outputs.items()}

    def _forward(self, encoder: nn.Module, inputs: Inputs) -> int:
        with torch.no_grad(), LiveBytes(_known(encoder, inputs)) as live:
            self._encode(encoder, inputs)
            return live.peak

    def _cost(self, encoder: nn.Module, inputs: Inputs) -> CallCost:
        with LiveBytes(_known(encoder, inputs)) as live:
            outputs = self._encode(encoder, inputs)
            graph, building = live.now, live.peak
            live.restart()
            _push(outputs)
            fresh, gradients = live.peak, live.now
            outputs = self._encode(encoder, inputs)
            live.restart()
            _push(outputs)
            return CallCost(graph, building, live.peak - gradients, fresh, gradients)

    def _work(self, encoder: nn.Module, inputs: Inputs) -> Work:
        # Apart from the bytes: the counter's hooks keep what checkpointing frees.
        with FlopCounterMode(display=False) as counter:
            outputs = self._encode(encoder, inputs)
            forward = counter.get_total_flops()
            shapes = {k: tuple(v.shape[1:]) for k, v in outputs.items() if k not in self.streams.global_names}
            _push(outputs)
        return Work(forward / 2, (counter.get_total_flops() - forward) / 2, shapes)


class _Task(nn.Module):
    """Something to do with an encoder, as a module, whose forward can be called with other weights.

    The backward pass has to be within it: checkpointed layers look their weights up again.
    """

    def __init__(self, encoder: nn.Module, measure: Callable[..., Any]) -> None:
        super().__init__()
        self.encoder, self.measure = encoder, measure

    def forward(self, inputs: Inputs) -> Any:
        return self.measure(self.encoder, inputs)


def _push(outputs: dict[Any, Tensor]) -> None:
    """Backward from what has a graph, and let go of it."""
    reached = [output for output in outputs.values() if output.requires_grad]
    outputs.clear()
    grads = [torch.ones_like(output) for output in reached]
    if reached:
        torch.autograd.backward(reached, grads)


def _known(encoder: nn.Module, inputs: Inputs) -> Iterator[Tensor]:
    return chain(encoder.parameters(), encoder.buffers(), tensors_in(inputs))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
