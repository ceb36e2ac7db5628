"""LoRA towers: the gradient of the adapters is the full batch's, and their checkpoint reloads."""

import peft
import pytest
import torch
from transformers import CLIPModel

from gc_accel import DualEncoder, GradientCache
from gc_accel.losses import CLIPLoss, dense
from tests.comparing import assert_equal, gradients
from tests.models import clip, image_text_batch

SIZE = 7
# peft calls it by the name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(6)
    clip().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def with_adapter(base):
    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return DualEncoder(peft.get_peft_model(CLIPModel.from_pretrained(base), config)).double().train()


def streams(batch):
    return {"image": {"pixel_values": batch["pixel_values"]}, "text": {"input_ids": batch["input_ids"]}}


@pytest.mark.parametrize("retain", [0, 1, "all"])
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_gradients_of_adapters_equal_those_of_the_full_batch(base, chunk_size, retain):
    encoder, reference, batch = with_adapter(base), with_adapter(base), image_text_batch(SIZE)
    dense.clip_loss(**reference(**streams(batch))).backward()
    expected = gradients(reference)
    trained = {name for name, grad in expected.items() if grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    assert any("vision_model" in name for name in trained)
    assert any("text_model" in name for name in trained)
    GradientCache(encoder, CLIPLoss(), chunk_size, retain=retain).forward_backward(batch)
    assert_equal(gradients(encoder), expected)
    assert {name for name, grad in gradients(encoder).items() if grad is not None} == trained


def test_the_checkpoint_is_the_adapter_and_reloads_to_equal_embeddings(base, tmp_path):
    encoder, batch = with_adapter(base), streams(image_text_batch(SIZE))
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    GradientCache(encoder, CLIPLoss(), 3).forward_backward(image_text_batch(SIZE))
    optimizer.step()
    encoder.save_pretrained(tmp_path / "adapter")
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in written
    assert "model.safetensors" not in written

    encoder.eval()
    expected = encoder(**batch)
    published = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(base), tmp_path / "adapter")
    own = DualEncoder(published).double().eval()(**batch)
    fresh = with_adapter(base)
    before = fresh.eval()(**batch)
    fresh.load_pretrained(tmp_path / "adapter")
    for name in ("image", "text"):
        torch.testing.assert_close(own[name], expected[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(fresh(**batch)[name], expected[name], rtol=1e-6, atol=1e-6)
        assert (before[name] - expected[name]).abs().max() > 1e-3, "the step must have moved the adapter"
    assert any(p.requires_grad for p in fresh.parameters())
