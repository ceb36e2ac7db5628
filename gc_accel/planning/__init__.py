"""What a step will cost, before it is run: `print(plan(model, sample, batch_size))`."""

from gc_accel.planning.plan import Plan, plan

__all__ = ["Plan", "plan"]
