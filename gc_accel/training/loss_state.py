"""What a loss knows of earlier batches, in checkpoints: queues, momentum encoders, parameters of its own."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from gc_accel.losses import AccumulatedLoss, MomentumEncoder

FILE = "loss.safetensors"


def prepared(loss: Any, encoder: nn.Module, device: torch.device) -> Any:
    """The loss on the device, with a momentum encoder of the encoder if it wants one and has none."""
    if isinstance(loss, AccumulatedLoss) and loss.targets_from == "teacher" and loss.teacher is None:
        loss.teacher = MomentumEncoder(encoder)
    return loss.to(device) if isinstance(loss, nn.Module) else loss


def save_loss(loss: Any, directory: str | Path) -> None:
    """Write the state of a loss beside the model, if it has any."""
    if _has_state(loss):
        save_model(loss, str(Path(directory) / FILE))


def load_loss(loss: Any, directory: str | Path) -> None:
    """Read what `save_loss` wrote into the loss, in place.

    Raises:
        ValueError: the loss has a state, and none was saved.
    """
    if not _has_state(loss):
        return
    file = Path(directory) / FILE
    if not file.is_file():
        raise ValueError(
            f"expected the state of {type(loss).__name__} in {file}, got no such file: start anew"
        )
    load_model(loss, str(file))


def _has_state(loss: Any) -> bool:
    return isinstance(loss, nn.Module) and bool(loss.state_dict())
