"""Rows become runs, runs become groups; nobody is lost on the way."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from kdjax.analysis import runs
from tests.analysis import cells


def test_a_file_and_its_rows_are_the_same_runs(tmp_path):
    rows = cells.grid_rows()
    path = tmp_path / "results.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert repr(runs.read(path, cells.GRID)) == repr(runs.parse(rows, cells.GRID))


def test_mean_sd_and_interval_against_numpy_and_scipy():
    values = np.array([0.61, 0.58, 0.7, 0.63])
    (group,) = cells.groups({("a", "s"): values})
    low, high = scipy.stats.t.interval(
        0.95, 3, values.mean(), values.std(ddof=1) / np.sqrt(4)
    )
    assert group.mean == pytest.approx(values.mean(), abs=1e-12)
    assert group.sd == pytest.approx(values.std(ddof=1), abs=1e-12)
    assert (group.low, group.high) == pytest.approx((low, high), abs=1e-12)
    assert group.statement == ""


def test_every_run_is_in_exactly_one_group():
    found = runs.parse(cells.grid_rows(), cells.GRID)
    for column in ("accuracy", "nll"):
        groups = runs.groups(found, column, cells.GRID)
        rows = [run.row for group in groups for run in (*group.runs, *group.absent)]
        assert sorted(rows) == [run.row for run in found]


def test_what_is_missing_is_said():
    one, same, none = cells.groups(
        {("a", "s"): [1], ("b", "s"): [2, 2], ("c", "s"): []}
    )
    assert (one.sd, one.statement) == (None, "one seed: no variance")
    assert (same.sd, same.low, same.high) == (0, 2, 2)
    assert same.statement == "all values are the same: no variance"
    assert (none.mean, none.statement) == (None, "no run has a number")
    assert [run.absence("score") for run in none.absent] == ["failed"]
    groups = cells.groups({("a", "s"): [1, 2], ("b", "t"): [3, 4]})
    assert [g.statement for g in groups] == ["", "no run", "no run", ""]


def test_other_factors_that_vary_in_a_group_are_said():
    rows = cells.grid_rows()
    rows[0]["temperature"] = "4.0"
    group, *_ = runs.groups(runs.parse(rows, cells.GRID), "accuracy", cells.GRID)
    assert group.statement == "runs differ in temperature too"


def test_collapsed_runs_are_marked_and_keep_their_numbers():
    found = runs.parse(cells.grid_rows(), cells.GRID)
    (collapsed,) = [run for run in found if run.collapsed]
    assert collapsed.collapsed == "nll is not a number; accuracy is not above 0.2"
    assert collapsed.value("accuracy") == 0.2
    assert collapsed.value("nll") is None
    assert collapsed.absence("nll") == "nll is not a number"


def test_the_floor_of_a_metric_where_less_is_better_is_a_ceiling():
    design = dataclasses.replace(cells.GRID, chance={"nll": 1.0})
    rows = cells.grid_rows()[:2]
    rows[0]["nll"], rows[1]["nll"] = "0.9", "1.0"
    good, bad = runs.parse(rows, design)
    assert (good.collapsed, bad.collapsed) == ("", "nll is not below 1.0")


def test_numbers_of_a_run_that_is_not_done_do_not_count():
    row = cells.grid_rows()[0] | {"status": "running"}
    (run,) = runs.parse([row], cells.GRID)
    assert run.value("accuracy") is None
    assert run.absence("accuracy") == "running"


def test_outliers_against_the_rule_by_hand():
    values = [0.60, 0.61, 0.62, 0.63, 0.64, 0.2, 0.70]
    found = cells.groups({("a", "s"): values, ("b", "s"): [1, 1, 9]})
    kept, removed = runs.without_outliers(found, "score", cells.DESIGN)
    first, third = np.percentile(values, [25, 75])
    low, high = first - 1.5 * (third - first), third + 1.5 * (third - first)
    assert kept[0].values == tuple(v for v in values if low <= v <= high)
    assert [outlier.value for outlier in removed] == [0.2, 0.70]
    assert (removed[0].low, removed[0].high) == pytest.approx((low, high))
    assert removed[0].group == "a, s"
    assert kept[0].mean == pytest.approx(0.62)
    assert kept[1] is found[1]  # of three values none lies far enough


def test_equal_values_are_no_outliers():
    for value in (0.1, 1 / 3, 1e-7):
        found = cells.groups({("a", "s"): [value] * 7})
        assert runs.without_outliers(found, "score", cells.DESIGN)[1] == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accuracy": "good"}, "accuracy='good' is not a number: leave it empty"),
        ({"method": None}, r"columns=\['method'\] are missing"),
    ],
)
def test_bad_rows_are_errors_that_name_them(change, words):
    with pytest.raises(ValueError, match=f"row 2: {words}"):
        rows = cells.grid_rows()[:2]
        runs.parse([rows[0], rows[1] | change], cells.GRID)


def test_two_runs_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="is there twice"):
        runs.parse(cells.grid_rows()[:1] * 2, cells.GRID)


@pytest.mark.parametrize(
    "change",
    [
        {"compare": ("size",), "within": ("size",)},
        {"compare": ()},
        {"compare": ("colour",)},
        {"metrics": ()},
        {"confidence": 95.0},
    ],
)
def test_a_design_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(cells.DESIGN, **change)


def test_numbers_too_large_to_square_count_as_infinite():
    (run,) = cells.table({("a", "s"): [1e200]})
    assert run.value("score") is None
    assert run.collapsed == "score is beyond 1e+100"
    (run,) = cells.table({("a", "s"): [math.inf]})
    assert run.collapsed == "score is infinite"
