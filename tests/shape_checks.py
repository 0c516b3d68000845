"""Checks of types and of jaxtyping's shapes while the tests run."""

import contextlib
from collections.abc import Callable, Iterator

import beartype
from jaxtyping import config, install_import_hook

# An int may stand for a float, as type checkers have it.
typechecker: Callable = beartype.beartype(
    conf=beartype.BeartypeConf(is_pep484_tower=True)
)


def install(package: str) -> None:
    """Check arguments and results of the functions of a package imported later on."""
    install_import_hook(package, f"{__name__}.typechecker")


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Call checked functions as a user does: their own errors are seen."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
