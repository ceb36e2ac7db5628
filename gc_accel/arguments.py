"""Arguments of `CachedContrastiveTrainer`: those of transformers, plus what the cache needs."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class CachedContrastiveArguments(TrainingArguments):
    """`TrainingArguments` in which `per_device_train_batch_size` is the contrastive batch of one device.

    Args:
        chunk_size: samples that the encoder sees at once.
        retain: chunks whose graph is kept from the first pass: a number, or "all".
        batch_norm: what to do about BatchNorm in training mode, see `gc_accel/batch_norm.py`.
        sort_by_length: sort the texts of a batch by length before it is cut into chunks.
        chunk_tokens: text tokens, padding included, that a chunk has at most, beside `chunk_size`.
        check_equivalence: compare a cached with a direct step on the first batch (`gc_accel/equivalence`).

    Raises:
        ValueError: for values that would change the objective or cannot work with a cache.
    """

    chunk_size: int = field(
        default=64,
        metadata={"help": "Samples that the encoder sees at once. Sets memory and speed, never the result."},
    )
    retain: str = field(
        default="1",
        metadata={"help": "Chunks whose graph is kept from the first pass: a number, or 'all'."},
    )
    batch_norm: str = field(
        default="error",
        metadata={
            "help": "What to do about BatchNorm in training mode: 'error', 'frozen' (running statistics) or 'ghost' "
            "(each chunk its own).",
            "choices": ["error", "frozen", "ghost"],
        },
    )
    sort_by_length: bool = field(
        default=True,
        metadata={"help": "Sort the texts of a batch by length, to trim chunks. Never the result."},
    )
    chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Text tokens, padding included, that a chunk has at most; beside chunk_size. Never the result."
        },
    )
    check_equivalence: bool = field(
        default=False,
        metadata={
            "help": "Compare a cached with a direct step on the first batch, which then has to fit in memory; print "
            "the report and write it to the output folder."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps (or a fraction of all) between logs."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads raw samples, not model inputs."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.retain = str(self.retain)
        refused = {
            "auto_find_batch_size": (
                self.auto_find_batch_size,
                "it changes the loss; lower chunk_size",
            ),
            "remove_unused_columns": (self.remove_unused_columns, "the collator reads the raw samples"),
            "ddp_static_graph": (bool(self.ddp_static_graph), "a step calls the model in several ways"),
            "label_smoothing_factor": (
                self.label_smoothing_factor != 0,
                "no contrastive loss has a use for it",
            ),
        }
        for name, (wrong, reason) in refused.items():
            if wrong:
                raise ValueError(f"expected {name} to be off, got {getattr(self, name)}: {reason}")
        if self.chunk_size < 1 or self.per_device_train_batch_size < 1:
            raise ValueError(
                "expected chunk_size and per_device_train_batch_size of at least 1, got "
                f"{self.chunk_size} and {self.per_device_train_batch_size}"
            )
        if self.chunk_tokens is not None and (self.chunk_tokens < 1 or not self.sort_by_length):
            raise ValueError(
                f"expected chunk_tokens of at least 1, along with sort_by_length, got {self.chunk_tokens}"
            )
        if self.retain != "all" and not self.retain.isdecimal():
            raise ValueError(f"expected retain to be a number of chunks or 'all', got {self.retain!r}")
