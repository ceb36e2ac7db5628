"""The readable twins: each loss in a few lines over the whole matrix, in one process.

They have the signatures of the streaming losses and serve as the oracles of their tests.
"""

from gc_accel.losses.dense.moments import barlow_twins_loss, hsic_loss, vicreg_loss
from gc_accel.losses.dense.pairs import clip_loss, distillation_loss, siglip_loss
from gc_accel.losses.dense.views import (
    align_uniform_loss,
    dcl_loss,
    dclw_loss,
    nt_xent_loss,
    selfcon_loss,
    spectral_loss,
    supcon_loss,
)

__all__ = [
    "align_uniform_loss",
    "barlow_twins_loss",
    "clip_loss",
    "dcl_loss",
    "dclw_loss",
    "distillation_loss",
    "hsic_loss",
    "nt_xent_loss",
    "selfcon_loss",
    "siglip_loss",
    "spectral_loss",
    "supcon_loss",
    "vicreg_loss",
]
