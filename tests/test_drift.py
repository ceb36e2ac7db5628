"""A second pass that is another function than the first is refused, whatever the cause; nothing has changed then."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from gc_accel import GradientCache
from tests.comparing import assert_equal, gradients
from tests.ranks import run_on_ranks

SIZE, CHUNK = 10, 3
GENERATOR = np.random.default_rng(0)


class Encoder(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x).tanh()))


class InPlace(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        reps = super().forward(x.clone())
        x.mul_(1.5)
        return reps


class OwnGenerator(Encoder):
    def __init__(self) -> None:
        super().__init__(self.noise)
        self.generator = torch.Generator().manual_seed(1)

    def noise(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=self.generator, dtype=x.dtype) > 0.3)


class ReusedOutput(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        reps = super().forward(x)
        if torch.is_grad_enabled():
            return reps
        if not hasattr(self, "buffer"):
            self.buffer = torch.zeros(CHUNK, 5, dtype=x.dtype)
        return self.buffer[: len(x)].copy_(reps)


class Transformer(nn.Module):
    """Whose fast path without a graph leaves out padded positions, which then hold zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(4) >= 2 + torch.arange(len(x))[:, None] % 2
        return self.layers(x[:, None].expand(-1, 4, -1), src_key_padding_mask=padding).flatten(1)


class Moving(Encoder):
    def __init__(self) -> None:
        super().__init__(self.move)
        self.register_buffer("scale", torch.ones(1))

    def move(self, x: Tensor) -> Tensor:
        self.scale = self.scale * 1.1
        return x * self.scale


def spectral() -> nn.Module:
    """Whose power iteration goes on with each forward, and has just begun."""
    encoder = Encoder()
    spectral_norm(encoder.first)
    encoder.first.parametrizations.weight[0]._v.normal_()
    return encoder


DRIFTING = {
    "an input changed in place": InPlace,
    "NumPy's generator": lambda: Encoder(lambda x: x * torch.from_numpy(GENERATOR.random(x.shape)).to(x)),
    "a generator of its own": OwnGenerator,
    "a buffer that moves": Moving,
    "spectral norm": spectral,
    "a branch on grad mode": lambda: Encoder(lambda x: x if torch.is_grad_enabled() else 1.01 * x),
    "an output buffer that is used again": ReusedOutput,
    "the fast path of a transformer": Transformer,
}
STEADY = {
    "plain": Encoder,
    "dropout": lambda: Encoder(nn.Dropout(0.5)),
    "zero representations": lambda: Encoder(lambda x: 0 * x),
}


def loss(reps: Tensor) -> Tensor:
    return (reps @ reps.T).logsumexp(1).mean()


def batch() -> Tensor:
    return torch.randn(SIZE, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("way", ["forward_backward", "cache(batch)"])
@pytest.mark.parametrize("name", DRIFTING)
def test_is_refused_and_gradients_are_put_back(name, way, accumulated):
    encoder = DRIFTING[name]().double()
    for parameter in encoder.parameters():
        parameter.grad = torch.randn_like(parameter) if accumulated else None
    before, buffers = gradients(encoder), {n: b.clone() for n, b in encoder.named_buffers()}
    cache = GradientCache(
        encoder, loss, CHUNK, retain=0
    )  # a kept graph notices inputs that are changed by itself
    with pytest.raises(ValueError, match=r"expected the same representations of chunk \d in both passes"):
        cache.forward_backward(batch()) if way == "forward_backward" else cache(batch()).backward()
    for key, grad in gradients(encoder).items():
        assert (grad is None) == (before[key] is None)
        assert grad is None or torch.equal(grad, before[key])
    for key, buffer in encoder.named_buffers():
        assert torch.equal(buffer, buffers[key]), "buffers are put back too"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("retain", [0, 1, "all"])
@pytest.mark.parametrize("name", STEADY)
def test_the_same_function_passes(name, retain, dtype):
    encoder = STEADY[name]().to(dtype)
    assert torch.isfinite(
        GradientCache(encoder, loss, CHUNK, retain=retain).forward_backward(batch().to(dtype))
    )
    assert encoder.second.bias.grad.abs().sum() > 0


def test_joined_calls_pass():
    encoder, joined = Encoder(), Encoder()
    GradientCache(encoder, loss, CHUNK).forward_backward(batch().float())
    GradientCache(joined, loss, CHUNK, retain=0, forward_chunk_size=9).forward_backward(batch().float())
    assert_equal(gradients(joined), gradients(encoder))


def test_where_all_graphs_are_kept_there_is_nothing_to_compare():
    encoder = DRIFTING["a branch on grad mode"]().double()
    GradientCache(encoder, loss, CHUNK, retain="all").forward_backward(batch())
    assert encoder.second.weight.grad.norm() > 0


@pytest.mark.parametrize("on_drift", ["warn", "ignore"])
def test_goes_on_if_told_so(on_drift, monkeypatch):
    warnings = []
    monkeypatch.setattr("gc_accel.engine.drift.logger.warning", warnings.append)
    encoder = DRIFTING["a branch on grad mode"]().double()
    GradientCache(encoder, loss, CHUNK, retain=0, on_drift=on_drift).forward_backward(batch())
    assert encoder.second.weight.grad.norm() > 0
    assert len(warnings) == (on_drift == "warn")


def test_what_is_to_be_done_is_named():
    with pytest.raises(ValueError, match=r"'error', 'warn', 'ignore'.*got 'raise'"):
        GradientCache(Encoder(), loss, CHUNK, on_drift="raise")


def on_one_rank(rank: int) -> Any:
    encoder = (
        Encoder(lambda x: x if torch.is_grad_enabled() else 1.01 * x) if rank == 1 else Encoder()
    ).double()
    model = DistributedDataParallel(encoder, find_unused_parameters=True)
    own = batch()[:4] if rank == 0 else batch()[4:]
    with pytest.raises(ValueError, match="expected the same representations") as caught:
        GradientCache(model, loss, CHUNK).forward_backward(own)
    untouched = all(parameter.grad is None for parameter in encoder.parameters())
    encoder.between = lambda x: x
    value = GradientCache(model, loss, CHUNK).forward_backward(own)  # ranks are in step again
    return str(caught.value), untouched, value, gradients(encoder)


def test_drift_on_one_rank_stops_all(tmp_path):
    encoder = Encoder().double()
    expected = loss(encoder(batch()))
    expected.backward()
    first, second = run_on_ranks(on_one_rank, 2, tmp_path)
    assert "a chunk of another rank" in first[0]
    assert "chunk 0" in second[0]
    for _, untouched, value, grads in (first, second):
        assert untouched
        torch.testing.assert_close(value, expected.detach())
        assert_equal(grads, gradients(encoder))
