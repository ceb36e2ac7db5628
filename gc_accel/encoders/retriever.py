"""Questions and passages behind one forward: a tied encoder, or a tower for each.

Any text encoder of transformers that returns a `last_hidden_state` (BERT, RoBERTa, MPNet, ModernBERT, ...).

Shape letters: C chunk, P passages of a question, L tokens, F features of the encoder.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

CONFIG = "retriever.json"
Pooling = Literal["mean", "cls"]


class Retriever(nn.Module):
    """One tower for questions and one for passages, or one for both.

    Args:
        query: a text encoder of transformers, used as it is, not copied.
        passage: that of the passages; None: the tower of the questions, tied.
        pooling: "mean" over the tokens that the attention mask keeps, or the first token, "cls".

    Raises:
        ValueError: for another pooling.

    Example:
        >>> encoder = Retriever(AutoModel.from_pretrained("bert-base-uncased"))
        >>> tokens = {"input_ids": ids, "attention_mask": mask}              # ids (8, 3, 128)
        >>> encoder(passage={"passage": tokens})["passage"].shape
        torch.Size([8, 3, 768])
    """

    # The costliest first: there are more passages than questions, and they are longer.
    streams: Mapping[str, Sequence[str]] = {"passage": ("passage",), "query": ("query",)}
    global_names: Sequence[str] = ()

    def __init__(
        self, query: PreTrainedModel, passage: PreTrainedModel | None = None, *, pooling: Pooling = "mean"
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"expected pooling among {get_args(Pooling)}, got {pooling!r}")
        self.tied = passage is None or passage is query
        self.pooling = pooling
        towers = {"both": query} if self.tied else {"query": query, "passage": passage}
        self.towers: Any = nn.ModuleDict(towers)
        # What FSDP's wrapping by layer reads off a model of transformers.
        self.config = query.config
        self._no_split_modules = getattr(query, "_no_split_modules", None)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, tied: bool | None = None, pooling: Pooling | None = None
    ) -> "Retriever":
        """Open a published text encoder, or a folder that `save_pretrained` wrote.

        Args:
            name_or_path: of transformers, or a folder.
            tied: one tower; otherwise both begin with the weights of the same encoder. Of a folder, as it was
                saved, or else tied, by default.
            pooling: likewise; or else "mean".

        Raises:
            ValueError: two saved towers are to be tied.
        """
        folder = Path(name_or_path)
        saved = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
        options = {"tied": True, "pooling": "mean"} | saved
        tied, pooling = options["tied"] if tied is None else tied, pooling or options["pooling"]
        if tied and not options["tied"]:
            raise ValueError(f"expected tied=False for {folder}, got True, but two towers were saved there")
        names = ["both"] if tied else ["query", "passage"]
        sources = [folder / name if not options["tied"] else name_or_path for name in names]
        return cls(*(AutoModel.from_pretrained(source) for source in sources), pooling=pooling)

    def forward(
        self, query: Mapping[str, Any] | None = None, passage: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Encode what is given.

        Args:
            query: `{"query": tokens}`, tokens being `input_ids` and `attention_mask`, `(C, L)` each, and what
                else the encoder takes.
            passage: `{"passage": tokens}`, `(C, P, L)`, so that a question's passages stay in one chunk.

        Returns:
            `query` `(C, F)` and `passage` `(C, P, F)`, L2-normalised.
        """
        outputs = {}
        if query is not None:
            outputs["query"] = self.embed("query", query["query"])
        if passage is not None:
            tokens, shape = passage["passage"], passage["passage"]["input_ids"].shape[:2]
            flat = {key: value.flatten(0, 1) for key, value in tokens.items()}
            outputs["passage"] = self.embed("passage", flat).unflatten(0, shape)
        return outputs

    def embed(self, stream: str, tokens: Mapping[str, Tensor]) -> Tensor:
        """Tokens `(N, L)` of questions, "query", or of passages, "passage", to unit vectors `(N, F)`."""
        hidden = self._tower(stream)(**tokens).last_hidden_state
        return F.normalize(pool(hidden, tokens["attention_mask"], self.pooling), dim=-1)

    @property
    def frozen_streams(self) -> set[str]:
        """Towers without any parameter that trains."""
        return {s for s in self.streams if not any(p.requires_grad for p in self._tower(s).parameters())}

    def save_pretrained(self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write what `AutoModel.from_pretrained` reads: into `directory`, or its `query` and `passage` folders.

        Args:
            directory: is created. `retriever.json` in it keeps whether the towers are tied, and the pooling.
            state_dict: of this encoder, gathered from sharded ranks; its own by default.
        """
        state = self.state_dict() if state_dict is None else state_dict
        for name, tower in self.towers.items():
            prefix = f"towers.{name}."
            weights = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
            tower.save_pretrained(self.folders(directory)[name], state_dict=weights)
        options = {"tied": self.tied, "pooling": self.pooling}
        (Path(directory) / CONFIG).write_text(json.dumps(options, indent=2) + "\n")

    def folders(self, directory: str | Path) -> dict[str, Path]:
        """Where `save_pretrained(directory)` writes each tower; its tokenizer belongs there too."""
        return {name: Path(directory) / (name if not self.tied else "") for name in self.towers}

    def _tower(self, stream: str) -> Any:
        return self.towers["both" if self.tied else stream]


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling = "mean") -> Tensor:
    """Hidden states `(N, L, F)` to `(N, F)`: the first token, or the mean over those of the mask `(N, L)`."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
