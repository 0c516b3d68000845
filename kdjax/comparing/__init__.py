"""Grids of runs: what they are, how they run, what they gave."""
