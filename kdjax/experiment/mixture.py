"""The sources of a config: one, or those of a mixture, each with its method."""

import dataclasses
import re
from typing import NamedTuple

from kdjax.config import Config
from kdjax.data import mixture as mixtures
from kdjax.experiment import methods
from kdjax.experiment.methods import Term

_DATA = {  # field of the mixture -> field of the data
    "paths": "path",
    "eval_paths": "eval_path",
    "schemas": "schema",
    "columns": "columns",
    "answer_kinds": "answer_kind",
    "rationales": "rationales",
    "eval_rationales": "eval_rationales",
    "counterfactuals": "counterfactuals",
    "num_train": "num_train",
    "num_eval": "num_eval",
}
_NAME = re.compile(r"\w([\w.-]*\w)?")


class Source(NamedTuple):
    """One source of a mixture."""

    name: str
    share: float  # of rows and of the loss; they sum to 1
    config: Config  # the run on this source alone


def is_mixture(config: Config) -> bool:
    """Return True if there are several sources of data."""
    return config.data.source == "mixture"


def sources(config: Config) -> tuple[Source, ...]:
    """Return the sources of a mixture; () where there is none.

    Raises:
      ValueError: fields with another number of items than names, or names that are
        alike.
    """
    mixture = config.mixture
    if not is_mixture(config):
        if mixture.names:
            raise ValueError(
                f"mixture.names={mixture.names} with data.source="
                f"{config.data.source!r}: use data.source='mixture', or names=()"
            )
        return ()
    num = len(mixture.names)
    if not num or len(set(mixture.names)) < num or not all(mixture.names):
        raise ValueError(
            f"mixture.names={mixture.names} with data.source='mixture': give each "
            "source a name of its own"
        )
    for f in dataclasses.fields(mixture):
        items = getattr(mixture, f.name)
        required = f.name in ("names", "weights", "paths")
        if len(items) != num and (items or required):
            raise ValueError(
                f"mixture.{f.name}={items} has {len(items)} items for {num} names: "
                f"give {num}{'' if required else ', or () for what data says'}"
            )
    if wrong := [name for name in mixture.names if not _NAME.fullmatch(name)]:
        raise ValueError(
            f"mixture.names={mixture.names}: {wrong[0]!r} stands in names of metrics "
            "and files: use letters, digits, and within it any of ._-"
        )
    mixtures.pattern(mixture.weights)
    total = sum(mixture.weights)
    return tuple(
        Source(name, mixture.weights[index] / total, _config(config, index))
        for index, name in enumerate(mixture.names)
    )


def _config(config: Config, index: int) -> Config:
    """Return the config of a run on one source."""
    mixture = config.mixture
    changes = {
        name: getattr(mixture, field)[index]
        for field, name in _DATA.items()
        if getattr(mixture, field)
    }
    method, cache = config.method, config.cache
    if mixture.methods:
        method = dataclasses.replace(method, name=mixture.methods[index])
        if method.name != "text":
            changes["long_text"] = "whole"  # texts alone are cut
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source="auto", **changes),
        mixture=type(mixture)(),
        method=method,
        cache=cache,
    )


def view_numbers(config: Config) -> list[list[int]]:
    """Return of each source the numbers of its views in the mixture.

    Views are numbered source by source, those that are not evaluated after all others.
    """
    views = [methods.views(source.config.method) for source in sources(config)]
    held_out = [
        len(methods.held_out_views(source.config.method)) for source in sources(config)
    ]
    numbers: list[list[int]] = [[] for _ in views]
    following = 0
    for is_held_out in (True, False):
        for own, of_source, num in zip(numbers, views, held_out, strict=True):
            count = num if is_held_out else len(of_source) - num
            own += range(following, following + count)
            following += count
    return numbers


def views(config: Config) -> tuple[str, ...]:
    """Return the names of the views that a run trains, in a mixture "<source>/<view>".

    The first of them, in the same order, are those of `held_out_views`.
    """
    if not is_mixture(config):
        return methods.views(config.method)
    names: dict[int, str] = {}
    for source, numbers in zip(sources(config), view_numbers(config), strict=True):
        own = methods.views(source.config.method)
        for number, view in zip(numbers, own, strict=True):
            names[number] = f"{source.name}/{view}"
    return tuple(names[number] for number in sorted(names))


def held_out_views(config: Config) -> tuple[str, ...]:
    """Return the names of the views that are evaluated."""
    if not is_mixture(config):
        return methods.held_out_views(config.method)
    num = sum(
        len(methods.held_out_views(source.config.method)) for source in sources(config)
    )
    return views(config)[:num]


def terms(config: Config, progress: float = 0.0) -> tuple[Term, ...]:
    """Return the terms of a run: of a mixture those of each source, times its share.

    Args:
      config: the run.
      progress: 0 at the first step, 1 at the last.
    """
    if not is_mixture(config):
        return methods.terms(config.method, progress)
    return tuple(
        Term(
            name=f"{source.name}/{term.name}",
            view=numbers[term.view],
            kind=term.kind,
            weight=source.share * term.weight,
        )
        for source, numbers in zip(sources(config), view_numbers(config), strict=True)
        for term in methods.terms(source.config.method, progress)
    )
