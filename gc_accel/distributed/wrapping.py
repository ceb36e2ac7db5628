"""How an encoder is replicated over ranks: found through whatever holds it, or refused before a weight has moved."""

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel


def ddp_modules(encoder: Any) -> list[DistributedDataParallel]:
    """Every `DistributedDataParallel` of a module: itself, what is compiled, or parts of it, such as two towers."""
    if not isinstance(encoder, nn.Module):
        return []
    return [module for module in encoder.modules() if isinstance(module, DistributedDataParallel)]


def check_wrapping(encoder: Any, model: Any, accelerator: Accelerator | None) -> None:
    """Refuse an encoder that is wrapped in a way that cannot be exact.

    Args:
        encoder: as it is called.
        model: the same without what wraps it.
        accelerator: the one that prepared it, if any.

    Raises:
        ValueError: naming the wrap.
    """
    if isinstance(encoder, FSDPModule) and accelerator is None:
        raise ValueError("expected the accelerator that prepared the sharded encoder, got None: pass it")
    prepared = [model]
    if accelerator is not None and accelerator.num_processes > 1:
        prepared = accelerator._models
    if not any(known is encoder or known is model for known in prepared):
        raise ValueError(
            "expected the encoder that accelerator.prepare returned, got another: its gradients would never "
            "be reduced over ranks"
        )
    if not isinstance(encoder, nn.Module):
        return
    for module in encoder.modules():
        if isinstance(module, (DataParallel, FullyShardedDataParallel)):
            raise ValueError(
                f"expected DistributedDataParallel or FSDP2 (fully_shard), got {type(module).__name__}: wrap the "
                "encoder in one of these"
            )
    _check_ddp(encoder)


def _check_ddp(encoder: nn.Module) -> None:
    wrapped = ddp_modules(encoder)
    if any(module.static_graph for module in wrapped):
        raise ValueError(
            "expected DistributedDataParallel without static_graph, got static_graph=True: a step calls "
            "it in several ways. Use find_unused_parameters=True instead"
        )
    if len({module.process_group for module in wrapped}) > 1:
        raise ValueError("expected one process group for all DistributedDataParallel parts, got several")
    reduced = {weight for module in wrapped for weight in module.parameters()}
    outside = (
        [n for n, p in encoder.named_parameters() if p.requires_grad and p not in reduced] if wrapped else []
    )
    if outside:
        raise ValueError(
            f"expected every weight that trains in DistributedDataParallel, got {outside} outside of it: their "
            "gradients would never be reduced over ranks. Wrap the whole encoder"
        )


def refuse_hidden_ddp(module: nn.Module) -> None:
    """Refuse `DistributedDataParallel` behind a function.

    Raises:
        ValueError: a module that a function calls is wrapped in it, or a part of that module.
    """
    if ddp_modules(module):
        raise ValueError(
            "expected DistributedDataParallel as the encoder, got a function around it: its ranks would not be "
            "told when to reduce. Pass it, or accelerator.prepare's module, itself"
        )
