"""Pictures for a person: the curves of a training, what images retrieve, a map of the embeddings.

Drawn on matplotlib's Agg canvas without pyplot: no display is needed and no global state is touched.
"""

from gc_accel.pictures.curves import training_curve
from gc_accel.pictures.embeddings import embedding_map
from gc_accel.pictures.sheet import retrieval_sheet

__all__ = ["embedding_map", "retrieval_sheet", "training_curve"]
