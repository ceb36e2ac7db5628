"""Nested inputs as samples and chunks: cut, joined, packed, trimmed."""
