"""kdjax: distils language models in JAX against precomputed teacher outputs."""

from kdjax import allocator

__version__ = "0.1.0"

allocator.restart_with_huge_pages()  # of a command alone, before JAX is imported
