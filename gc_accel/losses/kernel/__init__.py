"""Sums over all pairs of a similarity matrix, a tile at a time, forward and backward."""
