"""`--plan`, for programs around a trainer."""

from dataclasses import dataclass
from typing import Any

import torch

from gc_accel.command_line import option
from gc_accel.losses.accumulated import AccumulatedLoss
from gc_accel.planning.plan import Plan, plan
from gc_accel.training.trainer import CachedContrastiveTrainer


@dataclass
class PlanArguments:
    """Whether to plan instead of training."""

    plan: bool = option(
        False,
        "Print what a step takes in memory, FLOPs and communication, and which chunk and retain to take, and stop.",
    )


def plan_of(trainer: CachedContrastiveTrainer) -> Plan:
    """The plan of a trainer's step, from the first chunk of its training data.

    Raises:
        ValueError: the loss makes steps of another kind than a gradient cache.
    """
    if isinstance(trainer.loss, AccumulatedLoss):
        raise ValueError(
            f"expected a loss over all pairs to plan with, got {type(trainer.loss).__name__}, whose steps accumulate "
            "chunks without a cache"
        )
    args, encoder = trainer.args, trainer.encoder
    if args.gradient_checkpointing:
        encoder.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    chunk = next(iter(next(iter(trainer.get_train_dataloader()))))
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    retain: Any = int(args.retain) if args.retain.isdecimal() else args.retain
    return plan(
        encoder,
        chunk,
        args.per_device_train_batch_size,
        args.world_size,
        chunk_size=int(args.chunk_size) if args.chunk_size.isdecimal() else None,
        retain=None if retain == "auto" else retain,
        autocast=autocast,
        device=args.device,
    )


def print_plan(trainer: CachedContrastiveTrainer) -> None:
    """Print it, on the first of several processes."""
    found = plan_of(trainer)  # on all of them, which read their data together
    if trainer.is_world_process_zero():
        print(found)
