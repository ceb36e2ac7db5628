"""What a step will cost, before it is run: `print(plan(model, sample, batch_size))`."""

from gc_accel.planning.fit import largest_chunk
from gc_accel.planning.live import LiveBytes
from gc_accel.planning.plan import Plan, plan

__all__ = ["LiveBytes", "Plan", "largest_chunk", "plan"]
