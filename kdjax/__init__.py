"""kdjax: distils language models in JAX against precomputed teacher outputs."""

import sys

from kdjax import allocator

__version__ = "0.1.0"

# "-m": this process was started as `python -m kdjax.VERB` and has imported nothing yet.
if sys.argv[0] == "-m":
    allocator.keep_freed_memory()
