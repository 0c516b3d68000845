"""What is asked of malloc: huge pages, and to give back what compiling has freed."""

import ctypes
import os
import pathlib
import sys

_TUNABLE = "glibc.malloc.hugetlb"
_OLDEST = (2, 35)  # glibc that has it
_COMPILED = "/jax/core/compile/backend_compile_duration"
_STATE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Starts a command of kdjax anew with GLIBC_TUNABLES=glibc.malloc.hugetlb=1.

    XLA takes the temporary memory of a step on a CPU from the kernel anew each time:
    4 KiB at a time that is a fifth of a small step. With the tunable, malloc asks for
    huge pages (2 MiB) for large blocks; a process can only be given it when it starts.
    Numbers and the memory that is needed do not change.

    Only `python -m kdjax.VERB` is started anew, as it was and in the same process,
    before anything is imported; see `environment` for when.
    """
    if _is_command(sys.orig_argv) and (wanted := environment()):
        # Once at most: a process with privileges loses its tunables.
        os.environ.update(wanted | {"KDJAX_HUGE_PAGES": "0"})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def environment() -> dict[str, str]:
    """What a process needs in its environment to get huge pages.

    {} where they are not to be had by asking (Linux, glibc 2.35, transparent huge pages
    "madvise"), if the tunable is set already, or with KDJAX_HUGE_PAGES=0.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    unwanted = os.environ.get("KDJAX_HUGE_PAGES") == "0" or _TUNABLE in tunables
    if unwanted or not _available():
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))}


def give_back_after_compiling() -> None:
    """From now on what XLA's compiler has freed goes back to the kernel at once.

    malloc keeps it otherwise, 100 MiB and more for a small step, beside the memory of
    the steps. Milliseconds for each compilation; nothing where malloc is not glibc's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _is_linux() else None
    if trim is None:
        return
    import jax  # only now: commands are started anew before it is imported

    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == _COMPILED:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listener)


def _is_command(arguments: list[str]) -> bool:
    """Whether a process was started as python [options] -m kdjax.VERB ..."""
    if "-m" not in arguments[:-1]:
        return False
    return arguments[arguments.index("-m") + 1].startswith("kdjax.")


def _available() -> bool:
    """Whether the kernel gives huge pages to those who ask, and glibc can ask."""
    if not _is_linux() or not _STATE.is_file():
        return False
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    recent = name == "glibc" and numbers >= _OLDEST
    return recent and "[madvise]" in _STATE.read_text()


def _is_linux() -> bool:
    return sys.platform == "linux"
