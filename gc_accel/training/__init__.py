"""Training with the Trainer of Transformers: a batch in, an optimizer step out."""

from gc_accel.training.arguments import CachedContrastiveArguments
from gc_accel.training.trainer import CachedContrastiveTrainer, retrieval_of_pairs

__all__ = ["CachedContrastiveArguments", "CachedContrastiveTrainer", "retrieval_of_pairs"]
