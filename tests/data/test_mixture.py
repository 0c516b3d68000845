import dataclasses

import numpy as np
import pytest

from kdjax.config import (
    Config,
    DataConfig,
    MethodConfig,
    MixtureConfig,
    from_json,
    to_json,
)
from kdjax.data import loader
from kdjax.data.mixture import MixtureSegments, pattern
from kdjax.experiment import methods, mixture, validate
from tests.data.test_loader import FORMS, make_segments, term, with_alternatives

WEIGHTS = (5.0, 3.0, 2.0)
NAMES = ("a", "b", "c")


def make_mixture(weights=WEIGHTS):
    parts = [make_segments(90, seed=1), with_alternatives(8), make_segments(30, seed=3)]
    return MixtureSegments(
        parts, names=NAMES, weights=weights, views=[[0, 1], [2, 3], [4, 5]]
    )


def make_plan(segments=None, **changes):
    arguments = {"batch_size": 4, "row_length": 32, "seed": 3, "window": 16}
    return loader.BatchPlan(segments or make_mixture(), **arguments | changes)


def source_of(plan, row):
    """The source of a row; all its segments are of one."""
    numbers = np.searchsorted(plan.segments.bounds, row, side="right") - 1
    [source] = set(numbers.tolist())
    return source


@pytest.mark.parametrize(
    "weights", [(5, 3, 2), (0.5, 0.3, 0.2), (1,), (1, 1), (0.7, 0.15, 0.15), (1, 99)]
)
def test_shares_are_exact_in_a_period_and_near_within(weights):
    rows = pattern(weights)
    shares = np.asarray(weights) / sum(weights)
    counts = np.bincount(rows, minlength=len(weights))
    np.testing.assert_allclose(counts, shares * len(rows))
    for num in range(1, len(rows)):
        counts = np.bincount(rows[:num], minlength=len(weights))
        assert np.abs(counts - num * shares).max() < 1
    if weights == (5, 3, 2):
        assert rows.tolist() == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]


def test_weights_that_are_no_round_numbers_are_refused():
    with pytest.raises(ValueError, match="use rounder numbers"):
        pattern((0.123456789, 1.0))


def test_columns_and_segments_are_those_of_the_sources():
    mixed = make_mixture()
    assert len(mixed) == 90 + 40 + 30
    assert [mixed[i].example_id for i in (0, 90, 130)] == ["a/e0", "b/e0", "c/e0"]
    listed = loader.as_segments(list(mixed))
    for name in ("views", "prompt_lengths", "target_lengths", "alternatives", "keys"):
        np.testing.assert_array_equal(getattr(mixed, name), getattr(listed, name))
    assert set(mixed.views.tolist()) == set(range(6))


@FORMS
def test_shares_are_exact_and_epochs_are_each_source_s_own(form):
    plan = make_plan(**form)
    rows = [row for step in range(300) for row in plan.batch(step)]
    epochs = [epoch for step in range(300) for epoch in plan.epochs(step)]
    assert all(len(row) for row in rows)
    sources = np.asarray([source_of(plan, row) for row in rows])
    for start in range(0, 1200, 10):
        counts = np.bincount(sources[start : start + 10], minlength=3)
        assert counts.tolist() == [5, 3, 2]
    lengths = [len(part) for part in plan.segments.parts]
    for source, (start, num) in enumerate(
        zip(plan.segments.bounds, lengths, strict=False)
    ):
        seen = {}
        for row, epoch, of in zip(rows, epochs, sources, strict=True):
            if of == source:
                seen.setdefault(epoch, []).extend((row - start).tolist())
        assert list(seen) == sorted(seen) and len(seen) > 3
        for epoch in list(seen)[:-1]:  # the last one is cut
            if source == 1:  # one of the alternatives of each pair
                groups = plan.segments.parts[1].alternatives[seen[epoch]]
                assert sorted(groups.tolist()) == list(range(16))
            else:
                assert sorted(seen[epoch]) == list(range(num))


