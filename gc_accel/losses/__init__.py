"""Contrastive losses: pure functions of representations, streaming, exact on any number of ranks."""

from gc_accel.losses.clip import CLIPLoss
from gc_accel.losses.siglip import SigLIPLoss

__all__ = ["LOSSES", "CLIPLoss", "SigLIPLoss"]

# What `--loss` and `CachedContrastiveTrainer(loss=...)` take by name.
LOSSES = {"clip": CLIPLoss, "siglip": SigLIPLoss}
