"""`--plan`, for programs around a trainer."""

from dataclasses import dataclass
from typing import Any

import torch

from gc_accel.distributed import Replicas
from gc_accel.inputs.nested import batch_size
from gc_accel.losses import CLIPLoss, SigLIPLoss
from gc_accel.losses.multiview import MultiViewLoss
from gc_accel.losses.stateful.accumulated import AccumulatedLoss
from gc_accel.memory.retention import Retention
from gc_accel.planning.dry_run import DryRun
from gc_accel.planning.plan import Plan, plan
from gc_accel.training.chunk_sizes import SAMPLE
from gc_accel.training.loader import training_loader
from gc_accel.training.options import option
from gc_accel.training.precomputing import frozen_tower
from gc_accel.training.trainer import CachedContrastiveTrainer


@dataclass
class PlanArguments:
    """Whether to plan instead of training."""

    plan: bool = option(
        False,
        "Print what a step takes in memory, FLOPs and communication, and which chunk and retain to take, and stop.",
    )


def plan_of(trainer: CachedContrastiveTrainer) -> Plan:
    """Plan a step of a trainer, from a chunk with long texts of its training data.

    Raises:
        ValueError: the loss makes steps of another kind than a gradient cache; there is no chunk; the run itself would
            be refused: "auto" without a budget on the CPU, no frozen tower to precompute.
    """
    if isinstance(trainer.loss, AccumulatedLoss):
        raise ValueError(
            f"expected a loss over all pairs to plan with, got {type(trainer.loss).__name__}, whose steps accumulate "
            "chunks without a cache"
        )
    args, encoder = trainer.args, trainer.encoder
    if args.gradient_checkpointing:
        encoder.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    chunk_size: Any = int(args.chunk_size) if args.chunk_size.isdecimal() else args.chunk_size
    samples = SAMPLE if chunk_size == "auto" else chunk_size
    loader = training_loader(trainer.train_dataset, trainer.data_collator, args, samples)
    chunk = loader.longest_chunk()
    if chunk is None:
        raise ValueError("expected samples in the first batch to plan with, got none that can be read")
    if args.precompute_frozen:
        chunk = _precomputed(encoder, chunk)
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    retain: Any = int(args.retain) if args.retain.isdecimal() else args.retain
    Retention(retain, args.memory_budget, Replicas(encoder, None))  # refuses what the run would refuse
    return plan(
        encoder,
        chunk,
        args.per_device_train_batch_size,
        args.world_size,
        chunk_size=chunk_size,
        retain=retain,
        autocast=autocast,
        device=args.device,
        memory_budget=args.memory_budget,
        forward_chunk_size=args.forward_chunk_size,
    )


def print_plan(trainer: CachedContrastiveTrainer) -> None:
    """Print the plan of a trainer's step, on the first of several processes."""
    if not trainer.is_world_process_zero():
        return
    print(plan_of(trainer))
    if not isinstance(trainer.loss, (CLIPLoss, SigLIPLoss, MultiViewLoss)):
        name = type(trainer.loss).__name__
        print(f"The loss counts as one over all pairs, in tiles; {name} may take another part of the step.")


def _precomputed(encoder: Any, chunk: Any) -> Any:
    """The chunk with representations of the frozen tower, of the right shape, though the tower has not been run."""
    tower = frozen_tower(encoder)
    shape = DryRun(encoder, chunk, torch.device("cpu"), None).work(tower).shapes[tower]
    rest = {key: value for key, value in chunk.items() if key not in encoder.streams[tower]}
    return rest | {f"{tower}_embeds": torch.empty(batch_size(chunk), *shape)}
