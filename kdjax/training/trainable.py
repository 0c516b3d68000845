"""Which parameters are trained: nested dicts, taken apart by path and put together."""

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax.models import lora


def frozen_paths(params: Any, patterns: Sequence[str]) -> frozenset[str]:
    """Paths of the parameters of a model that are not trained.

    Args:
      params: nested dict of the model's parameters, or of their shapes. Where it has
        adapters (`lora`), nothing else is trained.
      patterns: regular expressions; a parameter is frozen whose whole path one matches.

    Raises:
      ValueError: a pattern that matches no parameter, or nothing left to train.
    """
    paths = list(flatten_dict(params, sep="/"))
    adapters = {path for path in paths if lora.is_adapter(path)}
    frozen = set(paths) - adapters if adapters else set()
    for pattern in patterns:
        found = {path for path in paths if re.fullmatch(pattern, path)}
        if not found:
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise ValueError(
                f"optim.freeze={pattern!r} matches no parameter: a regular expression "
                f"matches a whole path, of which the nearest are {near}"
            )
        frozen |= found
    if frozen == set(paths):
        raise ValueError(
            f"optim.freeze={tuple(patterns)} leaves nothing to train of "
            f"{sorted(adapters) or paths}: name fewer"
        )
    return frozenset(frozen)


def split(params: Any, frozen: Collection[str]) -> tuple[Any, Any]:
    """The parameters that are trained, and those of the paths `frozen`."""
    flat = flatten_dict(params, sep="/")
    kept = {path: x for path, x in flat.items() if path in frozen}
    trained = {path: x for path, x in flat.items() if path not in frozen}
    return unflatten_dict(trained, sep="/"), unflatten_dict(kept, sep="/")


def trains(params: Any, frozen: Collection[str]) -> Any:
    """Like `params`, with True for what is trained and False for the paths `frozen`."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: path not in frozen for path in flat}, sep="/")


def merged(params: Any, others: Any) -> Any:
    """All parameters of both; where both have a path, those of `others`."""
    flat = flatten_dict(params, sep="/") | flatten_dict(others, sep="/")
    return unflatten_dict(flat, sep="/")
