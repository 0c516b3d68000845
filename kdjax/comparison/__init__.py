"""Grids of runs: planning, running and reporting."""

from kdjax.comparison.grid import Comparison

__all__ = ["Comparison"]
