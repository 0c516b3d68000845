"""Checks of a config before anything is written: single fields, and several."""

import math

import pytest

import kdjax
from kdjax import config as config_lib
from kdjax.config import Choice, Config, Range
from kdjax.experiment import methods, validate
from kdjax.losses import divergence, sparse
from kdjax.models import layers
from tests import helpers

# Strings that may be anything: names, files, what stands in a prompt.
TEXTS = {
    *("name", "path", "eval_path", "train_split", "eval_split", "tokenizer"),
    *("rationales", "eval_rationales", "counterfactuals", "labels"),
    *("label", "rationale", "rationale_then_label", "factual", "counterfactual"),
    *("model", "prompts", "stop", "url", "key_variable", "columns"),
    *("rationale_end", "template_kwargs", "template_date"),
    *("prepared", "names", "paths", "eval_paths", "caches"),
}
LEAVES = list(config_lib.leaves(Config()))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("method.name", "fientune", "method.name='fientune' is unknown: use one of"),
        ("data.template_date", "today", "data.template_date='today' is no date: use"),
        ("data.template_kwargs", ("thinks",), "'thinks' is not name=value: use"),
        ("train.steps", -3, "train.steps=-3 is below 1: use 1 to 2147"),
    ],
)
def test_distill_refuses_before_anything_is_written(path, value, message, tmp_path):
    config = config_lib.replace(helpers.small_config(), path, value)
    with pytest.raises(ValueError) as error:
        validate.validate(config)
    assert message in str(error.value)
    with pytest.raises(ValueError) as error:
        kdjax.distill(config, tmp_path / "run")
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_every_field_has_a_limit_or_needs_none():
    for path, _, hint, limit in LEAVES:
        is_text = path.rpartition(".")[2] in TEXTS and hint in (str, tuple[str, ...])
        assert limit or hint is bool or is_text, path


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.path)
def test_what_is_outside_a_limit_or_of_another_type_is_refused(leaf):
    is_tuple = isinstance(leaf.value, tuple)
    values = [None, [], b"x", 1j]
    if isinstance(leaf.limit, Range):
        below = [leaf.limit.at_least - 1, leaf.limit.above]
        at_most = leaf.limit.at_most
        above = [max(at_most + 1, math.nextafter(at_most, math.inf)), leaf.limit.below]
        values += [v for v in (*below, *above) if math.isfinite(v)]
        values += [math.nan, math.inf, -math.inf, True, "1"]
    elif isinstance(leaf.limit, Choice):
        values += ["nonsense", "", 1]
    elif leaf.limit:
        values += ["(", 1]
    for value in values:
        config = config_lib.replace(
            Config(), leaf.path, (value,) if is_tuple and value != [] else value
        )
        with pytest.raises(ValueError, match=rf"^{leaf.path}="):
            config_lib.check(config)


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (Range(at_least=1), "1 or more"),
        (Range(above=0), "above 0"),
        (Range(above=0, at_most=1), "above 0 to 1"),
        (Range(at_least=0, below=1), "0 to below 1"),
        (Range(below=1), "below 1"),
        (Range(), "a finite number"),
    ],
)
def test_a_limit_in_words(limit, text):
    assert str(limit) == text
    assert limit.error(math.nan).endswith(f": use {text}")


def test_defaults_are_inside_their_limits():
    config_lib.check(Config())


def test_a_part_of_another_class_is_refused():
    config = config_lib.replace(Config(), "student.decoder", config_lib.T5Config())
    with pytest.raises(ValueError, match=r"student\.decoder=.* not a DecoderConfig"):
        config_lib.check(config)


def test_choices_are_what_the_library_has():
    assert tuple(methods.METHODS) == config_lib.METHODS
    assert tuple(divergence.DIVERGENCES) == config_lib.DIVERGENCES
    assert config_lib.TAILS == sparse.TAILS
    assert set(config_lib.ACTIVATIONS) == set(layers.ACTIVATIONS)
