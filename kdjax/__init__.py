"""Distillation of language models in JAX against precomputed teacher outputs.

The public face, loaded when it is first used: importing kdjax imports neither JAX nor
the library. `kdjax.losses` is for training loops that are not kdjax's.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax.config import Config as Config
    from kdjax.pipeline.distill import Distilled as Distilled
    from kdjax.pipeline.distill import distill as distill
    from kdjax.pipeline.student import Student as Student
    from kdjax.pipeline.student import generate as generate
    from kdjax.pipeline.student import load_student as load_student
    from kdjax.teacher.cache import load_cache as load_cache

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "kdjax.config",
    "Distilled": "kdjax.pipeline.distill",
    "Student": "kdjax.pipeline.student",
    "distill": "kdjax.pipeline.distill",
    "generate": "kdjax.pipeline.student",
    "load_cache": "kdjax.teacher.cache",
    "load_student": "kdjax.pipeline.student",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kdjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*_PUBLIC, "__version__", "losses"])
