"""Tiny models of every supported kind, built from configs in float64, and batches for them."""

import open_clip
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from gc_accel import DualEncoder

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGE = {**TOWER, "image_size": 8, "patch_size": 4}
TEXT = {**TOWER, "vocab_size": 32, "max_position_embeddings": 8}
END = 31  # HF CLIP pools at the end token
ENDS = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}


def clip(dropout: float = 0.0) -> nn.Module:
    config = CLIPConfig(
        vision_config={**IMAGE, "attention_dropout": dropout},
        text_config={
            **TEXT,
            "attention_dropout": dropout,
            "eos_token_id": END,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        projection_dim=8,
    )
    return CLIPModel(config)


def siglip(dropout: float = 0.0, **text: int) -> nn.Module:
    model = SiglipModel(
        SiglipConfig(
            vision_config={**IMAGE, "attention_dropout": dropout},
            text_config={**TEXT, "vocab_size": 64, "attention_dropout": dropout, "projection_size": 16}
            | ENDS
            | text,
        )
    )
    model.logit_scale.data.fill_(2.3)  # from_config leaves zeros, at which scale and gradient degenerate
    model.logit_bias.data.fill_(-3.0)
    return model


def vision_text(dropout: float = 0.0) -> nn.Module:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return VisionTextDualEncoderModel(
        vision_model=ViTModel(ViTConfig(**IMAGE, **rates)),
        text_model=BertModel(BertConfig(**TEXT, **rates)),
    )


def open_clip_vit(dropout: float = 0.0) -> nn.Module:
    return open_clip.CLIP(
        embed_dim=8,
        vision_cfg={
            "image_size": 8,
            "patch_size": 4,
            "width": 16,
            "layers": 1,
            "head_width": 8,
            "patch_dropout": dropout,
        },
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    )


def open_clip_siglip(dropout: float = 0.0) -> nn.Module:
    return open_clip.CustomTextCLIP(
        embed_dim=8,
        vision_cfg={
            "image_size": 8,
            "patch_size": 4,
            "width": 16,
            "layers": 1,
            "head_width": 8,
            "patch_dropout": dropout,
        },
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
        init_logit_bias=-3.0,
    )


MODELS = {
    "clip": clip,
    "siglip": siglip,
    "vision_text": vision_text,
    "open_clip": open_clip_vit,
    "open_clip_siglip": open_clip_siglip,
}


def dual_encoder(kind: str, *, dropout: float = 0.0, freeze: tuple = ()) -> DualEncoder:
    torch.manual_seed(1)
    return DualEncoder(MODELS[kind](dropout).train(), freeze=freeze).double()


def image_text_batch(size: int, *, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, END, (size, 8), generator=generator)
    ids[:, -1] = END
    return {
        "pixel_values": torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator),
        "input_ids": ids,
    }
