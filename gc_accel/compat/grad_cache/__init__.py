"""In place of `grad_cache`: the class here, losses in `.loss`, decorators in `.functional`."""

from gc_accel.compat.grad_cache.grad_cache import GradCache

__all__ = ["GradCache"]
