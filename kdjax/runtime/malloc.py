"""glibc malloc: huge pages, and returning freed memory to the kernel."""

import ctypes
import os
import pathlib
import sys

_TUNABLE = "glibc.malloc.hugetlb"
_OLDEST_GLIBC = (2, 35)  # that has the tunable
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_TRANSPARENT_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def reexec_with_huge_pages() -> None:
    """Replace a command's process by one with GLIBC_TUNABLES=glibc.malloc.hugetlb=1.

    XLA takes the temporary memory of a step on a CPU from the kernel anew each time:
    4 KiB at a time that is a fifth of a small step. With the tunable, malloc asks for
    huge pages (2 MiB) for large blocks; a process can only be given it when it starts.
    Numbers and the memory that is needed do not change.

    Commands call it before they import JAX. Any other process stays as it is, as does
    one that `huge_page_environment` has nothing for.
    """
    environment = huge_page_environment()
    if environment and _is_command(sys.orig_argv):
        # Once at most: a process with privileges loses its tunables.
        os.environ.update(environment | {"KDJAX_HUGE_PAGES": "0"})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def huge_page_environment() -> dict[str, str]:
    """Return the environment variables that give a new process huge pages.

    {} where they are not to be had by asking (Linux, glibc 2.35, transparent huge pages
    "madvise"), if the tunable is set already, or with KDJAX_HUGE_PAGES=0.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    disabled = os.environ.get("KDJAX_HUGE_PAGES") == "0" or _TUNABLE in tunables
    if disabled or not _available():
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))}


def trim() -> None:
    """Return to the kernel what has been freed; nothing where malloc is not glibc's.

    malloc keeps what threads free: after a checkpoint is written as much as it holds.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def trim_after_compile() -> None:
    """Return to the kernel, from now on, what XLA's compiler has freed.

    malloc keeps it otherwise, 100 MiB and more for a small step, beside the memory of
    the steps. Milliseconds per compilation; nothing where malloc is not glibc's.
    """
    if _malloc_trim is None:
        return

    import jax  # a command may be replaced before it is imported

    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == _COMPILE_EVENT:
            trim()

    jax.monitoring.register_event_duration_secs_listener(listener)


def _is_command(arguments: list[str]) -> bool:
    """Return whether `arguments` started the command that runs as __main__.

    They are python [options] -m kdjax.COMMAND ..., or the console script's. A process
    that runs a command in another way (forked, in a test) cannot be started again.
    """
    spec = sys.modules["__main__"].__spec__
    if spec is None or not spec.name.startswith("kdjax."):
        return False
    if "-m" in arguments[:-1]:
        module = arguments[arguments.index("-m") + 1]
        return module in ("kdjax", spec.name)
    return any(pathlib.Path(argument).name == "kdjax" for argument in arguments[1:])


def _available() -> bool:
    """Return whether the kernel gives huge pages on request, and glibc can request."""
    if not _is_linux() or not _TRANSPARENT_HUGE_PAGES.is_file():
        return False
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    recent = name == "glibc" and numbers >= _OLDEST_GLIBC
    return recent and "[madvise]" in _TRANSPARENT_HUGE_PAGES.read_text()


def _is_linux() -> bool:
    return sys.platform == "linux"


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _is_linux() else None
