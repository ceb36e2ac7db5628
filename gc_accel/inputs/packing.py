"""Packed inputs: values of which a sample has any number of rows, or none, laid end to end over the batch.

Processors of vision-language models pack what varies in size. For B samples with I images, that of Qwen2-VL makes

    input_ids         (B, L)    one row per sample
    image_grid_thw    (I, 3)    one row per image: patches in time, height and width
    pixel_values      (R, F)    one row per patch of any image, R = sum of t * h * w

Shapes do not say which rows belong to which sample, so whoever makes the batch does: `pack` marks these values, and
from then on `nested` cuts and joins them by sample. The encoder gets plain tensors of its chunk, and for a chunk
without images none at all, as from a processor. (Where parameters are sharded, FSDP2 and ZeRO-3, every rank must run
the same modules: there each sample needs an image.)

What other processors of transformers make:

    Qwen2-VL, Qwen2.5-VL, Qwen3-VL     {"pixel_values": "image_grid_thw"}, for videos
                                       {"pixel_values_videos": "video_grid_thw"}
    LLaVA, PaliGemma                   {"pixel_values": None}, one row per image
    LLaVA-NeXT, Pixtral                {"pixel_values": None, "image_sizes": None}, likewise
    Idefics3, SmolVLM, ColQwen2        by sample already, padded: nothing to pack

Shape letters: B batch, I images, R rows, C chunk.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Rows `(R, ...)` of several samples, in their order, and how many each sample has, `(B,)`.

    A tuple, so that whatever moves, pins or records the tensors of a batch reaches into it.
    """

    rows: Tensor
    counts: tuple[int, ...]

    def cut(self, start: int, stop: int) -> "Packed":
        """Samples `start` to `stop`, as a view."""
        first, counts = sum(self.counts[:start]), self.counts[start:stop]
        return Packed(self.rows[first : first + sum(counts)], counts)

    def select(self, indices: Sequence[int]) -> "Packed":
        """Some samples, in the order given, as a copy."""
        ends = list(accumulate(self.counts))
        rows = [row for i in indices for row in range(ends[i] - self.counts[i], ends[i])]
        return Packed(self.rows[rows], tuple(self.counts[i] for i in indices))

    @staticmethod
    def join(parts: Sequence["Packed"]) -> "Packed":
        """The samples of all parts, in order."""
        counts = tuple(count for part in parts for count in part.counts)
        return Packed(torch.cat([part.rows for part in parts]), counts)


def pack(
    batch: Mapping[str, Any],
    packed: Mapping[str, str | None],
    *,
    images: Sequence[int] | Tensor | None = None,
) -> dict[str, Any]:
    """Say which values of a batch are packed, so that it can be cut by sample.

    Args:
        batch: as a processor makes it. One without any image has none of the packed values.
        packed: names of packed values, each with the name of the sizes `(I, ...)` whose product over a row is an
            image's number of rows; None for one row per image. The sizes themselves are packed along.
        images: of each sample, `(B,)`, in the order of the rows; by default one each. See `images_per_sample`.

    Returns:
        The batch, its packed values as `Packed`.

    Raises:
        ValueError: some of the values are missing, or the numbers of images and rows do not add up.

    Example:
        >>> batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
        >>> counts = (batch["input_ids"] == model.config.image_token_id).sum(1)
        >>> images = images_per_sample(counts, batch["image_grid_thw"])
        >>> cache.forward_backward(pack(batch, {"pixel_values": "image_grid_thw"}, images=images))
    """
    names = packed.keys() | {sizes for sizes in packed.values() if sizes is not None}
    if missing := names - batch.keys():
        if missing == names:
            return dict(batch)
        raise ValueError(f"expected {sorted(names)} together, got a batch without {sorted(missing)}")
    marked = dict(batch)
    for name, sizes in packed.items():
        marked |= _mark(batch, name, sizes, images)
    return marked


def images_per_sample(tokens: Tensor, sizes: Tensor) -> list[int]:
    """How many images belong to each sample, by the image tokens in its text.

    Every image takes the same number of rows per token (four for Qwen2-VL, which merges patches two by two), so
    the tokens of the first samples say how many of the first images are theirs.

    Args:
        tokens: image tokens of each sample, `(B,)`, such as `(input_ids == image_token_id).sum(1)`.
        sizes: of the images, `(I, ...)`, with their number of rows as product.

    Raises:
        ValueError: an image would belong to two samples.
    """
    ends = sizes.flatten(1).prod(1).cumsum(0)
    rows, total = int(ends[-1]) if len(ends) else 0, int(tokens.sum())
    wanted = tokens.cumsum(0) * (rows // total if total else 0)
    before = torch.searchsorted(ends, wanted, right=True)  # images that end where the sample does, or earlier
    if not torch.equal(torch.cat([ends.new_zeros(1), ends])[before], wanted) or (total == 0) != (rows == 0):
        raise ValueError(
            f"expected image tokens that part {len(sizes)} images of {rows} rows by sample, got "
            f"{_brief(tokens.tolist())}: truncated texts, or tokens of another kind?"
        )
    return before.diff(prepend=before.new_zeros(1)).tolist()


def _mark(
    batch: Mapping[str, Any], name: str, sizes: str | None, images: Sequence[int] | Tensor | None
) -> dict[str, Packed]:
    """A packed value of a batch, and its sizes; for the arguments see `pack`."""
    rows = [1] * len(batch[name]) if sizes is None else batch[sizes].flatten(1).prod(1).tolist()
    per_sample = [1] * len(rows) if images is None else [int(count) for count in images]
    if min(per_sample, default=0) < 0 or sum(per_sample) != len(rows) or sum(rows) != len(batch[name]):
        raise ValueError(
            f"expected images that add up to the {len(rows)} of {sizes or name!r} and to {sum(rows)} rows of "
            f"{name!r}, got {_brief(per_sample)} and {len(batch[name])} rows: pass images, how many each sample has"
        )
    ends = [0, *accumulate(per_sample)]
    counts = tuple(sum(rows[start:stop]) for start, stop in pairwise(ends))
    marked = {name: Packed(batch[name], counts)}
    return marked if sizes is None else marked | {sizes: Packed(batch[sizes], tuple(per_sample))}


def _brief(counts: Sequence[int]) -> str:
    more = len(counts) - 12
    return f"{list(counts[:12])} and {more} more" if more > 0 else f"{list(counts)}"
