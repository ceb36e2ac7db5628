"""Programs written for the published GradCache packages, on tiny models in float64, and their un-cached twins."""

import importlib
import sys
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from gc_accel.compat.grad_cache import GradCache, context_managers, functional, loss
from tests.comparing import assert_equal, gradients
from tests.models import END, ENDS, IMAGE, TEXT

OURS = SimpleNamespace(
    GradCache=GradCache,
    loss=loss,
    RandContext=context_managers.RandContext,
    cached=functional.cached,
    cat_input_tensor=functional.cat_input_tensor,
    gather_input_tensor=functional.gather_input_tensor,
)


def published():
    """GradCache 0.0.1 of the registry, whose modules import one another by a name that it does not install."""
    package = importlib.import_module("gradcache")
    sys.modules["grad_cache"] = package
    for name in ("context_managers", "loss", "functional", "grad_cache"):
        sys.modules[f"grad_cache.{name}"] = importlib.import_module(f"gradcache.{name}")
    decorators = package.functional
    package.GradCache = sys.modules["grad_cache.grad_cache"].GradCache
    return SimpleNamespace(
        GradCache=package.GradCache,
        loss=package.loss,
        RandContext=package.context_managers.RandContext,
        cached=decorators.cached,
        cat_input_tensor=decorators.cat_input_tensor,
        gather_input_tensor=decorators.gather_input_tensor,
    )


PACKAGES = {"gc_accel": lambda: OURS, "published": published}


class ImageEncoder(nn.Module):
    """A CLIP vision tower with a projection head."""

    def __init__(self, dim=8):
        super().__init__()
        self.model = CLIPVisionModel(CLIPVisionConfig(**IMAGE))
        self.head = nn.Linear(16, dim, bias=False)

    def forward(self, pixel_values):
        return self.head(self.model(pixel_values).pooler_output)


class TextEncoder(nn.Module):
    """A CLIP text tower with a projection head, for captions as a dictionary."""

    def __init__(self, dim=8):
        super().__init__()
        self.model = CLIPTextModel(CLIPTextConfig(**TEXT, **ENDS))
        self.head = nn.Linear(16, dim, bias=False)

    def forward(self, input_ids, attention_mask):
        return self.head(self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


def image_text_towers():
    torch.manual_seed(5)
    return ImageEncoder().double().train(), TextEncoder().double().train()


def image_text_inputs(size=64):
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, END, (size, 8), generator=generator)
    ids[:, -1] = END
    images = torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator)
    return images, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bert(seed=7, dropout=0.0):
    torch.manual_seed(seed)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertModel(BertConfig(**TEXT, **rates)).double().train()


def tokens(size, seed, length=6):
    """What a tokenizer returns, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, END, (size, length), generator=generator)
    kept = torch.randint(2, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < kept).long()
    return BatchEncoding({"input_ids": ids * mask, "attention_mask": mask})


def pooled(output):
    return output.pooler_output


def take_gradients(*modules):
    """The gradients of some models, which have none afterwards."""
    taken = {f"{i}.{name}": grad for i, each in enumerate(modules) for name, grad in gradients(each).items()}
    for module in modules:
        module.zero_grad(set_to_none=True)
    return taken


def assert_same_step(models, got, expected):
    """Compare two steps, each a function that returns its loss and leaves gradients in the models."""
    expected_loss = expected()
    expected_loss.backward()
    wanted = take_gradients(*models)
    found_loss = got()
    torch.testing.assert_close(found_loss, expected_loss.detach(), rtol=1e-11, atol=0)
    assert not found_loss.requires_grad
    assert_equal(take_gradients(*models), wanted)
