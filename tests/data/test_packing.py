import time

import numpy as np
import pytest

from kdjax.data.packing import pack


@pytest.mark.parametrize("num_open", [1, 4, 64])
@pytest.mark.parametrize("seed", range(4))
def test_every_item_once_and_no_row_too_long(seed, num_open):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, size=500)
    order = rng.permutation(500)
    rows = pack(lengths, order, 64, num_open=num_open)
    assert sorted(np.concatenate(rows).tolist()) == list(range(500))
    assert all(0 < lengths[row].sum() <= 64 for row in rows)


def test_rows_are_well_filled():
    lengths = np.random.default_rng(0).integers(10, 100, size=5000)
    rows = pack(lengths, np.arange(5000), 256)
    assert lengths.sum() / (256 * len(rows)) > 0.95


def test_first_fit_in_order():
    rows = pack(np.array([6, 5, 4, 3, 2]), np.arange(5), 10)
    assert [row.tolist() for row in rows] == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("num_open", [1, 4, 64])
def test_pairs_fit_in_both_rows(num_open):
    rng = np.random.default_rng(0)
    lengths = (rng.integers(1, 65, size=500), rng.integers(1, 21, size=500))
    order = rng.permutation(500)
    rows = pack(lengths, order, (64, 32), num_open=num_open)
    assert sorted(np.concatenate(rows).tolist()) == list(range(500))
    for length, limit in zip(lengths, (64, 32), strict=True):
        assert all(0 < length[row].sum() <= limit for row in rows)


def test_pairs_bound_by_one_side_pack_as_it_alone():
    rng = np.random.default_rng(1)
    lengths, order = rng.integers(1, 65, size=500), rng.permutation(500)
    alone = pack(lengths, order, 64)
    for pair in ((lengths, lengths), (lengths, np.ones_like(lengths))):
        both = pack(pair, order, (64, 64))
        for row, wanted in zip(both, alone, strict=True):
            np.testing.assert_array_equal(row, wanted)


def test_pairs_are_well_filled():
    rng = np.random.default_rng(0)
    prompts, targets = rng.integers(10, 100, 5000), rng.integers(5, 50, 5000)
    rows = pack((prompts, targets), np.arange(5000), (256, 128))
    assert prompts.sum() / (256 * len(rows)) > 0.85


def test_only_the_items_of_the_order_are_placed():
    rows = pack(np.array([6, 500, 4]), np.array([2, 0]), 10)
    assert [row.tolist() for row in rows] == [[2, 0]]
    assert pack(np.array([6]), np.zeros(0, int), 10) == []


def test_an_item_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match="item 1 takes 11 positions, row_length=10"):
        pack(np.array([6, 11]), np.arange(2), 10)
    with pytest.raises(ValueError, match="item 0 takes 6 positions, row_length=5"):
        pack((np.array([6, 11]), np.array([6, 2])), np.arange(2), (16, 5))


def test_many_items_take_about_a_second():
    lengths = np.random.default_rng(0).integers(10, 100, size=100_000)
    start = time.process_time()
    pack(lengths, np.arange(100_000), 512)
    assert time.process_time() - start < 5
