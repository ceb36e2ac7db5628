"""In place of `grad_cache.functional`."""

from gc_accel.compat.functional import cached, cat_input_tensor, gather_input_tensor

__all__ = ["cached", "cat_input_tensor", "gather_input_tensor"]
