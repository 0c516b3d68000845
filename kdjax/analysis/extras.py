"""Packages of the extras `compare` and `study`, imported when they are needed."""

import importlib
from typing import Any


def load(name: str, *, extra: str = "compare") -> Any:
    """Import a package of an extra.

    Args:
      name: dotted name of a module.
      extra: that has it.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"package={name!r} is not installed, and the extra {extra!r} has it: "
            f"pip install 'kdjax[{extra}]'"
        ) from error
