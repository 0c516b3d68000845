"""kdjax: distils language models in JAX against precomputed teacher outputs."""

from kdjax.runtime import malloc

__version__ = "0.1.0"

malloc.restart_with_huge_pages()  # of a command alone, before JAX is imported
