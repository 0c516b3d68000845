"""Trainable and frozen parameters: nested dicts, partitioned by path and merged."""

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax.models import lora


def frozen_paths(params: Any, patterns: Sequence[str]) -> frozenset[str]:
    """Return the paths of the parameters of a model that are not trained.

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
        matches = {path for path in paths if re.fullmatch(pattern, path)}
        if not matches:
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise ValueError(
                f"optim.freeze={pattern!r} matches no parameter: a regular expression "
                f"matches a whole path, of which the nearest are {near}"
            )
        frozen |= matches
    if frozen == set(paths):
        raise ValueError(
            f"optim.freeze={tuple(patterns)} leaves nothing to train of "
            f"{sorted(adapters) or paths}: name fewer"
        )
    return frozenset(frozen)


def partition(params: Any, frozen_paths: Collection[str]) -> tuple[Any, Any]:
    """Return the trained parameters, and those at `frozen_paths`."""
    flat = flatten_dict(params, sep="/")
    frozen = {path: x for path, x in flat.items() if path in frozen_paths}
    trained = {path: x for path, x in flat.items() if path not in frozen_paths}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def trainable_mask(params: Any, frozen_paths: Collection[str]) -> Any:
    """Return a tree like `params`: True where trained, False at `frozen_paths`."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: path not in frozen_paths for path in flat}, sep="/")


def merge(params: Any, others: Any) -> Any:
    """Merge two nested dicts; where both have a path, `others` wins."""
    flat = flatten_dict(params, sep="/") | flatten_dict(others, sep="/")
    return unflatten_dict(flat, sep="/")
