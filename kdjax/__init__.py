"""kdjax: distils language models in JAX against precomputed teacher outputs."""

from kdjax import allocator

__version__ = "0.1.0"

allocator.keep_freed_memory()  # before anything imports JAX; only if asked for
