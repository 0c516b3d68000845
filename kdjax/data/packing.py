"""Packing: many short sequences into few rows of one length."""

import numpy as np
from jaxtyping import Int


def pack(
    lengths: Int[np.ndarray, " N"],
    order: Int[np.ndarray, " N"],
    row_length: int,
    *,
    num_open: int = 64,
) -> list[np.ndarray]:
    """Assigns items to rows: first fit among the open rows, in the given order.

    Where no open row has room, the fullest one is closed for a new one. A pure
    function of its arguments; 1e5 items take about half a second.

    Args:
      lengths: positions that each item takes, >= 1.
      order: the items to place, each once.
      row_length: positions of a row.
      num_open: rows kept open. More pack tighter and slower.

    Returns:
      For each row, the items in it in order of placement, int64.

    Raises:
      ValueError: an item longer than a row.
    """
    lengths = np.asarray(lengths)
    if len(order) and lengths[order].max() > row_length:
        item = int(order[np.argmax(lengths[order])])
        raise ValueError(
            f"item {item} takes {lengths[item]} positions, row_length={row_length}: "
            f"use row_length >= {lengths[item]}, or shorten or drop the item"
        )
    rows: list[list[int]] = []
    room = np.zeros(num_open, np.int64)
    row_of = [-1] * num_open
    for item, length in zip(
        np.asarray(order).tolist(), lengths[order].tolist(), strict=True
    ):
        slot = int((room >= length).argmax())
        if room[slot] < length:
            slot = int(room.argmin())
            room[slot] = row_length
            row_of[slot] = len(rows)
            rows.append([])
        room[slot] -= length
        rows[row_of[slot]].append(item)
    return [np.asarray(row, np.int64) for row in rows]
