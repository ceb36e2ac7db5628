"""One vision backbone behind one forward: models of transformers, timm and open_clip, with a head.

The single-encoder counterpart of `DualEncoder`, for SimCLR, SupCon and SelfCon. All views of a sample travel
in one tensor or list with the sample as its first dimension, so no way of cutting a batch can pair the views
of different samples.

Shape letters: C chunk, V views, E exits, F features, D dim of the representations, K prototypes, H, W height and
width.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from gc_accel.encoders.backbones import open_backbone
from gc_accel.encoders.checkpointing import Checkpointing
from gc_accel.encoders.features import FeatureReader, Pooling
from gc_accel.encoders.heads import Head, further_heads, projection_head
from gc_accel.encoders.pixels import PixelNorm
from gc_accel.encoders.resolutions import encode_views

CONFIG, WEIGHTS = "vision_encoder.json", "model.safetensors"
HEADS = {"heads": "head.safetensors", "further": "further.safetensors"}  # beside the backbone's file
TITLES = {"heads": "projection heads", "further": "predictor or prototypes"}
logger = logging.get_logger(__name__)


class VisionEncoder(Checkpointing, nn.Module):
    """A vision backbone with a projection head on its features.

    Args:
        backbone: a vision model of transformers (`ViTModel`, `Dinov2Model`, `CLIPVisionModel`,
            `ResNetModel`, ...), a model of timm, the `visual` tower of open_clip, or any module that returns
            features `(C, F)`, tokens `(C, L, F)` or a map `(C, F, h, w)`. Used as it is, not copied.
        pooling: "cls", "mean" or "pooler", see `FeatureReader`; the model's own by default.
        head: "mlp" (SimCLR), "norm_mlp" (with LayerNorm), "linear" or "none".
        projection_dim: D.
        hidden_dim: of the MLP; F by default.
        exits: modules of the backbone whose outputs become further representations, each through a head of
            its own (SelfCon, arXiv 2106.15499): `["encoder.layer.5"]`, names as in `backbone.named_modules()`.
        predictor: hidden width of a second MLP on the projections (BYOL, SimSiam, NNCLR, MoCo v3), with LayerNorm
            where papers have BatchNorm.
        prototypes: K, how many the projections are compared with (SwAV).
        normalize: to unit length.
        image_mean: per channel, in 0..1; with `image_std` it lets uint8 images in, which are then normalised
            on the device (see `gc_accel.data.image_statistics`).
        image_std: per channel.
        freeze_backbone: train the heads alone. What is frozen otherwise, by the caller, stays frozen too, and
            every module without a parameter that trains stays in eval mode.

    Attributes:
        dim: D, which is F without a head.

    Raises:
        ValueError: the backbone's outputs do not allow the pooling or an exit; features of different widths
            come without a head.

    Example:
        >>> encoder = VisionEncoder.from_pretrained("facebook/dinov2-small")
        >>> encoder(views={"pixel_values": torch.randn(8, 2, 3, 224, 224)})["views"].shape
        torch.Size([8, 2, 128])
    """

    streams: Mapping[str, Sequence[str]] = {"views": ("pixel_values",)}
    global_names: Sequence[str] = ()
    backbone: Any

    def __init__(
        self,
        backbone: nn.Module,
        *,
        pooling: Pooling | None = None,
        head: Head = "mlp",
        projection_dim: int = 128,
        hidden_dim: int | None = None,
        exits: Sequence[str] = (),
        predictor: int | None = None,
        prototypes: int | None = None,
        normalize: bool = True,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.normalize = backbone, normalize
        self.normalise_pixels = PixelNorm(image_mean, image_std)
        self.reader = FeatureReader(backbone, pooling, exits)
        widths = self.reader.widths
        if head == "none" and len(set(widths)) > 1:
            raise ValueError(f"expected a head for features of different widths, got 'none' for {widths}")
        weight = next(backbone.parameters())
        self.heads = nn.ModuleList(projection_head(head, f, hidden_dim, projection_dim) for f in widths)
        self.dim = widths[-1] if head == "none" else projection_dim
        self.further = further_heads(self.dim, predictor, prototypes)
        nn.ModuleList([self.heads, self.further]).to(weight.device, weight.dtype)
        if freeze_backbone:
            backbone.requires_grad_(False)
        self.options = {
            "pooling": pooling,
            "head": head,
            "projection_dim": projection_dim,
            "hidden_dim": hidden_dim,
            "exits": list(exits),
            "predictor": predictor,
            "prototypes": prototypes,
            "normalize": normalize,
            "image_mean": None if image_mean is None else list(image_mean),
            "image_std": None if image_std is None else list(image_std),
        }
        # What model cards, DeepSpeed and FSDP's wrapping by layer read off a model of transformers.
        read = "config", "_no_split_modules"
        self.config, self._no_split_modules = (getattr(backbone, name, None) for name in read)
        self.train(backbone.training)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, backbone_options: Mapping[str, Any] | None = None, **options: Any
    ) -> "VisionEncoder":
        """Open a backbone by its name or folder.

        Args:
            name_or_path: of transformers; or "timm/<name>", "hf-hub:timm/<name>". From a folder that
                `save_pretrained` wrote for a model of transformers, options come along, and the heads that fit
                them; those that do not, as of another method, are new, and a warning says so.
            backbone_options: for `AutoModel.from_pretrained` or `timm.create_model`.
            options: of the constructor. A pooler that the checkpoint does not bring is not the default.
        """
        backbone, pooler_is_new = open_backbone(str(name_or_path), **(backbone_options or {}))
        config = Path(name_or_path) / CONFIG
        if config.is_file():
            encoder = cls(backbone, **(json.loads(config.read_text()) | options))
            encoder._load_heads_that_fit(config.parent)
            return encoder
        return cls(backbone, **(({"pooling": "cls"} if pooler_is_new else {}) | options))

    def forward(self, views: Mapping[str, Any]) -> dict[str, Tensor]:
        """Encode the views of some samples.

        Args:
            views: `pixel_values`, normalised, or uint8: `(C, V, 3, H, W)`, a list of V tensors
                `(C, 3, H, W)` of any resolutions, or `(C, 3, H, W)`, one view.

        Returns:
            `views` `(C, V * (E + 1), D)`: of each view its exits, then its final representation. With a predictor
            `predictions` of the same shape, with prototypes `scores` `(C, V * (E + 1), K)`, cosines.
        """
        reps = encode_views(self._represent, views["pixel_values"]).flatten(1, 2)
        found = {"views": reps} | {name: head(reps) for name, head in self.further.items()}
        lengths = ("views", "predictions") if self.normalize else ()
        return {name: F.normalize(out, dim=-1) if name in lengths else out for name, out in found.items()}

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features `(C, F)` of the backbone for images `(C, 3, H, W)`, without the head: what probes use."""
        if pixel_values.ndim != 4:
            raise ValueError(f"expected images (C, 3, H, W), got {tuple(pixel_values.shape)}: flatten views")
        return self.reader(self.backbone, self.normalise_pixels(pixel_values))[-1]

    @property
    def published(self) -> Any:
        return self.backbone

    @property
    def frozen_streams(self) -> set[str]:
        """The views, if no parameter trains."""
        return set() if any(p.requires_grad for p in self.parameters()) else set(self.streams)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Like `nn.Module.train`, but what is frozen stays in eval mode: no dropout, no statistics."""
        super().train(mode)
        for module in self.modules():
            if {p.requires_grad for p in module.parameters()} == {False}:
                for part in module.modules():  # also those without parameters, such as dropout
                    part.training = False
        return self

    def save_pretrained(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the backbone's own kind of checkpoint, and the heads beside it, all in safetensors.

        Args:
            directory: is created. A backbone of transformers is read by `from_pretrained(directory)`, one of
                timm by `timm.create_model(name, num_classes=0, checkpoint_path=...)` of "model.safetensors".
            state_dict: of this encoder, gathered from sharded ranks; its own by default.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "heads": {}, "further": {}}
        for name, value in (self.state_dict() if state_dict is None else state_dict).items():
            part, _, key = name.partition(".")
            parts[part][key] = value.contiguous()
        if isinstance(self.backbone, PreTrainedModel):
            self.backbone.save_pretrained(directory, state_dict=parts["backbone"])
        else:
            save_file(parts["backbone"], directory / WEIGHTS)
        for part, file in HEADS.items():
            if parts[part] or part == "heads":
                save_file(parts[part], directory / file)
        (directory / CONFIG).write_text(json.dumps(self.options, indent=2) + "\n")

    def load_pretrained(self, directory: str | Path) -> None:
        """Read weights that `save_pretrained` wrote into this encoder, in place."""
        directory = Path(directory)
        if isinstance(self.backbone, PreTrainedModel):
            saved = type(self.backbone).from_pretrained(directory).state_dict()
        else:
            saved = load_file(directory / WEIGHTS)
        own = self.backbone.state_dict()  # saved without its pooler, a model is opened with a new one
        self.backbone.load_state_dict({name: value for name, value in saved.items() if name in own})
        self._load_heads(directory)

    def _load_heads(self, directory: Path) -> None:
        for part, file in HEADS.items():
            own = getattr(self, part)
            if len(own):
                own.load_state_dict(load_file(directory / file))

    def _load_heads_that_fit(self, directory: Path) -> None:
        for part, file in HEADS.items():
            own, path = getattr(self, part), directory / file
            saved = load_file(path) if path.is_file() else {}
            if _shapes(saved) == _shapes(own.state_dict()):
                own.load_state_dict(saved)
            elif list(own.parameters()):
                logger.warning(
                    "There is nothing in %s that fits the %s asked for, which are new.", path, TITLES[part]
                )

    def _represent(self, pixels: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` to projections `(N, E + 1, D)`."""
        features = self.reader(self.backbone, self.normalise_pixels(pixels))
        return torch.stack([head(each) for head, each in zip(self.heads, features, strict=True)], dim=1)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
