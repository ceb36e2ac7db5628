"""Running a vision backbone, whoever published it.

Models differ in what they return, and that is all that is looked at here: transformers returns mappings with
a `last_hidden_state` and mostly a pooled output, timm splits its forward in `forward_features` and
`forward_head`, others, such as the visual tower of open_clip, return one tensor. A hidden state is tokens
`(C, L, F)`, patches after the class and register tokens, or a map `(C, F, h, w)`.

Shape letters: C chunk, F features, L tokens, h and w the map's height and width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModel

from gc_accel.state.modules import in_mode

TIMM_PREFIXES = ("hf-hub:", "local-dir:")  # as timm itself spells them
SIZE = 224  # pixels per side, for a model that takes any
OPTIONS = {"interpolate_pos_encoding": True}  # lets the ViTs of transformers see crops of another size


@runtime_checkable
class TimmModel(Protocol):
    """The two halves of every model of timm."""

    def forward_features(self, x: Tensor, /) -> Tensor:
        """Images to the last hidden state."""

    def forward_head(self, x: Tensor, /, pre_logits: bool) -> Tensor:
        """The last hidden state to pooled features, or, through the classifier, to logits."""


def open_backbone(name_or_path: str, **options: Any) -> tuple[nn.Module, bool]:
    """A published backbone, and whether its pooler is new, because the checkpoint brings none.

    Args:
        name_or_path: "timm/<name>", "hf-hub:..." and "local-dir:..." open a model of timm, without its
            classifier; anything else is a name or folder of transformers.
        options: go to `timm.create_model` or `AutoModel.from_pretrained`.
    """
    if name_or_path.startswith(("timm/", *TIMM_PREFIXES)):
        name = name_or_path.removeprefix("timm/")
        return timm.create_model(name, **({"pretrained": True, "num_classes": 0} | options)), False
    backbone, info = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **options)
    return backbone, any("pooler" in key for key in info["missing_keys"])


def own_features(backbone: nn.Module, pixels: Tensor) -> Tensor | None:
    """What the backbone itself pools from images, `(C, F)`; None if it does not."""
    if isinstance(backbone, TimmModel):
        own = backbone.forward_head(backbone.forward_features(pixels), pre_logits=True)
        return own if own.ndim == 2 else None
    outputs = _call(backbone, pixels)
    pooled = outputs.get("image_embeds", outputs.get("pooler_output"))
    return None if pooled is None else pooled.flatten(1)  # of a ResNet it is (C, F, 1, 1)


def hidden_state(backbone: nn.Module, pixels: Tensor) -> Tensor | None:
    """The last hidden state, `(C, L, F)` or `(C, F, h, w)`; None if the backbone keeps it to itself."""
    if isinstance(backbone, TimmModel):
        return backbone.forward_features(pixels)
    return _call(backbone, pixels).get("last_hidden_state")


def prefix_tokens(backbone: nn.Module, hidden: Tensor, pixels: Tensor) -> int:
    """Class and register tokens: what there is beside one token per patch; 0 where that is unknown."""
    if isinstance(backbone, TimmModel):
        return getattr(backbone, "num_prefix_tokens", 0)
    patch = getattr(getattr(backbone, "config", backbone), "patch_size", None)
    if patch is None or hidden.ndim != 3:
        return 0
    height, width = _pair(patch)
    return max(0, hidden.shape[1] - (pixels.shape[2] // height) * (pixels.shape[3] // width))


@contextmanager
def inspecting(backbone: nn.Module, count: int = 3) -> Iterator[Tensor]:
    """Black images of the backbone's native size, to be run on it without a graph, in eval mode.

    Raises:
        ValueError: the model's main input is something else than images.
    """
    main_input = getattr(backbone, "main_input_name", "pixel_values")
    if main_input != "pixel_values":
        raise ValueError(
            f"expected a vision backbone, got {type(backbone).__name__}, whose main input is {main_input!r}: "
            "pass its vision tower"
        )
    weight = next(backbone.parameters())
    height, width = _native_size(backbone)
    with in_mode(backbone, training=False), torch.no_grad():
        yield torch.zeros(count, 3, height, width, dtype=weight.dtype, device=weight.device)


def _call(backbone: nn.Module, pixels: Tensor) -> Mapping[str, Tensor]:
    """The outputs as transformers names them."""
    options = {key: OPTIONS[key] for key in OPTIONS if key in signature(backbone.forward).parameters}
    outputs = backbone(pixels, **options)
    if isinstance(outputs, Tensor):
        return {"pooler_output" if outputs.ndim == 2 else "last_hidden_state": outputs}
    if isinstance(outputs, Mapping):
        return outputs
    raise ValueError(
        f"expected a backbone that returns a tensor or a mapping, got {type(outputs).__name__} from "
        f"{type(backbone).__name__}: switch its further outputs off"
    )


def _native_size(backbone: nn.Module) -> tuple[int, int]:
    """Height and width from transformers' config, timm's patch embedding or open_clip's tower."""
    owners = (getattr(backbone, "config", backbone), getattr(backbone, "patch_embed", None))
    sizes = (getattr(owners[0], "image_size", None), getattr(owners[1], "img_size", None))
    return _pair(next((size for size in sizes if size is not None), SIZE))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
