"""Random draws of a data set, from seed, epoch and index alone."""

from typing import Any, SupportsIndex

import numpy as np
import torch
from torch.utils.data import Dataset


class EpochDataset(Dataset[Any]):
    """A data set that draws something anew in every epoch, such as one of several captions.

    A draw depends on nothing but (seed, epoch, index): not on the order, the workers or what was drawn before. So a
    run that is resumed repeats the draws of the run that was interrupted.

    Args:
        seed: random seed of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch from now on, also in workers that are already running; the first epoch is 0."""
        self._epoch.fill_(epoch)

    def _seed_of(self, index: SupportsIndex) -> np.random.SeedSequence:
        """The seed of what is drawn for one sample."""
        return np.random.SeedSequence((self.seed, int(self._epoch), int(index)))
