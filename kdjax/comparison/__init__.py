"""Grids of runs: planning, running and reporting."""
