"""Train contrastive models at any batch size: exact gradient caching on Accelerate and Transformers."""

from gc_accel.compat import moved
from gc_accel.encoders import DualEncoder, VisionEncoder
from gc_accel.equivalence import check_equivalence
from gc_accel.gradient_cache import GradientCache
from gc_accel.training import CachedContrastiveArguments, CachedContrastiveTrainer

moved.register()

__all__ = [
    "CachedContrastiveArguments",
    "CachedContrastiveTrainer",
    "DualEncoder",
    "GradientCache",
    "VisionEncoder",
    "check_equivalence",
]
