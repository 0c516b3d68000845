"""Packing: many short sequences into few rows of one length."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def pack(
    lengths: Int[np.ndarray, " N"] | Sequence[Int[np.ndarray, " N"]],
    order: Int[np.ndarray, " N"],
    row_length: int | Sequence[int],
    *,
    num_open: int = 64,
) -> list[np.ndarray]:
    """Assign items to rows: first fit among the open rows, in the given order.

    Where no open row has room, the fullest one is closed for a new one. A pure
    function of its arguments; 1e5 items take about half a second.

    Args:
      lengths: positions that each item takes, >= 1. Several arrays, of an encoder and
        a decoder, pack pairs: an item needs room in both rows, which it takes together.
      order: the items to place, each once.
      row_length: positions of a row; one number for each array of lengths.
      num_open: rows kept open. More pack tighter and slower.

    Returns:
      For each row, the items in it in order of placement, int64.

    Raises:
      ValueError: an item longer than a row.
    """
    lengths_CN = np.atleast_2d(np.asarray(lengths))
    limits = np.atleast_1d(row_length).tolist()
    for lengths_N, limit in zip(lengths_CN, limits, strict=True):
        if len(order) and lengths_N[order].max() > limit:
            item = int(order[np.argmax(lengths_N[order])])
            raise ValueError(
                f"item {item} takes {lengths_N[item]} positions, row_length={limit}: "
                f"use row_length >= {lengths_N[item]}, or shorten or drop the item"
            )
    rows: list[list[int]] = []
    rooms = [np.zeros(num_open, np.int64) for _ in limits]
    row_of = [-1] * num_open
    for item, *needs in zip(
        np.asarray(order).tolist(),
        *(lengths_N[order].tolist() for lengths_N in lengths_CN),
        strict=True,
    ):
        fits = rooms[0] >= needs[0]
        for room, need in zip(rooms[1:], needs[1:], strict=True):
            fits &= room >= need
        slot = int(fits.argmax())
        if not fits[slot]:
            # The fullest: its tighter side has the smallest share of room.
            shares = [room / limit for room, limit in zip(rooms, limits, strict=True)]
            slot = int(np.minimum.reduce(shares).argmin())
            for room, limit in zip(rooms, limits, strict=True):
                room[slot] = limit
            row_of[slot] = len(rows)
            rows.append([])
        for room, need in zip(rooms, needs, strict=True):
            room[slot] -= need
        rows[row_of[slot]].append(item)
    return [np.asarray(row, np.int64) for row in rows]
