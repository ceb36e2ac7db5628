"""The epoch, as data loader workers see it."""

import torch


class SharedEpoch:
    """A number in shared memory, 0 at first, so that workers that are already running see it change.

    Example:
        >>> epoch = SharedEpoch()
        >>> epoch.set(3)
        >>> int(epoch)
        3
    """

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        """Change the number, for this process and for all that share it."""
        self._value.fill_(epoch)

    def __int__(self) -> int:
        return int(self._value)
