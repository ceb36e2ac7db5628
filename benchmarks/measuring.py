"""How the benchmarks measure: time in interleaved rounds, peak memory, gradient error, forward passes."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from benchmarks.clips import Batch
from gc_accel.memory.meters import LiveBytes

Loss = Callable[..., Tensor]
# Keep what was freed, as the allocator of an accelerator does. By default glibc gives large blocks back at once and
# pays for every page when it gets them again: a trial had forward passes that were 1.2 to 1.35 times slower.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


def settle() -> None:
    """Start this program anew with KEEP_MEMORY, unless it has it; then one thread, and the same draws each time."""
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.environ.update(KEEP_MEMORY)
        os.execv(sys.executable, sys.orig_argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def times(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each contender in each round, in which all take turns.

    Each of them should have been called before, so that nothing is done for the first time.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.thread_time()
            step()
            found[name].append(time.thread_time() - begin)
    return found


def ratios(found: Mapping[str, list[float]], name: str, to: str) -> list[float]:
    """The time of one contender over that of another, within each round."""
    return [a / b for a, b in zip(found[name], found[to], strict=True)]


def ratio(found: Mapping[str, list[float]], name: str, to: str) -> float:
    """Their median."""
    return median(ratios(found, name, to))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def peak(step: Callable[[], Any], encoder: nn.Module, batch: Batch) -> float:
    """MiB of tensors alive at most in a step from no gradients on, besides weights and batch."""
    encoder.zero_grad()
    with LiveBytes([*encoder.parameters(), *encoder.buffers(), *batch.values()]) as live:
        step()
    return live.peak / 2**20


def gradients(encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """The gradient of the towers, in one vector, and that of the logit scale."""
    named = {
        name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.requires_grad
    }
    scale = named.pop("model.logit_scale")
    assert scale is not None
    return torch.cat([grad.flatten() for grad in named.values() if grad is not None]), scale.clone()


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference of two gradients over that of the second."""
    return float((found - expected).norm() / expected.norm())


@contextmanager
def called(encoder: nn.Module, hook: Callable[[dict[str, Batch]], None]) -> Any:
    """A block in which a function sees the inputs of every call of the encoder, by stream."""
    handle: RemovableHandle = encoder.register_forward_pre_hook(
        lambda module, args, inputs: hook(inputs), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


class Forwards:
    """Samples and tokens that each tower encodes; tokens are counted with their padding."""

    def __init__(self) -> None:
        self.samples, self.tokens = Counter[str](), 0

    def __call__(self, inputs: dict[str, Batch]) -> None:
        for name, part in inputs.items():
            self.samples[name] += len(next(iter(part.values())))
            self.tokens += part["input_ids"].numel() if "input_ids" in part else 0


class FirstPass:
    """Calls of the encoder up to where each tower has seen the whole batch once, with their random states.

    The loss of the batch as those calls saw it, in one graph, is what a cached step has to have the gradient of,
    with its own dropout masks too.

    Args:
        batch: of which the calls get views.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch, self.size = batch, len(next(iter(batch.values())))
        self.seen = Counter[str]()
        self.calls: list[tuple[Tensor, dict[str, Batch]]] = []

    def __call__(self, inputs: dict[str, Batch]) -> None:
        if any(self.seen[name] < self.size for name in inputs):
            self.calls.append((torch.get_rng_state(), inputs))
            self.seen.update({name: len(next(iter(part.values()))) for name, part in inputs.items()})

    def gradients(self, encoder: nn.Module, loss: Loss) -> tuple[Tensor, Tensor]:
        """Those of the reference."""
        encoder.zero_grad()
        rows: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in self.seen}
        for state, inputs in self.calls:
            torch.set_rng_state(state)
            outputs = encoder(**inputs)
            for name, part in inputs.items():
                rows[name].append((self._first_row(part), outputs[name]))
        reps = {name: torch.cat([rep for _, rep in sorted(parts, key=_row)]) for name, parts in rows.items()}
        loss(**reps, logit_scale=outputs["logit_scale"]).backward()
        return gradients(encoder)

    def _first_row(self, part: Batch) -> int:
        key, view = next(iter(part.items()))
        return int(view.storage_offset()) // self.batch[key].stride(0)


def gradient_errors(
    step: Callable[[], Any], encoder: nn.Module, batch: Batch, loss: Loss
) -> tuple[float, float]:
    """Errors of a step's gradients, of towers and logit scale, against the reference of its own first pass."""
    encoder.zero_grad()
    first = FirstPass(batch)
    with called(encoder, first):
        step()
    found = gradients(encoder)
    expected = first.gradients(encoder, loss)
    encoder.zero_grad()
    towers, scale = (error(a, b) for a, b in zip(found, expected, strict=True))
    return towers, scale


def percent(share: float) -> str:
    """With the sign that it has."""
    return f"{100 * share:.1f} %"


def scientific(value: float) -> str:
    """One digit, as an error needs it; above a thousandth as a plain number."""
    return f"{value:.2g}" if value == 0 or value > 1e-3 else f"{value:.0e}"


def print_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    """As markdown, each row as soon as it is there."""
    columns = [str(each) for each in header]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(flush=True)


def _row(part: tuple[int, Tensor]) -> int:
    return part[0]
