"""Autocast as it is at one moment, to be brought back for a chunk's second pass.

Inside of an autograd function autocast is off, and some trainers leave it before they call `backward`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AutocastState:
    """Whether and to what a device autocasts."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device: torch.device) -> "AutocastState":
        """As it is now."""
        return cls(device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def restored(self) -> torch.autocast:
        """A block in which it is like that again."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)
