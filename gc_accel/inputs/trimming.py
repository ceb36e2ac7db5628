"""Text without its padding: a whole batch sorted by length and cut into chunks, each as wide as its longest text.

A batch that is padded as a whole has the width of its longest text in every row. Sorting puts texts of about one
length into one chunk, and trimming cuts that chunk to its own width, which saves work on padding, often half of a text
tower's. No loss sees the order, so no gradient changes (only dropout does, whose masks are drawn per chunk):

    padded as a whole     a a . . . . . .    sorted, trimmed    c
                          b b b b b b b b                       a a
                          c . . . . . . .                       -------------
                          d d d d d . . .                       d d d d d . . .
                                                                b b b b b b b b

The attention mask says which columns are padding, on the left or on the right. Two things in a model may notice that
padding is gone, and `trimming_is_inert` finds out by encoding a text with and without:

- a tower that pools the last position or ignores the mask (SigLIP's);
- absolute positions that count columns, padding on the left included. Such padding stays, unless `position_ids`
  come along, which are trimmed too, or `shift` says that positions may move: they are relative (rotary) or are
  counted along the mask.

Loaders of this package need none of it: they sort by lengths known beforehand and collate chunk by chunk.

Shape letters: B batch, C chunk, L tokens, M texts of a sample.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from gc_accel.contracts import streams_of
from gc_accel.inputs.nested import Inputs, batch_size, call, named, select
from gc_accel.state.repeat import is_inert

MASK, POSITIONS = "attention_mask", "position_ids"
ALONG = (  # what has one value per token
    "input_ids",
    MASK,
    POSITIONS,
    "token_type_ids",
    "mm_token_type_ids",
    "special_tokens_mask",
    "global_attention_mask",
)
VECTORS = ("inputs_embeds", "bbox")  # what has a vector per token


def trim_padding(chunk: Mapping[str, Any], *, shift: bool = False) -> dict[str, Any]:
    """A chunk without the columns that are padding in all of its texts, as views.

    Args:
        chunk: with an `attention_mask` `(C, L)`, or `(C, M, L)`, wherever it has texts; mappings inside it are
            trimmed each by its own mask. A text without any token keeps the padding of its chunk.
        shift: cut padding on the left also where no `position_ids` come along.
    """
    trimmed = {k: trim_padding(v, shift=shift) if isinstance(v, Mapping) else v for k, v in chunk.items()}
    if MASK not in chunk:
        return trimmed
    start, stop = _bounds(_spans(chunk, shift))
    trimmed |= {name: chunk[name][..., start:stop] for name in ALONG if name in chunk}
    return trimmed | {name: chunk[name][..., start:stop, :] for name in VECTORS if name in chunk}


def length_order(batch: Mapping[str, Any], *, shift: bool = False) -> list[int]:
    """The samples of a batch from the shortest text to the longest; several texts of a sample count together.

    Args:
        batch: see `trim_padding`.
        shift: likewise; padding that is not to be cut counts as text.

    Raises:
        ValueError: there is no `attention_mask`, or inputs do not pair up.
    """
    lengths = torch.stack([(spans[..., 1] - spans[..., 0]).sum(1) for spans in _all_spans(batch, shift)])
    return lengths.sum(0).sort(stable=True).indices.tolist()


def sorted_by_length(batch: Mapping[str, Any], *, shift: bool = False) -> dict[str, Any]:
    """A batch with all of its per-sample values, labels too, in the order of `length_order`, as copies."""
    return select(batch, length_order(batch, shift=shift))


def length_sorted_chunks(
    batch: Mapping[str, Any], *, chunk_size: int, chunk_tokens: int | None = None, shift: bool = False
) -> Iterator[dict[str, Any]]:
    """The chunks of a batch that is padded as a whole, of texts of about one length, and trimmed.

    Args:
        batch: with `attention_mask`; on several ranks a rank's own part. Labels belong in it, as it is sorted. Labels
            by keyword are sorted by hand, `labels[length_order(batch)]`.
        chunk_size: samples that a chunk has at most.
        chunk_tokens: tokens, padding included, that a chunk has at most, but for a sample that has more by itself.
        shift: see `trim_padding`.

    Raises:
        ValueError: there is no `attention_mask`, or a bound is below 1.

    Example:
        >>> assert trimming_is_inert(encoder, batch)    # once
        >>> loss = cache.forward_backward_chunks(length_sorted_chunks(batch, chunk_size=64))
    """
    if chunk_size < 1 or (chunk_tokens is not None and chunk_tokens < 1):
        raise ValueError(
            f"expected chunks of at least 1 sample and token, got {chunk_size} and {chunk_tokens}"
        )
    for samples in _cut(batch, chunk_size, chunk_tokens, shift):
        yield trim_padding(select(batch, samples), shift=shift)


def trimming_is_inert(encoder: nn.Module, batch: Mapping[str, Any], *, shift: bool = False) -> bool:
    """Whether the representations of the shortest texts of a batch stay as they are when their padding goes.

    Args:
        encoder: prepared or not, not sharded; it is called in eval mode.
        batch: padded as in training. A few samples of it are encoded, each stream on its own.
        shift: see `trim_padding`.

    Raises:
        ValueError: there is no padding that could go, so nothing can be said.
    """
    model = extract_model_from_parallel(encoder, keep_torch_compile=False)
    padded = select(batch, length_order(batch, shift=shift)[:2])
    trimmed = trim_padding(padded, shift=shift)
    if _width(trimmed) == _width(padded):
        raise ValueError(
            "expected a batch with padding that trimming would cut, got none: pass a longer one, or for padding on the "
            "left position_ids or shift=True"
        )
    return is_inert(model, partial(_representations, model), padded, trimmed)


def _representations(model: nn.Module, chunk: Inputs) -> dict[Any, Tensor]:
    streams = streams_of(model)
    calls = (streams.arguments(name, part) for name, part in streams.split(chunk).items())
    return {name: output for inputs in calls for name, output in named(call(model, inputs)).items()}


def _cut(
    batch: Mapping[str, Any], chunk_size: int, chunk_tokens: int | None, shift: bool
) -> Iterator[list[int]]:
    """Samples in the order of their lengths, cut where a further one would not fit."""
    all_spans = _all_spans(batch, shift)
    texts = [spans.shape[1] for spans in all_spans]  # of a sample, by mask
    # As numbers, once: a look at a tensor for every sample would take most of the time.
    columns = [torch.stack([spans[..., 0].amin(1), spans[..., 1].amax(1)], 1).tolist() for spans in all_spans]
    samples, bounds = list[int](), list[tuple[int, int]]()
    for sample in length_order(batch, shift=shift):
        alone = [(first, last) for first, last in (spans[sample] for spans in columns)]
        together = zip(bounds or alone, alone, strict=True)
        grown = [(min(a, c), max(b, d)) for (a, b), (c, d) in together]
        tokens = sum(count * (last - first) for count, (first, last) in zip(texts, grown, strict=True))
        too_long = chunk_tokens is not None and (len(samples) + 1) * tokens > chunk_tokens
        if samples and (len(samples) == chunk_size or too_long):
            yield samples
            samples, grown = [], alone
        samples.append(sample)
        bounds = grown
    if samples:
        yield samples


def _all_spans(batch: Mapping[str, Any], shift: bool) -> list[Tensor]:
    """Spans `(B, M, 2)` of the texts of every mask in a batch."""
    texts = list(_texts(batch))
    if not texts:
        raise ValueError(
            f"expected an {MASK}, which tells padding from text, got {[*batch]}: have the tokenizer make one"
        )
    return [_spans(text, shift).reshape(batch_size(batch), -1, 2) for text in texts]


def _texts(inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A mapping and those inside it, as far as they have a mask."""
    if MASK in inputs:
        yield inputs
    for value in inputs.values():
        if isinstance(value, Mapping):
            yield from _texts(value)


def _spans(text: Mapping[str, Any], shift: bool) -> Tensor:
    """The columns that each text has to keep, `(..., L)` to `(..., 2)`: the first, and one past the last.

    A text without any token keeps all: attention to nothing but padding sees how much of it there is.
    """
    kept = text[MASK].bool()
    columns, width = torch.arange(kept.shape[-1], device=kept.device), kept.shape[-1]
    empty = ~kept.any(-1)
    first = torch.where(kept, columns, width).amin(-1).masked_fill(empty, 0)
    last = torch.where(kept, columns, -1).amax(-1).masked_fill(empty, width - 1)
    return torch.stack([first if shift or POSITIONS in text else first * 0, last + 1], -1)


def _bounds(spans: Tensor) -> tuple[int, int]:
    return int(spans[..., 0].min()), int(spans[..., 1].max())


def _width(chunk: Mapping[str, Any]) -> int:
    return sum(text[MASK].shape[-1] for text in _texts(chunk))
