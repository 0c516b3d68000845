"""Named fields of several ranks, compared: the text that says where they differ."""

import collections
from collections.abc import Iterable, Mapping, Sequence

_ABSENT = "absent"
_LONGEST_VALUE = 120  # characters that are shown
_MOST_FIELDS = 8  # that are shown


class RanksDiffer(ValueError):
    """Ranks of one run differ, and would differ again if they were started again."""


def differences(fields: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the names of the fields that are not equal on all ranks, in order.

    Args:
      fields: of each rank, name -> value.
    """
    names = dict.fromkeys(name for own in fields for name in own)
    return [name for name in names if len({own.get(name) for own in fields}) > 1]


def describe(fields: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str:
    """Return which fields differ, with their values and whose they are; "" if none.

    The value of most ranks comes first.

    Args:
      fields: of each rank, name -> value.
      hosts: of each rank.
    """
    names = differences(fields)
    if not names:
        return ""
    parts = []
    for name in names[:_MOST_FIELDS]:
        owners = collections.defaultdict(list)
        for rank, own in enumerate(fields):
            owners[own.get(name, _ABSENT)].append(rank)
        by_number = sorted(owners.items(), key=lambda item: -len(item[1]))
        values = [
            f"{_shorten(value)} on {_ranks(ranks, hosts)}" for value, ranks in by_number
        ]
        parts.append(f"{name}: {', '.join(values)}")
    if more := len(names) - _MOST_FIELDS:
        parts += [f"and {more} more fields"] if more > 0 else []
    return (
        f"the {len(fields)} ranks of this run differ in {'; '.join(parts)}. Start all "
        "of them with the same command, files and versions; nothing was written"
    )


def _shorten(value: str) -> str:
    cut = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."
    return " ".join(cut.split()) or "''"


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return "ranks 0-2, 5 (host a, host b)"; hosts of up to three."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    where = ", ".join(f"host {name}" for name in names[:3])
    where += f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"rank{'s' * (len(ranks) > 1)} {ranges(ranks)} ({where})"


def ranges(numbers: Iterable[int]) -> str:
    """Format ascending integers as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
