"""The C library's allocator, set so that a step on a CPU finds its memory again."""

import ctypes
import os

# From malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step: KDJAX_KEEP_FREED_MEMORY=1.

    XLA takes the temporary memory of a step on a CPU anew each time. Blocks beyond 32
    MiB come from the kernel page by page and go back to it at the end of the step:
    zeroing them takes 15 to 25% of a step. So: one heap, which is never trimmed, and no
    blocks outside it. The price is memory: a heap with holes can take twice what a step
    needs. Numbers do not change.

    To be called before NumPy and JAX are imported: threads that they have started have
    heaps of their own. Nothing is done unless the variable is 1.

    Raises:
      ValueError: the C library is not glibc.
    """
    if os.environ.get("KDJAX_KEEP_FREED_MEMORY") != "1":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        raise ValueError(
            "KDJAX_KEEP_FREED_MEMORY=1 needs the C library of Linux, glibc: unset it"
        )
    for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        mallopt(name, value)
