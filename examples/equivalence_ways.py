"""Four ways to train on a batch that is too large for one graph, two of them wrong.

batch of 64 = chunks a b c d of 16           a b c d              a b c d
                                           a x x x x            a x . . .
x counts in the loss,                      b x x x x            b . x . .
. does not                                 c x x x x            c . . x .
                                           d x x x x            d . . . x
                                         direct, cached    accumulated, diagonal
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTextModel, CLIPVisionModel

from gc_accel import GradientCache
from gc_accel.inputs.nested import split
from gc_accel.losses import CLIPLoss

Batch = dict[str, Tensor]
Loss = Callable[..., Tensor]


class TwoTowers(nn.Module):
    """An image and a text tower of CLIP, each with a projection head of its own.

    Args:
        config: of the towers.
        normalize: representations of length one and a learnable scale, for CLIP's loss; or neither.
        dim: of the representations.
    """

    streams: Mapping[str, Sequence[str]] = {
        "image": ("pixel_values",),
        "text": ("input_ids", "attention_mask"),
    }

    def __init__(self, config: CLIPConfig, *, normalize: bool, dim: int = 64) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.text_model = CLIPTextModel(config.text_config)
        widths = (config.vision_config.hidden_size, config.text_config.hidden_size)
        self.image_head, self.text_head = (
            nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim)) for width in widths
        )
        self.normalize = normalize
        self.global_names = ("logit_scale",) if normalize else ()
        if normalize:
            self.log_scale = nn.Parameter(torch.full((1,), 2.659))  # CLIP's: ln(1 / 0.07)

    def features(self, image: Batch) -> Tensor:
        """What the probe looks at: the image tower without its head."""
        return self.vision_model(**image).pooler_output

    def forward(self, image: Batch | None = None, text: Batch | None = None) -> dict[str, Tensor]:
        outputs = {"logit_scale": self.log_scale.exp()} if self.normalize else {}
        if image is not None:
            outputs["image"] = self.image_head(self.features(image))
        if text is not None:
            outputs["text"] = self.text_head(self.text_model(**text).pooler_output)
        towers = [name for name in self.streams if name in outputs and self.normalize]
        return outputs | {name: F.normalize(outputs[name], dim=-1) for name in towers}


def dot_product_loss(image: Tensor, text: Tensor) -> Tensor:
    """Both cross-entropies over plain dot products, mean over the batch."""
    logits, matches = image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2


LOSSES: dict[str, Loss] = {"dot product": dot_product_loss, "CLIP": CLIPLoss()}


def encode(model: TwoTowers, batch: Batch) -> dict[str, Tensor]:
    """Representations of a whole batch in one call."""
    return model(**{name: {key: batch[key] for key in keys} for name, keys in model.streams.items()})


def direct(model: TwoTowers, loss_fn: Loss, batch: Batch, chunk_size: int) -> Tensor:
    """One graph over the batch. Like each of the four, leaves gradients and returns the loss of the whole batch."""
    loss = loss_fn(**encode(model, batch))
    loss.backward()
    return loss.detach()


def cached(model: TwoTowers, loss_fn: Loss, batch: Batch, chunk_size: int) -> Tensor:
    """Chunks, and the loss of all their representations."""
    return GradientCache(model, loss_fn, chunk_size).forward_backward(batch)


def accumulated(model: TwoTowers, loss_fn: Loss, batch: Batch, chunk_size: int) -> Tensor:
    """Wrong: a sample meets the 15 others of its chunk and no more."""
    parts = []
    for chunk in split(batch, chunk_size):
        parts.append(reps := encode(model, chunk))
        (loss_fn(**reps) * len(chunk["input_ids"]) / len(batch["input_ids"])).backward()
    whole = {name: torch.cat([part[name].detach() for part in parts]) for name in model.streams}
    return loss_fn(**whole, **{name: parts[0][name].detach() for name in model.global_names})


def diagonal(model: TwoTowers, loss_fn: Loss, batch: Batch, chunk_size: int) -> Tensor:
    """Wrong: of the similarities of all cached representations, the blocks on the diagonal alone."""
    whole = list[Tensor]()

    def blocks(image: Tensor, text: Tensor, **shared: Tensor) -> Tensor:
        whole.append(loss_fn(image=image.detach(), text=text.detach(), **shared).detach())
        pairs = zip(image.split(chunk_size), text.split(chunk_size), strict=True)
        return torch.stack([loss_fn(image=i, text=t, **shared) * len(i) for i, t in pairs]).sum() / len(image)

    GradientCache(model, blocks, chunk_size).forward_backward(batch)
    return whole[0]


WAYS = {"direct": direct, "cached": cached, "accumulated": accumulated, "diagonal": diagonal}
