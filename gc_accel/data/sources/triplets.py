"""Questions with passages of one's own: rows with a query, a positive and hard negatives, and what they become.

    load_triplets     a table or a data set of the hub, as `datasets` reads it
    TripletDataset    a row with n hard negatives, which it draws anew each epoch, from (seed, epoch, index) alone
    TripletCollator   rows to a chunk of tokens
    Corpus            the questions of an evaluation, all of their passages, and which answers which

Shape letters: C chunk, P passages of a question, its positive first, L tokens.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gc_accel.data.collators import Item, Tensors
from gc_accel.data.epochs import EpochDataset
from gc_accel.data.sources.image_text import BUILDERS, read_files


def load_triplets(source: str, split: str, *, name: str | None = None) -> datasets.Dataset:
    """Load one split of a data set of queries and passages.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .parquet file, which is the split that is asked for; a folder;
            or the name of a data set on the hub.
        split: such as "train" or "train[:1%]".
        name: the configuration, for a data set that has several.

    Raises:
        ValueError: `source` is or looks like a file, and there is none, or one of another kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return datasets.load_dataset(str(path.resolve()), name, split=split)
    is_table = path.suffix.lower() in BUILDERS
    if path.is_file() != is_table:
        raise ValueError(f"expected a {', '.join(BUILDERS)} file, a folder or a hub name, got {source!r}")
    return (
        read_files([path.resolve()], split) if is_table else datasets.load_dataset(source, name, split=split)
    )


class TripletDataset(EpochDataset):
    """Rows as items `{"query": str, "positive": str, "negatives": [str, ...]}`.

    Args:
        rows: one split. `datasets.Dataset.from_list` makes one from rows in memory.
        query_column: holds strings.
        positive_column: holds strings, or lists of strings of which each epoch draws one per row.
        negatives_column: holds strings, or lists of strings of which each epoch draws `negatives` per row.
        negatives: how many hard negatives an item has; 0 needs no column.
        seed: random seed of the draws.

    Raises:
        ValueError: in the constructor for a missing column; on access, naming the row, for too few texts.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        query_column: str = "query",
        positive_column: str = "positive",
        negatives_column: str = "negatives",
        negatives: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        columns = {"query_column": query_column, "positive_column": positive_column}
        columns |= {"negatives_column": negatives_column} if negatives else {}
        for argument, column in columns.items():
            if column not in rows.column_names:
                raise ValueError(f"expected a column {column!r}, got {rows.column_names}: set {argument}")
        self.rows = rows.select_columns(list(dict.fromkeys(columns.values())))
        self.query_column, self.positive_column = query_column, positive_column
        self.negatives_column, self.negatives = negatives_column, negatives

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        rng = np.random.default_rng(self._seed_of(index))
        texts = {"query": row[self.query_column], "positive": row[self.positive_column], "negatives": []}
        if self.negatives:
            texts["negatives"] = row[self.negatives_column]
        counts = {"query": 1, "positive": 1, "negatives": self.negatives}
        drawn: dict[str, Any] = {
            key: _draw(_strings(texts[key]), count, rng) for key, count in counts.items()
        }
        if short := [key for key, count in counts.items() if len(drawn[key]) < count]:
            raise ValueError(
                f"row {index} of the data set: expected at least {counts} strings, got too few for {short}: "
                "filter the row out, or ask for fewer negatives"
            )
        return drawn | {"query": drawn["query"][0], "positive": drawn["positive"][0]}


class TripletCollator:
    """Tokenizes rows to a chunk, questions and passages padded to the longest text of each.

    Args:
        tokenizer: that of the encoder, or of both towers.
        query_length: tokens of a question, what is more is cut; None: the tokenizer's own limit.
        passage_length: tokens of a passage, likewise.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        query_length: int | None = None,
        passage_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.lengths = {"query": query_length, "passage": passage_length}

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Rows to a chunk: `query` `(C, L)` and `passage` `(C, P, L)`, tokens each, and `passage_ids` `(C, P)`."""
        passages = [text for item in items for text in (item["positive"], *item["negatives"])]
        tokens = self.tokenize("passage", passages)
        return {
            "query": self.tokenize("query", [item["query"] for item in items]),
            "passage": {key: value.unflatten(0, (len(items), -1)) for key, value in tokens.items()},
            "passage_ids": torch.tensor([text_id(text) for text in passages]).view(len(items), -1),
        }

    def tokenize(self, stream: str, texts: Sequence[str]) -> Tensors:
        """`input_ids` and `attention_mask` `(N, L)` of questions, "query", or of passages, "passage"."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.lengths[stream], return_tensors="pt"
        )
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}


class Corpus(NamedTuple):
    """The questions of an evaluation, the passages it searches, and which answers which, each text once.

    Args:
        queries: Q texts.
        passages: N texts.
        relevant: `(R, 2)`, the row of a question and the row of a passage that answers it.
    """

    queries: list[str]
    passages: list[str]
    relevant: Tensor

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Corpus":
        """Collect all questions and passages of some rows, the hard negatives among them."""
        queries, passages, pairs = dict[str, int](), dict[str, int](), []
        for item in items:
            row = queries.setdefault(item["query"], len(queries))
            pairs.append((row, passages.setdefault(item["positive"], len(passages))))
            for text in item["negatives"]:
                passages.setdefault(text, len(passages))
        return cls(list(queries), list(passages), torch.tensor(pairs))


def text_id(text: str) -> int:
    """A 63-bit number that is the same for the same text in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _strings(value: Any) -> list[str]:
    """The strings that a cell holds, one or a list of them; anything else in it, such as None, is left out."""
    texts = value if isinstance(value, list) else [value]
    return [text for text in texts if isinstance(text, str)]


def _draw(texts: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Draw `count` of the texts without repetition, or all of them if there are not that many."""
    return [texts[i] for i in rng.permutation(len(texts))[:count]]
