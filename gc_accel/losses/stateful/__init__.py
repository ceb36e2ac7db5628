"""Losses with a state that moves once per batch, or that need less than a gradient cache."""
