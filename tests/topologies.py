"""Ways to train on several ranks, each prepared by accelerate, on the CPU and over gloo."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

ONE_PROCESS, DDP_2, FSDP2 = "one process", "DDP-2", "FSDP2"
ZERO = {"ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}  # the stage of each
WORLD_SIZES = {ONE_PROCESS: 1, DDP_2: 2, "DDP-4": 4, FSDP2: 2, **dict.fromkeys(ZERO, 2)}


@dataclass
class Prepared:
    """What `accelerator.prepare` made of an encoder, an optimizer at learning rate 1, and its steps."""

    accelerator: Accelerator
    encoder: Any
    optimizer: Any
    before: dict[str, Tensor]
    trained: list[str]
    steps: list[Any]

    def gradients(self) -> dict[str, Tensor]:
        """Of all ranks, by parameter; ZeRO keeps them to itself, so there it is what one step took away."""
        if isinstance(self.accelerator.state.deepspeed_plugin, DeepSpeedPlugin):
            after = weights(self.accelerator.unwrap_model(self.encoder))
            return {name: self.before[name] - after[name] for name in after}
        named = self.accelerator.unwrap_model(self.encoder).named_parameters()
        return {name: whole(p.grad).clone() for name, p in named if p.grad is not None}


def prepare(topology: str, encoder: nn.Module, *, scaler: Any = None, **options: Any) -> Prepared:
    """Prepare an encoder that was built before: ZeRO-3 shards what is built in its presence."""
    before, trained = weights(encoder), {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    steps: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    accelerator = accelerator_for(topology, **options)
    accelerator.scaler = scaler
    encoder, prepared = accelerator.prepare(encoder, optimizer)
    return Prepared(accelerator, encoder, prepared, before, list(trained), steps)


def accelerator_for(topology: str, **options: Any) -> Accelerator:
    """The first one, or another: its state is shared by all instances of a process."""
    forget_accelerators()
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "localhost"}
    state = PartialState(cpu=True)
    assert state.num_processes == WORLD_SIZES[topology]
    if topology == FSDP2 or topology in ZERO:  # which accelerate offers to accelerators only
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        options |= sharding(topology, options.get("gradient_accumulation_steps", 1))
    else:
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        options |= {"cpu": True, "kwargs_handlers": [unused]}
    return Accelerator(**options)


def sharding(topology: str, accumulation: int) -> dict[str, Any]:
    """The plugin of accelerate, told only what it has to be told."""
    if topology == FSDP2:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        return {"fsdp_plugin": plugin}
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute to compile, and gloo does
    stage = ZERO[topology]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # accelerate's default is 1
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)}


def forget_accelerators() -> None:
    """Let the next accelerator be of another kind."""
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    GradientState._reset_state()


def weights(encoder: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, whole."""
    named = dict(encoder.named_parameters())
    if any(hasattr(p, "ds_id") for p in named.values()):  # ZeRO-3 marks them so
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: p.detach().clone() for name, p in named.items()}
    return {name: whole(p.detach()).clone() for name, p in named.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Reductions(TorchDispatchMode):
    """Counts the numbers that ranks add up, whoever asks for it: one gradient per parameter is one reduction."""

    INPUTS: ClassVar[dict[str, int]] = {
        "c10d::allreduce_": 0,
        "c10d::reduce_": 0,
        "c10d::_reduce_scatter_base_": 1,
    }

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.name():
            inputs = args[self.INPUTS[func.name().removesuffix(".default")]]
            tensors: Iterable[Tensor] = [inputs] if isinstance(inputs, Tensor) else inputs
            self.numbers += sum(each.numel() for each in tensors)
        return func(*args, **(kwargs or {}))
