"""Search in a corpus: at which rank does a question find the passages that answer it?

Scores are dot products of the embeddings as they are given. The rank of a passage is the number of passages
that do not score below it, itself included: a tie counts as a loss, so a collapsed encoder is ranked last and
not first, and so is one whose scores are NaN. The memory is that of `tile_rows` rows of the score matrix.

Shapes: Q questions, N passages, R pairs of a question and a passage that answers it, D dim.
"""

from collections.abc import Sequence

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from gc_accel.evaluation.retrieval import check_embeddings


@torch.no_grad()
def ranking_metrics(
    query: Tensor,
    passage: Tensor,
    relevant: Tensor,
    *,
    ks: Sequence[int] = (1, 10, 100),
    mrr_at: int = 10,
    tile_rows: int = 1024,
) -> dict[str, float]:
    """Mean reciprocal rank and recall at k of the questions of a test set.

    Args:
        query: `(Q, D)`, taken as given: normalise before the call for cosine similarity.
        passage: `(N, D)`, the corpus; equal passages count against one another, so leave duplicates out.
        relevant: `(R, 2)` integers, row of the question and row of a passage that answers it.
        ks: the k of each recall: of the passages that answer a question, the part among its first k.
        mrr_at: the reciprocal rank of the best of them counts down to this rank, and is zero below.
        tile_rows: how many pairs are ranked at once.

    Returns:
        `query_to_passage_mrr10`, `query_to_passage_r1`, `_r10`, `_r100`, as `mrr_at` and `ks` say.

    Raises:
        ValueError: if the shapes do not fit, or a question has no passage that answers it.

    Example:
        >>> ranking_metrics(torch.eye(4), torch.eye(4), torch.arange(4)[:, None].expand(4, 2))
        {'query_to_passage_mrr10': 1.0, 'query_to_passage_r1': 1.0, ...}
    """
    check_embeddings("query", query, "passage", passage)
    if min(*ks, mrr_at, tile_rows) < 1:
        raise ValueError(f"expected ks, mrr_at and tile_rows from 1, got {(*ks, mrr_at, tile_rows)}")
    relevant = _check_pairs(relevant, len(query), len(passage)).to(query.device).unique(dim=0)
    ranks, of = pair_ranks(query, passage, relevant, tile_rows=tile_rows), relevant[:, 0]
    best = torch.full((len(query),), len(passage), device=of.device).scatter_reduce(0, of, ranks, "amin")
    reciprocal = best.double().reciprocal().masked_fill(best > mrr_at, 0)
    metrics = {f"query_to_passage_mrr{mrr_at}": reciprocal.mean().item()}
    weights = of.bincount(minlength=len(query)).double().reciprocal()[of]  # each question counts the same
    recalls = {k: (weights * (ranks <= k)).sum().item() / len(query) for k in ks}
    return metrics | {f"query_to_passage_r{k}": value for k, value in recalls.items()}


def baseline_metrics(
    queries: Sequence[str], passages: Sequence[str], relevant: Tensor, *, ks: Sequence[int] = (1, 10, 100)
) -> dict[str, dict[str, float]]:
    """What an encoder has to beat: the same metrics of a random order, and of the words that two texts share.

    Args:
        queries: Q texts.
        passages: N texts, all different.
        relevant: as above.
        ks: likewise.

    Returns:
        `chance`, what is expected of a random order where one passage answers a question, and `tf_idf`, the
        cosine of TF-IDF vectors over the 10,000 most frequent words of the passages.
    """
    size = len(passages)
    chance = {"query_to_passage_mrr10": sum(1 / rank for rank in range(1, min(size, 10) + 1)) / size}
    chance |= {f"query_to_passage_r{k}": min(k / size, 1.0) for k in ks}
    words = TfidfVectorizer(max_features=10_000).fit(passages)
    query, passage = (torch.from_numpy(words.transform(texts).toarray()) for texts in (queries, passages))
    return {"chance": chance, "tf_idf": ranking_metrics(query, passage, relevant, ks=ks)}


def pair_ranks(query: Tensor, passage: Tensor, pairs: Tensor, *, tile_rows: int = 1024) -> Tensor:
    """The rank `(R,)`, from 1 to N, of each pair's passage among all of them, as the pair's question scores them.

    Args:
        query: `(Q, D)`.
        passage: `(N, D)`.
        pairs: `(R, 2)`, as `relevant` above.
        tile_rows: how many pairs are ranked at once.
    """
    ranks = []
    for tile in pairs.split(tile_rows):
        scores = query[tile[:, 0]] @ passage.T
        # "not below" where ">=" would do for numbers: a NaN score must lose as well.
        ranks.append((~(scores < scores.gather(1, tile[:, 1:]))).sum(dim=1))
    return torch.cat(ranks)


def _check_pairs(relevant: Tensor, queries: int, passages: int) -> Tensor:
    if relevant.ndim != 2 or relevant.shape[1] != 2 or relevant.dtype != torch.int64:
        raise ValueError(
            f"expected relevant as (R, 2) int64, got {tuple(relevant.shape)} of {relevant.dtype}: pass the row "
            "of a question and the row of a passage that answers it"
        )
    inside = (relevant >= 0) & (relevant < torch.tensor([queries, passages], device=relevant.device))
    if not inside.all() or len(relevant[:, 0].unique()) < queries:
        raise ValueError(
            f"expected pairs of all of {queries} questions with some of {passages} passages, got "
            f"{len(relevant)} pairs that leave questions out or lie outside: leave out questions without a passage"
        )
    return relevant
