"""What a trainer's callback does around epochs and steps, whatever wraps the loader and the optimizer."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from gc_accel.data.loading.streaming import StreamLoader
from gc_accel.encoders import DualEncoder
from gc_accel.losses import AccumulatedLoss
from gc_accel.training.arguments import CachedContrastiveArguments

logger = logging.get_logger(__name__)


class StepCallback(TrainerCallback):
    """Tell the loader its epoch, clamp the logit scale, move the momentum encoder, count what was left out."""

    def __init__(self, loss: Any = None) -> None:
        self.loss = loss

    def on_epoch_begin(
        self,
        args: CachedContrastiveArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        # On resume the Trainer wraps the loader to skip batches, and the wrapper has no set_epoch. A stream is read
        # in one epoch, though that of a checkpoint is 1.0 if it was the end of a shorter run.
        is_stream = isinstance(train_dataloader, StreamLoader)
        train_dataloader.set_epoch(0 if is_stream else int(state.epoch or 0))
        if is_stream:
            # One list for both: what is noted of a pass goes into trainer_state.json, and a resumed run has it.
            train_dataloader.plan.passes = state.stateful_callbacks.setdefault("stream_passes", [])

    def on_optimizer_step(
        self,
        args: CachedContrastiveArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        encoder = extract_model_from_parallel(model, keep_torch_compile=False)
        if isinstance(encoder, DualEncoder):
            encoder.clamp_logit_scale()
        if isinstance(self.loss, AccumulatedLoss) and self.loss.teacher is not None:
            self.loss.teacher.update(encoder, progress=state.global_step / state.max_steps)

    def on_train_end(
        self,
        args: CachedContrastiveArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        skipped = getattr(train_dataloader.samples, "skipped", 0)
        if skipped:
            logger.warning(
                "%d unreadable image(s) were left out of training, each time one was drawn", skipped
            )
