"""Train contrastive models at any batch size: exact gradient caching on Accelerate and Transformers."""

from gc_accel.encoders import DualEncoder
from gc_accel.gradient_cache import GradientCache

__all__ = ["DualEncoder", "GradientCache"]
