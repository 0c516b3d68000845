import numpy as np
import pytest

from kdjax.data import loader, order
from kdjax.data.packing import pack_by_length, pack_full
from tests.data.test_loader import (
    FORMS,
    flatten,
    make_plan,
    make_segments,
    with_alternatives,
)


@pytest.mark.parametrize("row_length", [8, 64, 65, 300])
@pytest.mark.parametrize("seed", range(4))
def test_packing_by_length_fills_rows_and_no_more(row_length, seed):
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, row_length + 1, size=3000))[::-1]
    if seed == 3:
        lengths = np.full(1001, row_length // 2)
    rows = pack_by_length(lengths, row_length)
    filled = np.bincount(rows, weights=lengths)
    assert filled.min() > 0 and filled.max() <= row_length
    needed = lengths.sum() / row_length
    assert len(filled) <= (501 if seed == 3 else np.ceil(needed * 1.03))


def test_packing_by_length_is_best_fit_decreasing():
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(1, 41, size=400))[::-1]
    rooms = []
    for length in lengths:  # the definition: the fullest row that has room
        fits = [row for row, room in enumerate(rooms) if room >= length]
        if not fits:
            fits = [len(rooms)]
            rooms.append(40)
        rooms[min(fits, key=lambda row: rooms[row])] -= int(length)
    filled = np.bincount(pack_by_length(lengths, 40), weights=lengths)
    np.testing.assert_array_equal(np.sort(filled), np.sort(40 - np.asarray(rooms)))


def best_sum(lengths, room):
    """Return the largest sum of some of the lengths that is at most `room`."""
    sums = {0}
    for length in lengths:
        sums |= {total + length for total in sums if total + length <= room}
    return max(sums)


@pytest.mark.parametrize("seed", range(4))
def test_packing_full_fills_each_row_as_well_as_those_left_allow(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 51, size=300)
    if seed == 3:  # many of few lengths
        lengths = rng.choice([7, 11, 20, 50], size=300)
    rows = pack_full(lengths, 50)
    left = sorted(lengths.tolist())
    for row in range(rows.max() + 1):
        taken = sorted(lengths[rows == row].tolist())
        assert taken[-1] == left[-1] and sum(taken) <= 50
        left.pop()
        assert sum(taken[:-1]) == best_sum(left, 50 - taken[-1])
        for length in taken[:-1]:
            left.remove(length)
    assert not left
    for length in set(lengths.tolist()):
        assert (np.diff(rows[lengths == length]) >= 0).all()


def epoch(plan, number):
    steps = plan.steps_per_epoch(0)
    return [row for step in range(steps) for row in plan.batch(number * steps + step)]


@FORMS
@pytest.mark.parametrize("window", [7, 16, 60, 1000])
def test_windows_hold_every_segment_once(form, window):
    plan = make_plan(make_segments(), window=window, **form)
    steps = plan.steps_per_epoch(0)
    orders = []
    for number in range(4):
        rows = epoch(plan, number)
        assert sorted(flatten(rows)) == list(range(60))
        assert all(plan.lengths[row].sum() <= plan.row_length for row in rows)
        assert plan.steps_per_epoch(number) == steps
        assert plan.locate(number * steps + steps - 1) == (number, steps - 1)
        orders.append(flatten(rows))
    assert len({tuple(items) for items in orders}) == 4
    other = make_plan(make_segments(), window=window, seed=4, **form)
    assert flatten(epoch(other, 0)) != orders[0]


@FORMS
def test_windows_are_a_pure_function_of_seed_and_step(form):
    segments = with_alternatives()
    plan = make_plan(segments, window=9, **form)
    forward = [flatten(plan.batch(step)) for step in range(60)]
    for step in (59, 0, 31, 7):
        again = make_plan(segments, window=9, **form)
        assert flatten(again.batch(step)) == forward[step]
        assert flatten(plan.batch(step)) == forward[step]


@FORMS
def test_a_window_takes_one_of_the_alternatives(form):
    segments = with_alternatives()
    plan = make_plan(segments, window=11, **form)
    taken = []
    for number in range(200):
        items = [segments[item] for item in flatten(epoch(plan, number))]
        pairs = sorted((s.example_id, s.view) for s in items)
        assert pairs == sorted((f"e{i}", view) for i in range(24) for view in (0, 1))
        taken.append({s.example_id: s.target_ids[0] - 80 for s in items if s.view})
    choices = np.asarray([[of[f"e{i}"] for i in range(24)] for of in taken])
    assert np.abs(np.bincount(choices.ravel()) - 1200).max() < 120
    for i in range(24):
        assert np.abs(np.bincount(choices[:, i], minlength=4) - 50).max() < 27
    assert 0.22 < (choices[1:] == choices[:-1]).mean() < 0.28


def test_segments_stand_anywhere_in_an_epoch():
    """Long and short ones alike, first and last of the data alike."""
    plan = make_plan(make_segments(200), window=50)
    places = np.zeros(200)
    for number in range(100):
        items = np.asarray(flatten(epoch(plan, number)))
        places[items] += np.arange(200) / 199 / 100
    assert abs(places[:100].mean() - 0.5) < 0.02
    longest = np.argsort(plan.lengths)
    assert abs(places[longest[:100]].mean() - 0.5) < 0.05
    assert places.min() > 0.3 and places.max() < 0.7


def test_alternatives_that_are_apart_are_refused():
    segments = with_alternatives()
    apart = [*segments[::2], *segments[1::2]]
    with pytest.raises(ValueError, match="side by side"):
        make_plan(apart, window=9)


def test_many_segments_are_ordered_in_windows(monkeypatch):
    monkeypatch.setattr(order, "WHOLE_LIMIT", 59)
    monkeypatch.setattr(order, "WINDOW", 16)
    segments = make_segments()
    plan, windows = make_plan(segments), make_plan(segments, window=16)
    assert isinstance(plan._order, order.WindowedRows)
    for step in range(20):
        assert flatten(plan.batch(step)) == flatten(windows.batch(step))
    assert isinstance(make_plan(segments[:59])._order, order.ShuffledRows)
    assert isinstance(make_plan(segments, shuffle=False)._order, order.FixedRows)


@FORMS
def test_without_shuffling_rows_are_packed_longest_first(form):
    segments = make_segments()
    plan = make_plan(segments, shuffle=False, **form)
    rows = epoch(plan, 0)
    assert sorted(flatten(rows)) == list(range(60))
    assert [list(row) for row in epoch(plan, 1)] == [list(row) for row in rows]
    if not form:  # of pairs the prompts come first
        assert all((np.diff(plan.lengths[row]) <= 0).all() for row in rows)
    assert len(rows) <= len(epoch(make_plan(segments, **form), 0))


def test_batches_are_those_of_any_number_of_hosts():
    """Rows of two hosts together are the rows of one."""
    segments = make_segments()
    plan = make_plan(segments, window=16)
    terms = []
    whole = loader.make_batch(plan, 5, terms=terms)
    halves = [
        loader.make_batch(make_plan(segments, window=16), 5, terms=terms, rows=rows)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    joined = np.concatenate([half.tokens for half in halves], axis=1)
    np.testing.assert_array_equal(joined, whole.tokens)
