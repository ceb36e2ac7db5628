"""The chunk sizes of a run: given or measured at its start, smaller after memory has run out, kept on resume.

What the loader cuts stays the same for the whole run, and what the encoder sees at once becomes a part of that. Both
are in the trainer's state, because random draws go by chunk: a run that is resumed has to cut like before.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from gc_accel.data import ChunkedLoader
from gc_accel.distributed import Replicas
from gc_accel.distributed.collectives import lowest
from gc_accel.distributed.replicas import SHARDING
from gc_accel.memory.fitting import fit_chunk_size
from gc_accel.state.modules import in_mode
from gc_accel.training.arguments import CachedContrastiveArguments

KEY = "chunk_sizes"  # among the states of the callbacks, the part of the trainer's state that is free in form
SAMPLE = 16  # samples to measure with, which are repeated where more of them are needed
logger = logging.get_logger(__name__)


class RunChunkSizes:
    """The chunk sizes that are known, 0 before.

    Attributes:
        of_loader: samples of a chunk as it is cut from the data.
        of_encoder: samples that the encoder sees at once, for all streams or by stream.
    """

    def __init__(self) -> None:
        self.of_loader = 0
        self.of_encoder: int | Mapping[str, int] = 0

    def settle(
        self,
        args: CachedContrastiveArguments,
        accelerator: Accelerator,
        model: nn.Module,
        open_loader: Callable[[int], ChunkedLoader],
    ) -> None:
        """Take the size that is given, or measure with long texts of the data, unless a checkpoint has said it.

        Args:
            model: of the trainer, before it is prepared.
            open_loader: from a chunk size to a loader of batches.

        Raises:
            ValueError: parameters are sharded; no sample can be read, or not even one fits.
        """
        if args.chunk_size != "auto":
            if self.of_loader != int(args.chunk_size):
                self.of_loader = self.of_encoder = int(args.chunk_size)
            return
        if self.of_loader:
            return
        if accelerator.distributed_type in SHARDING and args.world_size > 1:
            raise ValueError("expected a number of samples for sharded parameters, got chunk_size='auto'")
        sample = open_loader(SAMPLE).longest_chunk()
        if not lowest([sample is not None], args.device)[0]:
            raise ValueError(
                "expected samples in the first batch of every process, got none that can be read"
            )
        encoder = extract_model_from_parallel(model, keep_torch_compile=False)
        with in_mode(encoder, True), accelerator.autocast():
            self.of_loader = self.of_encoder = fit_chunk_size(
                sample,
                Replicas(encoder, None),
                args.memory_budget,
                most=args.per_device_train_batch_size,
                forward_chunk_size=args.forward_chunk_size,
                world_size=args.world_size,
            )
        logger.warning("chunk_size='auto': chunks of %d samples.", self.of_loader)

    def note(self, chunk_sizes: Mapping[str, int], state: TrainerState) -> None:
        """After a step, what the encoder's have become, into the trainer's state."""
        self.of_encoder = dict(chunk_sizes)
        state.stateful_callbacks[KEY] = {"loader": self.of_loader, "encoder": self.of_encoder}

    def remember(self, checkpoint: str) -> None:
        """On resume, take those of the checkpoint."""
        file = Path(checkpoint) / TRAINER_STATE_NAME
        noted = TrainerState.load_from_json(str(file)).stateful_callbacks.get(KEY) if file.is_file() else None
        if noted is not None:
            self.of_loader, self.of_encoder = noted["loader"], noted["encoder"]
