"""Weights: layers, heads, units, and what saving keeps."""
