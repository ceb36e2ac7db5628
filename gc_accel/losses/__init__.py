"""Contrastive losses: pure functions of representations, streaming, exact on any number of ranks."""

from gc_accel.losses.clip import CLIPLoss
from gc_accel.losses.siglip import SigLIPLoss

__all__ = ["CLIPLoss", "SigLIPLoss"]
