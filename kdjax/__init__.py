"""Distillation of language models in JAX against precomputed teacher outputs."""

__version__ = "0.1.0"
