"""An image and a text tower behind one forward: CLIP, SigLIP, VisionTextDualEncoder, open_clip."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gc_accel.encoders.checkpointing import Checkpointing
from gc_accel.encoders.pixels import PixelNorm

OPEN_CLIP_MODELS = (open_clip.CLIP, open_clip.CustomTextCLIP)
IMAGE_MODULES = ("vision_model", "visual", "visual_projection")
GLOBALS = ("logit_scale", "logit_bias")
MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5

Stream = Literal["image", "text"]


class DualEncoder(Checkpointing, nn.Module):
    """An image and a text tower in one module, each encoded by itself.

    Takes `CLIPModel`, `SiglipModel`, `VisionTextDualEncoderModel` and their like from transformers, also with
    adapters (`peft.get_peft_model`, whose checkpoints hold the adapter alone), and the models of open_clip. The
    towers keep the model's own forward code; what this class owns is the way in and out. The logit scale
    becomes a parameter of shape `(1,)` inside (sharding backends take no 0-d parameters) and gets its own
    shape back in every checkpoint.

    Args:
        model: the pretrained or fresh model, changed in place.
        image_mean: per channel, in 0..1; with `image_std` it lets uint8 images in, which are then normalised
            on the device (see `gc_accel.data.image_statistics`).
        image_std: per channel.
        freeze: towers that do not train. A tower without any trainable parameter stays in eval mode.
        model_config: `open_clip.get_model_config(name)`, so that a checkpoint of an open_clip model can be
            opened by `open_clip.create_model("local-dir:...")`.

    Example:
        >>> encoder = DualEncoder(CLIPModel.from_pretrained("openai/clip-vit-base-patch32"))
        >>> encoder(image={"pixel_values": pixels}, text=tokenizer(captions, return_tensors="pt"))
        {'image': ..., 'text': ..., 'logit_scale': ...}
    """

    streams: Mapping[str, Sequence[str]] = {
        "image": ("pixel_values", "pixel_attention_mask", "spatial_shapes", "image_embeds"),
        "text": ("input_ids", "attention_mask", "position_ids", "token_type_ids", "text_embeds"),
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        freeze: Sequence[Stream] = (),
        model_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.model_config = model_config
        self.is_open_clip = isinstance(model, OPEN_CLIP_MODELS)
        self.global_names = [name for name in GLOBALS if getattr(model, name, None) is not None]
        self.shapes = {
            n: p.shape for n, p in model.named_parameters() if n.split(".")[-1] in self.global_names
        }
        for name in self.shapes:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.reshape(1)
        if not set(freeze) <= set(self.streams):
            raise ValueError(f"expected towers to freeze among {list(self.streams)}, got {list(freeze)}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and _stream_of(name) not in freeze)
        self.normalise = PixelNorm(image_mean, image_std)
        # What model cards, DeepSpeed and FSDP's wrapping by layer read off a model of transformers.
        self.config = getattr(model, "config", None)
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self.train(model.training)

    def forward(
        self, image: Mapping[str, Tensor] | None = None, text: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Encode what is given.

        Args:
            image: `pixel_values` `(C, 3, H, W)`, normalised, or uint8; or `image_embeds` `(C, D)`, what a frozen
                tower gave before, which are handed over as they are.
            text: `input_ids` `(C, L)` and what else the text tower takes; or `text_embeds`, likewise.

        Returns:
            `image` and `text`, L2-normalised, `(C, D)`; `logit_scale` `(1,)`, the exponential of the
            parameter, and `logit_bias` `(1,)` where the model has one.
        """
        outputs = {}
        if image is not None:
            outputs["image"] = self._image_features(image)
        if text is not None:
            outputs["text"] = self._text_features(text)
        parameters = {name: getattr(self.model, name) for name in self.global_names}
        return outputs | {n: p.exp() if n == "logit_scale" else p + 0 for n, p in parameters.items()}

    @property
    def published(self) -> Any:
        return self.model

    @property
    def frozen_streams(self) -> set[str]:
        """Towers without any parameter that trains."""
        training = {_stream_of(name) for name, p in self.model.named_parameters() if p.requires_grad}
        return set(self.streams) - training

    def train(self, mode: bool = True) -> "DualEncoder":
        """Like `nn.Module.train`, but a frozen tower stays in eval mode: no dropout, no statistics."""
        super().train(mode)
        frozen = self.frozen_streams
        for name, module in self.model.named_modules():
            module.training &= _stream_of(name) not in frozen
        return self

    @torch.no_grad()
    def clamp_logit_scale(self, maximum: float = MAX_LOGIT_SCALE) -> None:
        """Keep the multiplicative logit scale at or below `maximum`; call it after each optimizer step."""
        self.model.logit_scale.clamp_(max=log(maximum))

    def save_pretrained(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the model's own kind of checkpoint, in safetensors, without a trace of this class.

        Args:
            directory: is created; `type(model).from_pretrained(directory)` reads it, for open_clip
                `create_model("local-dir:<directory>")` (with `model_config`) or `create_model(name,
                pretrained="<directory>/open_clip_model.safetensors")`.
            state_dict: of this encoder, gathered from sharded ranks; its own by default.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        weights = {name.removeprefix("model."): value for name, value in state.items()}
        weights |= {name: weights[name].reshape(shape) for name, shape in self.shapes.items()}
        if not self.is_open_clip:
            self.model.save_pretrained(directory, state_dict=weights)
            return
        save_file(
            {name: value.contiguous() for name, value in weights.items()}, directory / HF_SAFE_WEIGHTS_NAME
        )
        if self.model_config is not None:
            save_config_for_hf(self.model, directory / HF_CONFIG_NAME, dict(self.model_config))

    def load_pretrained(self, directory: str | Path) -> None:
        """Read weights that `save_pretrained` wrote into this encoder, in place."""
        if self.is_open_clip:
            weights = load_file(Path(directory) / HF_SAFE_WEIGHTS_NAME)
        elif isinstance(self.model, PreTrainedModel):
            weights = type(self.model).from_pretrained(directory).state_dict()
        else:  # a PeftModel, whose base is at hand
            self.model.load_adapter(str(directory), self.model.active_adapter, is_trainable=True)
            return
        weights |= {name: weights[name].reshape(1) for name in self.shapes}
        self.model.load_state_dict(weights)

    def tower(self, stream: str) -> dict[str, Tensor]:
        """Parameters and buffers of one tower, by name, and what normalises its images."""
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        normalise = dict(self.normalise.named_buffers(prefix="normalise")) if stream == "image" else {}
        return {name: value for name, value in tensors if _stream_of(name) == stream} | normalise

    def _image_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if "image_embeds" in inputs:
            return inputs["image_embeds"]
        pixels = self.normalise(inputs["pixel_values"])
        if self.is_open_clip:
            return self.model.encode_image(pixels, normalize=True)
        outputs = self.model.get_image_features(**{**inputs, "pixel_values": pixels})
        return F.normalize(outputs.pooler_output, dim=-1)

    def _text_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if "text_embeds" in inputs:
            return inputs["text_embeds"]
        if self.is_open_clip:
            return self.model.encode_text(inputs["input_ids"], normalize=True)
        return F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)


def _stream_of(name: str) -> str | None:
    """The tower that a parameter or module belongs to, by its name in any of the supported models."""
    parts = name.split(".")
    if not name or parts[-1] in GLOBALS:
        return None
    return "text" if set(parts).isdisjoint(IMAGE_MODULES) else "image"
