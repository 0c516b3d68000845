"""Packages of the extra `compare`, imported when they are needed."""

import importlib
from typing import Any


def load(name: str) -> Any:
    """Import a package of the extra.

    Args:
      name: dotted name of a module.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"package={name!r} is not installed, and comparisons need it: "
            "pip install 'kdjax[compare]'"
        ) from error
