"""Cross-modal retrieval: does each image find its text, and each text its image?

Scores are dot products of the embeddings as they are given: nothing is normalised here, so pass L2-normalised
rows for cosine similarity. The rank of a query is

    1 + the number of non-matching candidates that do not score below the best matching one,

which counts a tie as a loss. A collapsed encoder, whose embeddings are all the same, is thereby ranked last
and not first; so is a diverged one, whose scores are NaN. The ranks are found for `tile_rows` queries at a
time: the memory is that of `tile_rows` rows of the score matrix, never of all of it.

Shapes: N images, M texts, D dim, Q queries, C candidates.
"""

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor


@torch.no_grad()
def retrieval_metrics(
    image: Tensor,
    text: Tensor,
    *,
    labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    tile_rows: int = 1024,
) -> dict[str, float]:
    """Recall at k and median rank, from image to text and from text to image.

    Args:
        image: `(N, D)`, taken as given: normalise before the call for cosine similarity.
        text: `(M, D)`.
        labels: `(N,)` integers. An image matches every text with the same label, so that an image may have
            several captions; a query counts as found when any of its matches is. Without labels N equals M
            and row i matches row i.
        text_labels: `(M,)`; `labels` when not given.
        ks: the k of each recall.
        tile_rows: how many queries are scored against all candidates at once.

    Returns:
        `image_to_text_r1`, `_r5`, `_r10` (fractions, one for each k), `image_to_text_median_rank`, and the
        same with `text_to_image_`.

    Raises:
        ValueError: if the shapes do not fit, or a query has no match on the other side.

    Example:
        >>> retrieval_metrics(torch.eye(4), torch.eye(4), ks=(1,))["image_to_text_r1"]
        1.0
    """
    check_embeddings("image", image, "text", text)
    if min(ks, default=1) < 1 or tile_rows < 1:
        raise ValueError(
            f"expected ks and tile_rows of at least 1, got ks={tuple(ks)}, tile_rows={tile_rows}"
        )
    image_ids, text_ids = _match_ids(image, text, labels, text_labels)
    metrics: dict[str, float] = {}
    for direction, ranks in (
        ("image_to_text", match_ranks(image, text, image_ids, text_ids, tile_rows=tile_rows)),
        ("text_to_image", match_ranks(text, image, text_ids, image_ids, tile_rows=tile_rows)),
    ):
        metrics |= {f"{direction}_r{k}": (ranks <= k).double().mean().item() for k in ks}
        metrics[f"{direction}_median_rank"] = float(median(ranks.tolist()))
    return metrics


def match_ranks(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, *, tile_rows: int = 1024
) -> Tensor:
    """The rank of each query's best match: 1 is first, and a tie with a non-match counts against it.

    Args:
        queries: `(Q, D)`.
        candidates: `(C, D)`.
        query_ids: `(Q,)`; a query and a candidate match when their ids are equal.
        candidate_ids: `(C,)`.
        tile_rows: how many queries are scored at once.

    Returns:
        `(Q,)` integers from 1 to C.

    Raises:
        ValueError: if a query has no match among the candidates.
    """
    orphans = (~torch.isin(query_ids, candidate_ids)).nonzero()
    if len(orphans):
        first = int(orphans[0])
        raise ValueError(
            f"expected every query to have a match, got {len(orphans)} without one, first row {first} (label "
            f"{int(query_ids[first])}): leave out the rows that have no counterpart on the other side"
        )
    ranks = []
    for rows, ids in zip(queries.split(tile_rows), query_ids.split(tile_rows), strict=True):
        scores = rows @ candidates.T
        matches = ids[:, None] == candidate_ids
        best = scores.masked_fill(~matches, float("-inf")).amax(dim=1, keepdim=True)
        # "not below" where ">=" would do for numbers: a NaN score must lose as well.
        ranks.append(1 + (~(scores < best) & ~matches).sum(dim=1))
    return torch.cat(ranks)


def check_embeddings(name: str, rows: Tensor, other_name: str, other_rows: Tensor) -> None:
    """Raises ValueError unless both are non-empty `(rows, D)` floating-point tensors with the same D."""
    if (
        rows.ndim != 2
        or other_rows.ndim != 2
        or rows.shape[1] != other_rows.shape[1]
        or 0 in (*rows.shape, *other_rows.shape)
    ):
        raise ValueError(
            f"expected {name} (rows, D) and {other_name} (rows, D) with one D and at least one row, got "
            f"{tuple(rows.shape)} and {tuple(other_rows.shape)}: pass one embedding per row"
        )
    if rows.dtype != other_rows.dtype or not rows.is_floating_point():
        raise ValueError(
            f"expected {name} and {other_name} of one floating-point type, got {rows.dtype} and "
            f"{other_rows.dtype}: convert both, for example with .float()"
        )


def check_labels(name: str, labels: Tensor, rows: int) -> None:
    """Raises ValueError unless `labels` are `(rows,)` integers."""
    if labels.shape != (rows,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"expected {name} as ({rows},) integers, got {tuple(labels.shape)} of {labels.dtype}: "
            "pass one label per embedding"
        )


def _match_ids(
    image: Tensor, text: Tensor, labels: Tensor | None, text_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ids `(N,)` and `(M,)` whose equality means a match."""
    if labels is None:
        if text_labels is not None:
            raise ValueError("expected labels along with text_labels, got text_labels alone: pass both")
        if len(image) != len(text):
            raise ValueError(
                f"expected as many images as texts, got {len(image)} and {len(text)}: pass labels and "
                "text_labels to say which match"
            )
        labels = torch.arange(len(image), device=image.device)
    if text_labels is None:
        text_labels = labels
    check_labels("labels", labels, len(image))
    check_labels("text_labels", text_labels, len(text))
    return labels.to(image.device), text_labels.to(image.device)
