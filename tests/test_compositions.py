"""What people put on top of a step, each equal to its uncached counterpart."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from gc_accel import GradientCache
from gc_accel.losses import CLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import dual_encoder, image_text_batch

SIZE, CHUNK = 7, 3


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def streams(batch):
    return {"image": {"pixel_values": batch["pixel_values"]}, "text": {"input_ids": batch["input_ids"]}}


def uncached_step(encoder, batches, *, clip=None):
    """The mean loss of some full batches in one graph each, clipping, one step."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    for batch in batches:
        (dense.clip_loss(**encoder(**streams(batch))) / len(batches)).backward()
    norm = None if clip is None else nn.utils.clip_grad_norm_(encoder.parameters(), clip)
    found = gradients(encoder)
    optimizer.step()
    return found, encoder.state_dict(), norm


def cached_step(encoder, batches, *, clip=None, retain=1):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(batches))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    encoder, optimizer = accelerator.prepare(encoder, optimizer)
    cache = GradientCache(encoder, CLIPLoss(), CHUNK, accelerator, retain=retain)
    norm, steps = None, 0
    for batch in batches:
        with accelerator.accumulate(encoder):
            cache.forward_backward(batch)
            if accelerator.sync_gradients:
                steps += 1
                if clip is not None:
                    norm = accelerator.clip_grad_norm_(encoder.parameters(), clip)
            found = gradients(encoder)
            optimizer.step()
            optimizer.zero_grad()
    assert steps == 1
    return found, encoder.state_dict(), norm


@pytest.mark.parametrize("retain", [0, 1, "all"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_accumulation_and_clipping(accumulation, clip, retain):
    batches = [image_text_batch(SIZE, seed=seed) for seed in range(accumulation)]
    expected, weights, expected_norm = uncached_step(dual_encoder("clip"), batches, clip=clip)
    found, stepped, norm = cached_step(dual_encoder("clip"), batches, clip=clip, retain=retain)
    assert_equal(found, expected)
    assert_equal(stepped, weights)
    moved = weights["model.logit_scale"] - dual_encoder("clip").state_dict()["model.logit_scale"]
    assert moved.norm() > 1e-4
    if clip is not None:
        assert expected_norm > clip, "clipping must have something to do"
        torch.testing.assert_close(norm, expected_norm, rtol=1e-9, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_a_compiled_encoder(backend):
    batch = image_text_batch(SIZE)
    expected, _, _ = uncached_step(dual_encoder("clip"), [batch])
    encoder = dual_encoder("clip")
    compiled = torch.compile(encoder, backend=backend)
    GradientCache(compiled, CLIPLoss(), CHUNK).forward_backward(batch)
    assert_equal(gradients(encoder), expected)


@pytest.mark.parametrize("retain", [0, 1, "all"])
def test_checkpointing_with_dropout_draws_the_same_masks_again(retain):
    batch, found = image_text_batch(SIZE), []
    for checkpointing in (False, True):
        encoder = dual_encoder("clip", dropout=0.3)
        if checkpointing:
            encoder.gradient_checkpointing_enable()
        torch.manual_seed(8)
        GradientCache(encoder, CLIPLoss(), CHUNK, retain=retain).forward_backward(batch)
        found.append(gradients(encoder))
    assert_equal(found[1], found[0])
    still = dual_encoder("clip")
    GradientCache(still, CLIPLoss(), CHUNK).forward_backward(batch)
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(found[0], gradients(still))
