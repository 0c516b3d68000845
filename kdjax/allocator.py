"""The C library's allocator, set so that a step on a CPU finds its memory again."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# From malloc.h of glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_PAD_BYTES = 2**20


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next step, where the CPU computes.

    XLA takes the temporary memory of a step anew each time. Blocks beyond 32 MiB come
    from the kernel page by page and go back to it at the end of the step: zeroing them
    took a fifth of the time of a small one. So: one heap, which is never trimmed, and
    no blocks outside it. The process keeps the most memory it ever had.

    To be called before NumPy and JAX are imported: threads that they have started have
    heaps of their own. Elsewhere than on Linux with glibc, or where JAX has
    accelerators, nothing is done; nor where KDJAX_KEEP_FREED_MEMORY=0.

    Returns:
      Whether it was done.
    """
    if not sys.platform.startswith("linux") or _has_accelerators():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or os.environ.get("KDJAX_KEEP_FREED_MEMORY") == "0":
        return False
    settings = (
        (_ARENA_MAX, 1),
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, -1),
        (_TOP_PAD, _PAD_BYTES),
    )
    return all(mallopt(name, value) == 1 for name, value in settings)


def _has_accelerators() -> bool:
    """Whether JAX may compute elsewhere than on the CPU, without asking JAX."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
