"""Contrastive losses: pure functions of representations, streaming, exact on any number of ranks."""

from gc_accel.losses.clip import CLIPLoss
from gc_accel.losses.nt_xent import NTXentLoss
from gc_accel.losses.selfcon import SelfConLoss
from gc_accel.losses.siglip import SigLIPLoss
from gc_accel.losses.supcon import SupConLoss

__all__ = ["LOSSES", "CLIPLoss", "NTXentLoss", "SelfConLoss", "SigLIPLoss", "SupConLoss"]

# What `--loss` and `CachedContrastiveTrainer(loss=...)` take by name.
LOSSES = {
    "clip": CLIPLoss,
    "siglip": SigLIPLoss,
    "simclr": NTXentLoss,
    "supcon": SupConLoss,
    "selfcon": SelfConLoss,
}
