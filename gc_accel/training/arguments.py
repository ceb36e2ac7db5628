"""Arguments of `CachedContrastiveTrainer`: those of transformers, plus what the cache needs."""

from dataclasses import dataclass

from transformers import TrainingArguments

from gc_accel.training.options import option


@dataclass
class CachedContrastiveArguments(TrainingArguments):
    """`TrainingArguments` in which `per_device_train_batch_size` is the contrastive batch of one device.

    Every option says in its help what it does. Those of memory and speed are explained in `GradientCache`.

    Raises:
        ValueError: an option would change the objective, cannot work with a cache, or is out of range.

    Example:
        >>> args = CachedContrastiveArguments("out", per_device_train_batch_size=1024, chunk_size=64)
    """

    chunk_size: str = option(
        "64",
        "Samples that the encoder sees at once, or 'auto' to find out how many fit. Sets memory and speed, never the "
        "result.",
    )
    retain: str = option(
        "1",
        "Chunks whose graph is kept from the first pass, so that they need no second forward: a number, 'all', or "
        "'auto': as many as the memory budget allows.",
    )
    memory_budget: float | None = option(
        None,
        "What activations may take where 'auto' decides: bytes, beside weights, gradients, optimizer and inputs; or, "
        "up to 1, the fraction of a GPU to fill. Needed on the CPU with retain='auto'.",
    )
    forward_chunk_size: int | None = option(
        None,
        "Samples of a call of the first pass, where it draws no random numbers; by default a chunk, and four of them "
        "on an accelerator (one with gradient checkpointing).",
    )
    reduce_every: int | None = option(
        None,
        "Chunks of the second pass after which FSDP2 reduces gradients, which are those of whole weights until then; "
        "by default once, at the end. Sets memory and speed, never the result.",
    )
    batch_norm: str = option(
        "error",
        "What to do about BatchNorm in training mode: 'error', 'frozen' (running statistics) or 'ghost' (each chunk "
        "its own).",
        choices=["error", "frozen", "ghost"],
    )
    on_drift: str = option(
        "error",
        "What to do if a chunk has other representations in the second pass than in the first, so that gradients would "
        "be wrong: 'error', 'warn' or 'ignore'.",
        choices=["error", "warn", "ignore"],
    )
    sort_by_length: bool = option(
        True, "Sort the texts of a batch by length, to trim chunks. Never the result."
    )
    chunk_tokens: int | None = option(
        None, "Text tokens, padding included, that a chunk has at most; beside chunk_size. Never the result."
    )
    shuffle_buffer: int = option(
        5000, "Rows of a stream that are kept, undecoded, to be shuffled among themselves."
    )
    check_equivalence: bool = option(
        False,
        "Compare a cached with a direct step on the first batch, which then has to fit in memory; print the report and "
        "write it to the output folder.",
    )
    precompute_frozen: bool = option(
        False,
        "Encode the images (or texts) of a frozen tower once, before training, into the output folder; steps then "
        "neither open them nor run that tower. For data that are the same in every epoch.",
    )
    logging_steps: float = option(10, "Steps (or a fraction of all) between logs.")
    remove_unused_columns: bool = option(
        False, "Must stay False: the collator reads raw samples, not model inputs."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chunk_size, self.retain = str(self.chunk_size), str(self.retain)
        self._refuse_what_breaks_a_step()
        self._refuse_what_is_out_of_range()

    def _refuse_what_breaks_a_step(self) -> None:
        reasons = {
            "auto_find_batch_size": "it changes the loss; lower chunk_size",
            "remove_unused_columns": "the collator reads the raw samples",
            "ddp_static_graph": "a step calls the model in several ways",
            "label_smoothing_factor": "no contrastive loss has a use for it",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                raise ValueError(f"expected {name} to be off, got {getattr(self, name)}: {reason}")

    def _refuse_what_is_out_of_range(self) -> None:
        is_size = self.chunk_size.isdecimal() and int(self.chunk_size) > 0
        if not (is_size or self.chunk_size == "auto") or self.per_device_train_batch_size < 1:
            raise ValueError(
                "expected chunk_size and per_device_train_batch_size of at least 1, or a chunk_size of 'auto', got "
                f"{self.chunk_size} and {self.per_device_train_batch_size}"
            )
        if self.chunk_tokens is not None and (self.chunk_tokens < 1 or not self.sort_by_length):
            raise ValueError(
                f"expected chunk_tokens of at least 1, along with sort_by_length, got {self.chunk_tokens}"
            )
        if self.forward_chunk_size is not None and self.forward_chunk_size < 1:
            raise ValueError(f"expected a forward_chunk_size of at least 1, got {self.forward_chunk_size}")
        if self.memory_budget is not None and not self.memory_budget > 0:
            raise ValueError(f"expected a memory_budget above 0, in bytes, got {self.memory_budget}")
        if self.retain not in ("all", "auto") and not self.retain.isdecimal():
            raise ValueError(
                f"expected retain to be a number of chunks, 'all' or 'auto', got {self.retain!r}"
            )
