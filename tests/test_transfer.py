"""Chunks on their way to the device: nothing is copied on the CPU, two chunks at most are on an accelerator."""

import pytest
import torch

from gc_accel.engine.transfer import to_device


def test_the_cpu_gets_what_there_is():
    chunk = {"x": torch.randn(3, 2), "nested": [torch.randn(3), {"y": torch.ones(1)}], "flag": True}
    assert to_device(chunk, torch.device("cpu")) is chunk
    moved = to_device(chunk, torch.device("meta"))
    assert moved["nested"][1]["y"].is_meta
    assert moved["flag"] is True


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_values_are_right_and_two_chunks_are_there_at_most():
    device, size = torch.device("cuda", torch.cuda.current_device()), 4 * 2**20
    chunks = [torch.full((size,), float(number)).pin_memory() for number in range(20)]
    weight = torch.randn(1000, 1000, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before, sums = torch.cuda.memory_allocated(device), []
    for chunk in chunks:
        moved = to_device({"x": chunk}, device)["x"]
        for _ in range(10):  # something to compute while the next one travels
            weight = torch.tanh(weight @ weight)
        sums.append(moved.sum())
        del moved
    assert [float(each) for each in sums] == [number * size for number in range(20)]
    assert torch.cuda.max_memory_allocated(device) - before < 2.5 * 4 * size + 50 * 2**20
