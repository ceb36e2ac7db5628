"""Whether an encoder gives the same representations twice: what a gradient cache rests on."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from gc_accel.contracts import streams_of
from gc_accel.engine.encoding import encode
from gc_accel.equivalence.errors import order
from gc_accel.equivalence.state import State
from gc_accel.inputs.nested import Inputs
from gc_accel.state.repeat import difference


def representation_drift(encoder: Callable[..., Any], chunk: Inputs, device: torch.device) -> float:
    """Largest difference between the two representations that a cached step makes of a sample, relative.

    One chunk is encoded without a graph and again with one, from the same random numbers, stream by stream.
    Zero, or a few roundings, unless something in the encoder changes in between. Buffers, attributes and
    generators are left as they were found.

    Args:
        encoder: prepared or not; one that is sharded over ranks is to be called on all of them.
        chunk: nested inputs, as the encoder gets them in training, keys that feed no stream included.
        device: the one that computes.
    """
    model = encoder
    if isinstance(encoder, nn.Module):  # past DDP, which would wait for the backward pass of a forward
        model = extract_model_from_parallel(encoder, keep_torch_compile=False)
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    streams = streams_of(model)
    differences = [0.0]
    with State(modules, device, weights=False).kept():
        for name, part in streams.split(chunk).items():
            encoded = encode(model, streams.arguments(name, part), device=device)
            differences.append(float(difference(encoded.replay(), encoded.leaves)))
    return max(differences, key=order)
