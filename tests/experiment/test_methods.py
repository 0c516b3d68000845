"""Methods: views, shares, terms, and what a config may say about them."""

import json

import jax
import numpy as np
import pytest

from kdjax.config import MethodConfig, PrefixConfig
from kdjax.experiment import methods, validate
from kdjax.experiment.data import load_data
from kdjax.experiment.models import load_model
from kdjax.parallel import sharding
from kdjax.teacher import cache as cache_lib
from tests import helpers


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("finetune", {"label": 1.0}),
        ("rationale_then_label", {"rationale_then_label": 1.0}),
        ("text", {"text": 1.0}),
        ("multitask", {"label": 0.2, "rationale": 0.8}),
        ("counterfactual", {"factual": 0.7, "counterfactual": 0.3}),
        (
            "multitask_counterfactual",
            {"label": 0.12, "rationale": 0.48, "factual": 0.28, "counterfactual": 0.12},
        ),
    ],
)
def test_views_share_the_loss(name, shares):
    config = MethodConfig(
        name=name,
        label_weight=0.2,
        counterfactual_weight=0.3,
        multitask_weight=0.6,
        hard_weight=0.25,
        soft_weight=0.5,
    )
    assert methods.views(config) == tuple(shares)
    assert methods.shares(config) == pytest.approx(tuple(shares.values()))
    assert sum(methods.shares(config)) == pytest.approx(1)
    weights = {term.name: term.weight for term in methods.terms(config)}
    assert weights == pytest.approx(
        {f"{view}/hard": 0.25 * share for view, share in shares.items()}
        | {f"{view}/soft": 0.5 * share for view, share in shares.items()}
    )
    for term in methods.terms(config):
        assert term.name.startswith(f"{list(shares)[term.view]}/")


def test_every_method_has_shares():
    for name, views in methods.METHODS.items():
        assert len(methods.shares(MethodConfig(name=name))) == len(views)


def test_the_counterfactual_view_is_for_training():
    for name, views in methods.METHODS.items():
        held_out = methods.held_out_views(MethodConfig(name=name))
        assert held_out == views[: len(held_out)]
        assert set(views) - set(held_out) <= {"counterfactual"}
    config = MethodConfig(name="counterfactual")
    assert methods.held_out_views(config) == ("factual",)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("method", {"counterfactual_weight": 1.5}, "counterfactual_weight=1.5 is a sh"),
        ("method", {"multitask_weight": -0.1}, "multitask_weight=-0.1 is a share"),
        ("data", {"counterfactual_place": "encoder"}, "counterfactual_place='encoder'"),
        (
            "data",
            {"prompt_suffix": False},
            r"data.prompt_suffix=False .* \['label', 'rationale'\]",
        ),
        (
            "data",
            {
                "prompt_suffix": False,
                "prefixes": PrefixConfig(label="[a]", rationale="[a]"),
            },
            r"\['\[a\]', '\[a\]'\]",
        ),
        ("data", {"counterfactuals": "c.jsonl"}, "data.counterfactuals='c.jsonl' with"),
    ],
)
def test_what_a_method_cannot_be_is_named(part, values, message):
    with pytest.raises(ValueError, match=message):
        validate.validate(helpers.small_config(**{part: values}))


def test_prefixes_alone_tell_views_apart():
    prefixes = PrefixConfig(label="[predict]")
    config = helpers.small_config(data={"prompt_suffix": False, "prefixes": prefixes})
    validate.validate(config)
    data = load_data(config, splits=("train",))
    for label, rationale in zip(data.train[::2], data.train[1::2], strict=True):
        assert label.prompt_ids[1:].tolist() == rationale.prompt_ids.tolist()
    one = helpers.small_config(
        data={"prompt_suffix": False}, method={"name": "rationale_then_label"}
    )
    validate.validate(one)


@pytest.mark.parametrize("place", ["decoder", "prompt"])
def test_wrong_choices_are_trained_on_and_not_held_out(place):
    config = helpers.small_config(
        data={"counterfactual_place": place},
        method={"name": "multitask_counterfactual"},
    )
    data = load_data(config)
    assert data.views == (*data.eval_views, "counterfactual")
    assert {segment.view for segment in data.evaluation} == {0, 1, 2}
    wrong = [segment for segment in data.train if segment.view == 3]
    assert len(wrong) == 24 * 4
    assert all(len(s.prefix_ids) > 0 for s in wrong) == (place == "decoder")


def test_a_run_with_all_four_views(t5_run):
    _, workdir = t5_run
    student = helpers.summary(workdir)["student"]
    names = {name for name in student if "/" in name}
    views = ("label", "rationale", "factual")
    assert names == {
        *(f"nll/{view}" for view in views),
        "exact_match/label",
        "exact_match_strict/label",
        "answer_match/factual",
        "answer_match_strict/factual",
    }
    lines = (workdir / "generations.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["view"] for row in rows] == [*views] * 2
    assert ["answer" in row for row in rows] == [False, False, True] * 2


def test_the_teacher_read_what_stands_before_a_wrong_choice(t5_run):
    """Every wrong choice is labelled after its rationale."""
    config, workdir = t5_run
    data = load_data(config, splits=("train",))
    cache = cache_lib.load_cache(workdir / "cache" / "train")
    assert cache.num_records == len({segment.key for segment in data.train})
    wrong = [segment for segment in data.train if segment.view == 3]
    mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:1])
    model, params = load_model(config.teacher.path, mesh, dtype="float32")

    logits_of = helpers.row_logits(model, params)

    def log_probs(ids, target):
        logits = logits_of(ids)[-1 - len(target) : -1]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logp[np.arange(len(target)), target]

    away = 0.0
    for segment in wrong[:4]:
        stored = cache.read(segment.key).target_log_probs
        expected = log_probs(segment.ids, segment.target_ids)
        np.testing.assert_allclose(stored, expected, atol=0.05)
        without = np.concatenate([segment.prompt_ids, segment.target_ids])
        away = max(
            away, np.abs(log_probs(without, segment.target_ids) - expected).max()
        )
    assert away > 0.2
