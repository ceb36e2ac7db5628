"""`CachedContrastiveTrainer`: transformers' Trainer with a cached step.

Callbacks, trackers, resume, save limits, mixed precision, schedulers, clipping, hub and model card are the
library's. Own are the step (a batch in, gradients of the whole batch on the weights), the loader of lazy
batches, evaluation over all pairs, and saving in the model's own format.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import ProcessorMixin, Trainer, TrainerControl
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from gc_accel.contracts import streams_of
from gc_accel.data import ChunkedLoader, StreamLoader
from gc_accel.distributed import GlobalLoss, RankedBatch, alone
from gc_accel.equivalence import check_equivalence_chunks
from gc_accel.evaluation import retrieval_metrics
from gc_accel.gradient_cache import GradientCache
from gc_accel.inputs.nested import batch_size, call
from gc_accel.memory.meters import peak_memory_mib
from gc_accel.training.arguments import CachedContrastiveArguments
from gc_accel.training.callbacks import StepCallback
from gc_accel.training.chunk_sizes import RunChunkSizes
from gc_accel.training.defaults import collator_of, encoder_of, named_loss, pad_as_needed
from gc_accel.training.loader import training_loader
from gc_accel.training.loss_state import load_loss, prepared, save_loss
from gc_accel.training.precomputing import precompute

Representations = dict[str, Tensor]
logger = logging.get_logger(__name__)


class CachedContrastiveTrainer(Trainer):
    """Train a contrastive model at any batch size.

    Args:
        model: an image-text model of transformers or open_clip, or an encoder of `gc_accel`; one of your own
            declares `streams` as those do, and has `save_pretrained` and `load_pretrained`.
        args: `per_device_train_batch_size` is the contrastive batch of one device, `chunk_size` what its
            encoder sees at once.
        loss: a name in `gc_accel.losses.LOSSES`, any callable on representations, or, for image-text models,
            None: "siglip" for one with a logit bias, "clip" otherwise.
        train_dataset: with samples as the collator takes them; map-style, or over a stream, with `max_steps`.
        eval_dataset: likewise, or a dict of such.
        processing_class: a processor with `image_processor` and `tokenizer`; saved along with the model.
        data_collator: from samples to a chunk; `ImageTextCollator(processing_class)` by default.
        compute_metrics: from the representations of the whole evaluation set, and its `labels` if it has
            some, to numbers by name; by default retrieval in both directions.
        kwargs: further arguments of `transformers.Trainer`.
    """

    args: CachedContrastiveArguments
    train_dataset: Any
    control: TrainerControl

    def __init__(
        self,
        model: Any,
        args: CachedContrastiveArguments,
        *,
        loss: str | Callable[..., Tensor] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        data_collator: Callable[..., Any] | None = None,
        compute_metrics: Callable[[Representations], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if data_collator is None:
            data_collator = collator_of(processing_class)
        model = encoder_of(model, data_collator)
        pad_as_needed(model, data_collator)
        if args.n_gpu > 1:
            args._n_gpu = 1  # DataParallel would cut every chunk; further GPUs come by `accelerate launch`
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics=compute_metrics or retrieval_of_pairs,
            **kwargs,
        )
        self.loss: Any = prepared(named_loss(loss, model), model, args.device)
        self.global_names = tuple(getattr(model, "global_names", ()))
        self.shared: Representations = {}  # the globals of the latest call, for the logs
        model.register_forward_hook(self._note_globals)
        self.chunk_sizes = RunChunkSizes()
        self.cache: GradientCache | None = None
        self.is_first_step = True
        self.last_log: tuple[float, int] | None = None  # time and step, from the first step of a run on
        self.add_callback(StepCallback(self.loss))

    @property
    def encoder(self) -> Any:
        """The encoder, without what prepares or wraps it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Leave the gradient of the loss of one batch, a lazy sequence of chunks, on the weights."""
        model.train()
        if isinstance(self.loss, nn.Module):
            self.loss.train()
        self.last_log = self.last_log or (time.monotonic(), self.state.global_step)
        if self.is_first_step:
            self.is_first_step, inputs = False, self._checked(model, inputs)
        self.accelerator.gradient_accumulation_steps = self.current_gradient_accumulation_steps
        cache = self._cache_of(model)
        loss = cache.forward_backward_chunks(inputs) / self.current_gradient_accumulation_steps
        self.chunk_sizes.note(cache.chunk_sizes, self.state)
        return loss

    def _cache_of(self, model: nn.Module) -> GradientCache:
        """One for the whole run, which keeps what it has found out about memory."""
        if self.cache is None or self.cache.encoder is not model:
            retain: Any = int(self.args.retain) if self.args.retain.isdecimal() else self.args.retain
            policy: Any = self.args.batch_norm
            on_drift: Any = self.args.on_drift
            self.cache = GradientCache(
                model,
                self.loss,
                self.chunk_sizes.of_encoder,
                self.accelerator,
                retain,
                policy,
                memory_budget=self.args.memory_budget,
                forward_chunk_size=self.args.forward_chunk_size,
                reduce_every=self.args.reduce_every,
                on_drift=on_drift,
            )
        return self.cache

    def _checked(self, model: nn.Module, inputs: Iterable[Any]) -> Iterable[Any]:
        """The chunks of the first batch, after a comparison of a cached step with a direct one, if it was asked for."""
        if not self.args.check_equivalence or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return inputs  # where parameters are sharded, no rank has the whole encoder
        batch = list(inputs)
        options: dict[str, Any] = {"accelerator": self.accelerator, "batch_norm": self.args.batch_norm}
        report = check_equivalence_chunks(model, self.loss, batch, self.chunk_sizes.of_encoder, **options)
        if self.is_world_process_zero():
            print(report)
            report.save(os.path.join(self.args.output_dir, "equivalence"))
        return batch

    def get_train_dataloader(self) -> DataLoader:
        """A `ChunkedLoader` with as many batches per epoch as `drop_last` leaves of the data set; or of a stream."""
        if self.train_dataset is None:
            raise ValueError("expected a train_dataset, got None: pass one to train")
        self.is_first_step, self.last_log, self.cache = True, None, None
        if self.args.precompute_frozen:
            folder = os.path.join(self.args.output_dir, "precomputed")
            reading: dict[str, Any] = {"num_workers": self.args.dataloader_num_workers}
            reading |= {"batch_size": self.args.eval_batch_size, "progress": not self.args.disable_tqdm}
            source = self.encoder, self.train_dataset, self.data_collator, folder
            self.train_dataset = precompute(*source, accelerator=self.accelerator, **reading)
        open_loader = partial(training_loader, self.train_dataset, self.data_collator, self.args)
        self.chunk_sizes.settle(self.args, self.accelerator, self.model, open_loader)
        return open_loader(self.chunk_sizes.of_loader)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Samples behind a loader, not handles to batches."""
        dataset: Any = dataloader.dataset
        return dataloader.plan.size if isinstance(dataloader, ChunkedLoader) else len(dataset)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The next batches, unread: nothing in them is counted, which would load them."""
        handles = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return handles, None

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: a batch is gone when it has been read."""
        return 0

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """This rank's share of the evaluation set, in chunks; the shares in rank order are the whole."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("expected an eval_dataset, got None: pass one to evaluate")
        rank, world = self.args.process_index, self.args.world_size
        if len(dataset) < world:
            raise ValueError(
                f"expected a sample for each of {world} processes, got {len(dataset)} to evaluate on"
            )
        own = range(rank * len(dataset) // world, (rank + 1) * len(dataset) // world)
        return DataLoader(
            Subset(dataset, own),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # of the workers' seed, apart from the one that dropout uses
        )

    @torch.no_grad()
    def encode(self, dataset: Dataset) -> Representations:
        """Representations `(N, ...)` of a whole data set, in its order, and its `labels`, equal on every rank."""
        return self._encode(self.get_eval_dataloader(dataset))[0]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics over all pairs of the evaluation set, and its loss, taken as one batch."""
        with torch.no_grad():
            reps, shared = self._encode(dataloader)
            metrics = self.compute_metrics(reps)
            metrics["loss"] = float(self._loss_of(reps, shared))
        self.last_log = None  # throughput is that of training alone
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        count = batch_size(reps)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)

    def _encode(self, dataloader: DataLoader) -> tuple[Representations, Representations]:
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models:  # evaluation before any training
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        parts = defaultdict[str, list[Tensor]](list)
        for chunk in dataloader:
            if chunk is None:  # every sample of it was left out
                continue
            chunk, streams = send_to_device(chunk, self.args.device), streams_of(self.encoder)
            inputs, labels = streams.split(chunk), streams.extras(chunk)
            for name, value in (call(model, inputs) | labels).items():
                parts[name].append(value.float() if value.is_floating_point() else value)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if not parts:
            raise ValueError("expected at least one sample to evaluate on, got none that could be read")
        shared = {name: parts.pop(name)[0] for name in self.global_names}
        own = {name: torch.cat(values) for name, values in parts.items()}
        batch = RankedBatch(batch_size(own), self.args.device)
        return {name: batch.gather(value) for name, value in own.items()}, shared

    def _loss_of(self, reps: Representations, shared: Representations) -> Tensor:
        """The loss of gathered representations; to a loss that spans ranks each hands in its own part."""
        if isinstance(self.loss, nn.Module):
            self.loss.eval()
        if isinstance(self.loss, GlobalLoss):
            rank, world = self.args.process_index, self.args.world_size
            reps = {name: value.tensor_split(world)[rank] for name, value in reps.items()}
            return self.loss(**reps, **shared)
        with alone():
            return self.loss(**reps, **shared)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add logit scale, statistics of the loss, throughput and peak memory to the logs of training steps."""
        if "loss" in logs and self.last_log is not None:
            (then, step), now = self.last_log, time.monotonic()
            steps, self.last_log = self.state.global_step - step, (now, self.state.global_step)
            samples = steps * self.get_total_train_batch_size(self.args)
            noted = self.shared | getattr(self.loss, "statistics", {})
            logs |= {name: round(float(value), 4) for name, value in noted.items()}
            logs["samples_per_second"] = round(samples / max(now - then, 1e-9), 1)
            logs["peak_memory_mib"] = round(peak_memory_mib(self.args.device))
            if isinstance(self.callback_handler.train_dataloader, StreamLoader):
                logs["stream_pass"] = self.callback_handler.train_dataloader.plan.epoch
        super().log(logs, start_time)

    def _note_globals(self, module: nn.Module, args: Any, outputs: Representations) -> None:
        self.shared = {name: outputs[name].detach() for name in self.global_names}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        self.encoder.save_pretrained(output_dir, state_dict)
        save_loss(self.loss, output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.chunk_sizes.remember(resume_from_checkpoint)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.encoder.load_pretrained(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # on resume, under every backend
            load_loss(self.loss, checkpoint)

    def _load_best_model(self) -> None:
        load_loss(self.loss, self.state.best_model_checkpoint)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.encoder.load_pretrained(self.state.best_model_checkpoint)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and convolutions: no weight decay on scales, biases and norms, as CLIP trains."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def retrieval_of_pairs(reps: Representations) -> dict[str, float]:
    """Retrieval of texts by images and of images by texts, over the whole evaluation set."""
    return retrieval_metrics(reps["image"], reps["text"], labels=reps.get("labels"))
