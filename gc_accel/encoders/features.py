"""Features of a vision backbone: one pooled vector per image, of its end and of named modules before it.

Intermediate features come from forward hooks that live for one call, so one forward gives all of them and
any model has exits, with no code per model.

Shape letters: C chunk, F features, L tokens, h and w a map's height and width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from gc_accel.encoders.backbones import hidden_state, inspecting, own_features, prefix_tokens

Pooling = Literal["cls", "mean", "pooler"]


@dataclass(frozen=True)
class Pool:
    """How one hidden state becomes one vector per image, `(C, F)`."""

    kind: Literal["cls", "mean"]
    prefix_tokens: int
    channels_last: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.ndim == 4:
            return hidden.mean((1, 2) if self.channels_last else (2, 3))
        return hidden[:, 0] if self.kind == "cls" else hidden[:, self.prefix_tokens :].mean(1)


class FeatureReader:
    """Reads the features of every exit and of the end of a backbone in one forward.

    Args:
        backbone: is run on a few black images of its native size, to see what it returns.
        pooling: "cls" (the class token), "mean" (over the patches or the map) or "pooler" (the model's own).
            None takes the model's own where there is one, else the class token, else the mean.
        exits: names of modules inside the backbone. "pooler" has no say in them: they are pooled by the
            class token where there is one, else by the mean.

    Attributes:
        widths: F of every exit and of the end.

    Raises:
        ValueError: what the backbone returns cannot be pooled that way; an exit does not exist, is not run,
            or its output is no hidden state.
    """

    def __init__(self, backbone: nn.Module, pooling: Pooling | None, exits: Sequence[str]) -> None:
        if pooling not in (None, "cls", "mean", "pooler"):
            raise ValueError(f"expected pooling 'cls', 'mean', 'pooler' or None, got {pooling!r}")
        modules = [name for name, _ in backbone.named_modules() if name]
        if unknown := [name for name in exits if name not in modules]:
            raise ValueError(f"expected exits among the modules {modules}, got {unknown}: correct the names")
        with inspecting(backbone) as images:
            self.end = _end(backbone, images, pooling)
            kind = None if pooling == "pooler" else pooling
            states = _exit_states(backbone, images, exits)
            self.exits = {name: _pool(backbone, state, images, kind) for name, state in states.items()}
            self.widths = [features.shape[1] for features in self(backbone, images)]

    def __call__(self, backbone: nn.Module, pixels: Tensor) -> list[Tensor]:
        """Images `(C, 3, H, W)` to the features `(C, F)` of every exit and, last, of the end."""
        with _watching(backbone, self.exits) as seen:
            read = own_features if self.end is None else hidden_state
            last = read(backbone, pixels)
        assert last is not None, "the constructor saw this output"
        return [*(seen[name] for name in self.exits), last if self.end is None else self.end(last)]


def _end(backbone: nn.Module, images: Tensor, pooling: Pooling | None) -> Pool | None:
    """The pooling of the last hidden state; None for the model's own."""
    if pooling in (None, "pooler") and own_features(backbone, images) is not None:
        return None
    hidden = hidden_state(backbone, images)
    if pooling == "pooler" or hidden is None:
        raise ValueError(
            f"expected a backbone whose outputs allow pooling {pooling!r}, got {type(backbone).__name__}, "
            "whose do not: choose another pooling, or pass its base model"
        )
    return _pool(backbone, hidden, images, pooling)


def _exit_states(backbone: nn.Module, images: Tensor, exits: Sequence[str]) -> dict[str, Tensor]:
    """The hidden states that named modules give for a few images."""
    with _watching(backbone, dict.fromkeys(exits, _as_it_is)) as seen:
        hidden_state(backbone, images)
    for name in exits:
        output = seen.get(name)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4) or len(output) != len(images):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"expected exit {name!r} to give a hidden state (C, L, F) or (C, F, h, w), got {found} for "
                f"{len(images)} images: name a block or a stage"
            )
    return {name: seen[name] for name in exits}


def _pool(backbone: nn.Module, hidden: Tensor, images: Tensor, kind: Literal["cls", "mean"] | None) -> Pool:
    """The pooling of states like this one; with the class token by default, where there is one."""
    prefix = prefix_tokens(backbone, hidden, images) if hidden.ndim == 3 else 0
    if kind == "cls" and not prefix:
        raise ValueError(
            f"expected pooling 'mean' or 'pooler' for {type(backbone).__name__}, whose hidden state "
            f"{tuple(hidden.shape)} has no class token, got 'cls'"
        )
    # Some models of timm keep their maps in this order, and say so.
    channels_last = str(getattr(backbone, "output_fmt", "NCHW")) == "NHWC"
    return Pool(kind or ("cls" if prefix else "mean"), prefix, channels_last)


@contextmanager
def _watching(backbone: nn.Module, pools: Mapping[str, Callable[[Any], Any]]) -> Iterator[dict[str, Any]]:
    """The pooled outputs of named modules, filled in by the forward that runs inside the context."""
    seen: dict[str, Any] = {}

    def watch(name: str, pool: Callable[[Any], Any]) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[name] = pool(_first(output))

        return backbone.get_submodule(name).register_forward_hook(keep)

    handles = [watch(name, pool) for name, pool in pools.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Any:
    """The hidden state of a module that returns more beside it."""
    return output[0] if isinstance(output, tuple) else output


def _as_it_is(hidden: Any) -> Any:
    return hidden
