"""Optimisation: loss, gradient and step."""
