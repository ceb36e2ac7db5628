"""Contrastive losses: pure functions of representations, streaming, exact on any number of ranks."""

from gc_accel.losses.align_uniform import AlignUniformLoss
from gc_accel.losses.barlow import BarlowTwinsLoss
from gc_accel.losses.clip import CLIPLoss
from gc_accel.losses.dcl import DCLLoss, DCLWLoss
from gc_accel.losses.distillation import DistillationLoss
from gc_accel.losses.hsic import HSICLoss
from gc_accel.losses.nt_xent import NTXentLoss
from gc_accel.losses.retrieval import RetrievalLoss
from gc_accel.losses.selfcon import SelfConLoss
from gc_accel.losses.siglip import SigLIPLoss
from gc_accel.losses.spectral import SpectralLoss
from gc_accel.losses.stateful.accumulated import AccumulatedLoss, StatefulLoss
from gc_accel.losses.stateful.byol import BYOLLoss
from gc_accel.losses.stateful.moco import MoCoLoss
from gc_accel.losses.stateful.momentum import MomentumEncoder
from gc_accel.losses.stateful.nnclr import NNCLRLoss
from gc_accel.losses.stateful.simsiam import SimSiamLoss
from gc_accel.losses.stateful.swav import SwAVLoss
from gc_accel.losses.supcon import SupConLoss
from gc_accel.losses.vicreg import VICRegLoss

__all__ = [
    "LOSSES",
    "AccumulatedLoss",
    "AlignUniformLoss",
    "BYOLLoss",
    "BarlowTwinsLoss",
    "CLIPLoss",
    "DCLLoss",
    "DCLWLoss",
    "DistillationLoss",
    "HSICLoss",
    "MoCoLoss",
    "MomentumEncoder",
    "NNCLRLoss",
    "NTXentLoss",
    "RetrievalLoss",
    "SelfConLoss",
    "SigLIPLoss",
    "SimSiamLoss",
    "SpectralLoss",
    "StatefulLoss",
    "SupConLoss",
    "SwAVLoss",
    "VICRegLoss",
]

# What `--loss` and `CachedContrastiveTrainer(loss=...)` take by name.
LOSSES = {
    "clip": CLIPLoss,
    "siglip": SigLIPLoss,
    "simclr": NTXentLoss,
    "supcon": SupConLoss,
    "selfcon": SelfConLoss,
    "dcl": DCLLoss,
    "dclw": DCLWLoss,
    "align_uniform": AlignUniformLoss,
    "spectral": SpectralLoss,
    "barlow": BarlowTwinsLoss,
    "vicreg": VICRegLoss,
    "hsic": HSICLoss,
    "swav": SwAVLoss,
    "nnclr": NNCLRLoss,
    "moco": MoCoLoss,
    "byol": BYOLLoss,
    "simsiam": SimSiamLoss,
}
