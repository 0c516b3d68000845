"""Figures: the same text for the same numbers, words as words, links to runs."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import pytest

from kdjax.analysis import effect_sizes, factor_effects, plots, runs
from tests.analysis import cells

BINS = {"teacher": ([0, 4, 10], [0, 2.0, 9.0], [0, 1, 8])}


def _grid():
    found = runs.parse(cells.grid_rows(), cells.GRID)
    return runs.groups(found, "accuracy", cells.GRID)


def _points():
    return [
        plots.Point(name="small", within="s", cost=1, quality=0.5, link="#small"),
        plots.Point(name="dear", within="t", cost=4000, quality=0.5),
        plots.Point(name="good", within="t", cost=4000, quality=0.7),
        plots.Point(name="twin", within="s", cost=4000, quality=0.7),
    ]


def _factors():
    """Two: one level of the first is not estimable, one of the second has no bounds."""
    whole = effect_sizes.Estimate(value=0.5, low=0.4, high=0.6)
    bare = effect_sizes.Estimate(value=0.7, low=None, high=None)
    means = {
        "soft": (whole, effect_sizes.nothing("lost")),
        "_size": (whole, bare, whole),
    }
    return [
        factor_effects.Factor(
            name=name,
            partial_eta_squared=effect_sizes.nothing(""),
            levels=tuple(
                factor_effects.Level(
                    name=f"$l{i}$", members=(), mean=mean, difference=None
                )
                for i, mean in enumerate(of_it)
            ),
        )
        for name, of_it in means.items()
    ]


def _figures():
    return {
        "dots": plots.dots(_grid(), "accuracy", name="dots"),
        "pareto": plots.pareto(_points(), "cost", "quality", name="pareto"),
        "reliability": plots.reliability(BINS, name="reliability"),
        "levels": plots.levels(_factors(), "accuracy", anchor="to", name="levels"),
    }


def test_figures_are_the_same_every_time():
    assert _figures() == _figures()


def test_costs_of_several_magnitudes_are_whole_numbers_on_a_logarithmic_axis():
    words = _words(_figures()["pareto"])
    assert {"1", "10", "100", "1,000"} <= set(words)
    assert not [word for word in words if "$" in word]


def test_of_many_points_those_that_nothing_beats_are_named():
    beaten = [
        plots.Point(name=f"beaten{i}", within="s", cost=5000 + i, quality=0.6)
        for i in range(8)
    ]
    named = lambda points: {  # noqa: E731
        word for word in _words(plots.pareto(points, "c", "q")) if word.isalnum()
    }
    few, many = _points() + beaten, [*_points(), *beaten, beaten[0]]
    assert {"small", "dear", "good", "twin", "beaten7"} <= named(few)
    assert {"small", "good", "twin"} <= named(many)
    assert not named(many) & {"dear", "beaten7"}


@pytest.mark.parametrize("kind", ["dots", "pareto", "reliability", "levels"])
def test_a_figure_stands_inside_a_page(kind):
    text = _figures()[kind]
    root = ET.fromstring(text)
    assert root.tag == "svg" and root.get("role") == "img"
    assert "http" not in text and "xmlns" not in text and "<metadata" not in text
    assert "#010203" not in text and "currentColor" in text
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids)) and all(i.startswith(f"{kind}-") for i in ids)
    used = re.findall(r'(?:url\(|use href=")#([^")]+)', text)
    assert used and set(used) <= set(ids)


def _words(text):
    return [e.text for e in ET.fromstring(text).iter("text")]


def _links(text):
    return [e.get("href") for e in ET.fromstring(text).iter("a")]


def test_every_run_with_a_number_is_a_dot_with_a_link():
    groups = _grid()
    rows = [f"#run-{run.row}" for group in groups for run in group.runs]
    assert sorted(_links(plots.dots(groups, "accuracy"))) == sorted(rows)


def test_names_are_shown_as_they_are():
    names = ["_first", "$x^2$", "<b>&", "two\nlines", "\x1bred", "x" * 100]
    table = {(name, size): [1, 2, 3] for name in names for size in ("_s", "$t$")}
    words = _words(plots.dots(cells.groups(table), "score"))
    for name in ("_first", "$x^2$", "<b>&", "two lines", "\ufffdred", "x" * 47 + "…"):
        assert name in words
    assert {"\u200b_s", "\u200b$t$"} <= set(words)  # of the legend


def test_without_numbers_there_is_no_figure():
    assert plots.dots(cells.groups({("a", "s"): []}), "score") == ""
    assert plots.pareto([], "cost", "quality") == ""
    assert plots.reliability({}) == ""
    lost = dataclasses.replace(_factors()[0], levels=_factors()[0].levels[1:])
    assert plots.levels([lost], "accuracy", anchor="to") == ""


def test_groups_of_one_run_and_of_equal_runs_have_no_interval_to_draw():
    text = plots.dots(cells.groups({("a", "s"): [1], ("b", "s"): [2, 2]}), "score")
    assert len(_links(text)) == 3


def test_every_level_with_a_mean_is_a_mark_that_leads_to_its_numbers():
    text = _figures()["levels"]
    assert _links(text) == ["#to-1-1", "#to-2-1", "#to-2-2", "#to-2-3"]
    assert {"soft", "_size", "$l1$", "$l2$", "accuracy"} <= set(_words(text))
    # A line of panels is full at four.
    assert plots.levels(3 * _factors(), "accuracy", anchor="to").count("soft") >= 3


def test_the_frontier_is_what_nothing_beats():
    small, dear, good, twin = _points()
    assert plots.frontier(_points()) == [small, good, twin]
    # Where less is better, the cheapest of the lowest beats the rest.
    assert plots.frontier(_points(), lowest=True) == [small]
    assert plots.frontier([dear]) == [dear]
    assert "#small" in _links(plots.pareto(_points(), "cost", "quality"))


def test_the_calibration_error_is_that_of_the_bins():
    # (|1 - 2| + |8 - 9|) / 14
    assert "ECE 0.143" in _words(plots.reliability(BINS))
    assert "no prediction" in _words(plots.reliability({"none": ([0], [0], [0])}))