@FORMS
def test_order_is_a_pure_function_of_seed_and_step(form):
    plan = make_plan(**form)
    forward = [np.concatenate(plan.batch(step)).tolist() for step in range(80)]
    for step in (79, 0, 33, 8):
        again = make_plan(**form)
        assert np.concatenate(again.batch(step)).tolist() == forward[step]
    other = make_plan(seed=4, **form)
    assert np.concatenate(other.batch(0)).tolist() != forward[0]


def test_hosts_together_make_the_batch_of_one():
    terms = [term(view) for view in range(6)]
    whole = loader.make_batch(make_plan(), 9, terms=terms)
    halves = [
        loader.make_batch(make_plan(), 9, terms=terms, rows=rows)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    for name in ("tokens", "targets", "view"):
        joined = np.concatenate([getattr(half, name) for half in halves], axis=1)
        np.testing.assert_array_equal(joined, getattr(whole, name))
    joined = np.concatenate([half.weights["hard"] for half in halves], axis=1)
    np.testing.assert_array_equal(joined, whole.weights["hard"])


def make_config(**changes):
    fields = {
        "names": NAMES,
        "weights": WEIGHTS,
        "paths": ("a.jsonl", "b.jsonl", "c.txt"),
        "eval_paths": ("a2.jsonl", "b2.jsonl", "c2.txt"),
        "methods": ("multitask", "counterfactual", "text"),
    }
    return Config(
        data=DataConfig(source="mixture", tokenizer="words"),
        mixture=MixtureConfig(**fields | changes),
        method=MethodConfig(hard_weight=1.0, soft_weight=0.0),
    )


def test_views_and_terms_of_a_mixture():
    config = make_config()
    views = ("a/label", "a/rationale", "b/factual", "c/text", "b/counterfactual")
    assert mixture.views(config) == views
    assert mixture.held_out_views(config) == views[:4]
    terms = mixture.terms(config)
    assert [views[t.view] + "/hard" for t in terms] == [t.name for t in terms]
    of_source = [sum(t.weight for t in terms if t.name[0] == name) for name in NAMES]
    np.testing.assert_allclose(of_source, [0.5, 0.3, 0.2])
    paths = [source.config.data.path for source in mixture.sources(config)]
    assert paths == ["a.jsonl", "b.jsonl", "c.txt"]
    single = dataclasses.replace(config, data=DataConfig(), mixture=MixtureConfig())
    assert mixture.views(single) == methods.views(single.method)
    assert mixture.terms(single, 0.5) == methods.terms(single.method, 0.5)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"names": ()}, "give each source a name"),
        ({"names": ("a", "a", "c")}, "a name of its own"),
        ({"names": ("a/b", "c", "d")}, "'a/b' stands in names of metrics"),
        ({"names": ("..", "c", "d")}, "'..' stands in names of metrics"),
        ({"names": ("a\n", "c", "d")}, "stands in names of metrics"),
        ({"weights": (1e308, 1e308, 1.0)}, "too large to add"),
        ({"weights": (1.0, 2.0)}, r"weights=\(1.0, 2.0\) has 2 items for 3 names"),
        ({"weights": (1.0, 0.0, 2.0)}, "must be positive"),
        ({"paths": ()}, "paths=.* has 0 items for 3 names: give 3$"),
        ({"eval_paths": ("x",)}, "or \\(\\) for what data says"),
        ({"methods": ("multitask", "no", "text")}, "is unknown"),
        ({"paths": ("a.jsonl", "", "c.txt")}, "mixture source 'b': data"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_said(changes, match):
    with pytest.raises(ValueError, match=match):
        validate.validate(make_config(**changes))


def test_names_without_a_mixture_are_refused():
    config = dataclasses.replace(make_config(), data=DataConfig(path="a.jsonl"))
    with pytest.raises(ValueError, match=r"use data\.source='mixture'"):
        validate.validate(config)
