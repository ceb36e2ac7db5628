"""Batches as lazy sequences of chunks, of a data set or of a stream."""
