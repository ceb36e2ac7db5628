"""In place of `grad_cache_con_learning`: the class here, losses in `.losses`."""

from gc_accel.compat.grad_cache_con_learning.grad_cache import GradCache

__all__ = ["GradCache"]
