"""One step of CLIP in the ways there are: each leaves a gradient in the encoder's weights.

    direct              the batch in one graph
    chunked             the same, but encoded chunk by chunk: what a cached step equals with dropout, too
    accumulation        the gradient of each chunk's own loss, averaged: ANOTHER objective, with fewer negatives
    GradCache           GradCache 0.0.1, a published package, as its readme says
    sentence_transformers  the loss class of that package, CachedMultipleNegativesRankingLoss, both directions
    accum_freq          open_clip's training loop, `train_one_epoch`, with --accum-freq
    gc_accel            this package

All of them call the same encoder, and all but gc_accel and sentence-transformers use open_clip's loss. Peers are
the packages themselves, not imitations: `pip install "gc-accel[bench]"`.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from transformers import BatchEncoding

from benchmarks.clips import Batch
from gc_accel import DualEncoder, GradientCache
from gc_accel.contracts import streams_of
from gc_accel.inputs.nested import split
from gc_accel.inputs.trimming import length_sorted_chunks
from gc_accel.losses import CLIPLoss

Step = Callable[[Batch], Any]
Make = Callable[..., Step]  # from an encoder and a chunk size
LOSS = ClipLoss()


def needed(name: str) -> Any:
    """A module of a peer.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: install the peers with pip install "gc-accel[bench]"') from error


def loss_of(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss in the names of this package."""
    return LOSS(image, text, logit_scale)


def encode(encoder: DualEncoder, batch: Batch) -> dict[str, Tensor]:
    """Both towers in one call."""
    return encoder(**streams_of(encoder).split(batch))


def direct(encoder: DualEncoder, chunk_size: int) -> Step:
    return lambda batch: loss_of(**encode(encoder, batch)).backward()


def chunked(encoder: DualEncoder, chunk_size: int) -> Step:
    def step(batch: Batch) -> None:
        outputs = [encode(encoder, chunk) for chunk in split(batch, chunk_size)]
        image, text = (torch.cat([output[name] for output in outputs]) for name in ("image", "text"))
        loss_of(image, text, outputs[0]["logit_scale"]).backward()

    return step


def accumulation(encoder: DualEncoder, chunk_size: int) -> Step:
    def step(batch: Batch) -> None:
        chunks = list(split(batch, chunk_size))
        for chunk in chunks:
            (loss_of(**encode(encoder, chunk)) / len(chunks)).backward()

    return step


def grad_cache(encoder: DualEncoder, chunk_size: int, cls: Any = None) -> Step:
    """The published class or one of its face. A frozen tower goes to the loss: nothing can be pushed into one."""
    cls = cls or _published_grad_cache()
    names = [name for name in encoder.streams if name not in encoder.frozen_streams]

    def loss(*reps: Tensor, **frozen: Tensor) -> Tensor:
        scale = encoder.model.logit_scale.exp()  # whose gradient goes to the weight at once
        return loss_of(**dict(zip(names, reps, strict=True)), **frozen, logit_scale=scale)

    towers = [lambda name=name, **inputs: encoder(**{name: inputs})[name] for name in names]
    cache = cls(models=towers, chunk_sizes=chunk_size, loss_fn=loss)

    def step(batch: Batch) -> None:
        parts = streams_of(encoder).split(batch)
        frozen = {name: encoder(**{name: parts[name]})[name] for name in encoder.frozen_streams}
        cache(*(parts[name] for name in names), **frozen)

    return step


def sentence_transformers(encoder: DualEncoder, chunk_size: int) -> Step:
    losses = needed("sentence_transformers.sentence_transformer.losses")

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        return encoder.model.logit_scale.exp() * a @ b.T

    loss = losses.CachedMultipleNegativesRankingLoss(
        nn.Sequential(_Columns(encoder)),
        scale=1.0,
        similarity_fct=similarity,
        mini_batch_size=chunk_size,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    return lambda batch: loss(streams_of(encoder).split(batch).values(), None).backward()


def accum_freq(encoder: DualEncoder, chunk_size: int) -> Step:
    """Its optimizer changes nothing, so that the gradient is left."""
    train = needed("open_clip_train.train").train_one_epoch
    logging.getLogger().setLevel(logging.WARNING)  # it logs every step
    optimizer = SimpleNamespace(zero_grad=encoder.zero_grad, step=lambda: None, param_groups=[{"lr": 0.0}])
    model = _OpenClip(encoder)
    options: dict[str, Any] = {"device": "cpu", "precision": "fp32", "distill": False, "skip_scheduler": True}
    options |= {"grad_clip_norm": None, "rank": 0, "local_rank": 0, "log_local": False, "wandb": False}
    options |= {"world_size": 1, "log_every_n_steps": 1, "batch_size": chunk_size, "horovod": False}

    def step(batch: Batch) -> None:
        loader = _Pairs(encoder, batch, chunk_size)
        args = Namespace(**options, accum_freq=loader.num_batches)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        train(model, data, LOSS, 0, optimizer, None, None, None, args)

    return step


def gc_accel(encoder: DualEncoder, chunk_size: int, **options: Any) -> Step:
    """Options are those of `GradientCache`."""
    return GradientCache(encoder, CLIPLoss(), chunk_size, **options).forward_backward


def gc_accel_sorted(encoder: DualEncoder, chunk_size: int, **options: Any) -> Step:
    """The same for a batch that was padded as a whole, sorted by length first; sorting is part of the step."""
    cache = GradientCache(encoder, CLIPLoss(), chunk_size, **options)
    return lambda batch: cache.forward_backward_chunks(length_sorted_chunks(batch, chunk_size=chunk_size))


class _Columns(nn.Module):
    """The encoder as sentence-transformers calls it, with the features of one column at a time."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Batch) -> Batch:
        name = "text" if "input_ids" in features else "image"
        return {"sentence_embedding": self.encoder(**{name: features})[name]}


class _OpenClip(nn.Module):
    """The encoder with the signature of open_clip's models."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def logit_scale(self) -> Tensor:
        return self.encoder.model.logit_scale

    def forward(self, images: Batch, texts: Batch) -> Batch:
        out = self.encoder(image=images, text=texts)
        return {
            "image_features": out["image"],
            "text_features": out["text"],
            "logit_scale": out["logit_scale"],
        }


class _Pairs:
    """A batch as the loader that open_clip trains from: pairs of images and texts, chunk by chunk."""

    def __init__(self, encoder: DualEncoder, batch: Batch, chunk_size: int) -> None:
        self.chunks = [streams_of(encoder).split(chunk) for chunk in split(batch, chunk_size)]
        self.num_batches = self.num_samples = len(self.chunks)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for parts in self.chunks:
            yield _Movable(parts["image"]), BatchEncoding(parts["text"])


class _Movable(BatchEncoding):
    """Images in a mapping, so that a mapping of features can stand in for them too."""

    def to(
        self, device: Any = None, *, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> "_Movable":
        return self


def _published_grad_cache() -> Any:
    """The class of GradCache 0.0.1, whose modules import one another by a name that it does not install."""
    sys.modules["grad_cache"] = needed("gradcache")
    for name in ("context_managers", "grad_cache"):
        sys.modules[f"grad_cache.{name}"] = needed(f"gradcache.{name}")
    return sys.modules["grad_cache.grad_cache"].GradCache
