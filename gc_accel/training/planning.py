"""`--plan`, for programs around a trainer."""

from dataclasses import dataclass
from typing import Any

import torch

from gc_accel.chunking import batch_size
from gc_accel.command_line import option
from gc_accel.losses.accumulated import AccumulatedLoss
from gc_accel.planning.dry_run import DryRun
from gc_accel.planning.plan import Plan, plan
from gc_accel.training.chunk_sizes import SAMPLE
from gc_accel.training.loader import training_loader
from gc_accel.training.trainer import CachedContrastiveTrainer


@dataclass
class PlanArguments:
    """Whether to plan instead of training."""

    plan: bool = option(
        False,
        "Print what a step takes in memory, FLOPs and communication, and which chunk and retain to take, and stop.",
    )


def plan_of(trainer: CachedContrastiveTrainer) -> Plan:
    """The plan of a trainer's step, from a chunk with long texts of its training data.

    Raises:
        ValueError: the loss makes steps of another kind than a gradient cache; there is no chunk.
    """
    if isinstance(trainer.loss, AccumulatedLoss):
        raise ValueError(
            f"expected a loss over all pairs to plan with, got {type(trainer.loss).__name__}, whose steps accumulate "
            "chunks without a cache"
        )
    args, encoder = trainer.args, trainer.encoder
    if args.gradient_checkpointing:
        encoder.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    fixed = int(args.chunk_size) if args.chunk_size.isdecimal() else None
    loader = training_loader(trainer.train_dataset, trainer.data_collator, args, fixed or SAMPLE)
    chunk = loader.longest_chunk()
    if chunk is None:
        raise ValueError("expected samples in the first batch to plan with, got none that can be read")
    if args.precompute_frozen:
        chunk = _precomputed(encoder, chunk)
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    retain: Any = int(args.retain) if args.retain.isdecimal() else args.retain
    return plan(
        encoder,
        chunk,
        args.per_device_train_batch_size,
        args.world_size,
        chunk_size=fixed,
        retain=retain,
        autocast=autocast,
        device=args.device,
    )


def print_plan(trainer: CachedContrastiveTrainer) -> None:
    """Print it, on the first of several processes."""
    if trainer.is_world_process_zero():
        print(plan_of(trainer))


def _precomputed(encoder: Any, chunk: Any) -> Any:
    """What a chunk will be like when the frozen tower has been run, which nobody has to wait for here."""
    for part in encoder.frozen_streams:
        shape = DryRun(encoder, chunk, torch.device("cpu"), None).work(part).shapes[part]
        rest = {key: value for key, value in chunk.items() if key not in encoder.streams[part]}
        chunk = rest | {f"{part}_embeds": torch.empty(batch_size(chunk), *shape)}
    return chunk
