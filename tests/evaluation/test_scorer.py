"""Held-out measures, by hand."""

import math

import jax
import numpy as np
import pytest

from kdjax.config import DataConfig
from kdjax.data import templates
from kdjax.data.example import Example
from kdjax.evaluation.scorer import Scorer
from kdjax.evaluation.text_match import compare, match_rates
from kdjax.experiment.models import student_params
from kdjax.experiment.run import open_run
from kdjax.pipeline import distill
from tests import helpers
from tests.helpers import FakeCache


def test_nll_and_perplexity_are_the_models_own(tmp_path):
    """Whatever the teacher says of the same tokens."""
    config = helpers.small_config()
    run = open_run(config, tmp_path, devices=jax.devices()[:1])
    data, model = run.data, run.student
    params = student_params(config, model, "")()
    cache = FakeCache(data.evaluation, model.shape.vocab_size)
    found = Scorer(run, cache=cache)(params)
    logits_of = helpers.row_logits(model, params)
    total = count = 0
    for segment in data.evaluation:
        ids = np.concatenate([segment.prompt_ids, segment.target_ids])
        logits = logits_of(ids)[len(segment.prompt_ids) - 1 : -1]
        log_z = np.log(np.exp(logits).sum(-1))
        total += (log_z - logits[np.arange(len(logits)), segment.target_ids]).sum()
        count += len(logits)
    np.testing.assert_allclose(found["nll"], total / count, rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], math.exp(total / count), rtol=1e-4)
    assert found["kl"] > 0.1


EXAMPLE = Example(
    id="q", question="Who ?", answer="Her aunt", rationale="She is an aunt ."
)


@pytest.mark.parametrize(
    ("generated", "answer", "matches", "strict"),
    [
        ("She is an aunt .\nAnswer: Her aunt", "Her aunt", True, True),
        ("Something else. Answer: her  aunt. ", "her  aunt.", True, False),
        ("Answer: uncle\nAnswer: Her aunt", "Her aunt", True, True),
        ("Her aunt", "Her aunt", True, True),
        # The right answer within another is another answer.
        ("She is.\nAnswer: Her aunt or uncle", "Her aunt or uncle", False, False),
        ("She is her aunt. Answer: her uncle", "her uncle", False, False),
        ("", "", False, False),
    ],
)
@pytest.mark.parametrize("view", templates.EXPLAINED)
def test_answers_are_parsed_and_compared(view, generated, answer, matches, strict):
    [text] = templates.render(EXAMPLE, view, DataConfig())
    row = compare(generated, EXAMPLE, view, text)
    assert (row["generated"], row["answer"]) == (generated.strip(), answer)
    assert (row["answer_match"], row["answer_match_strict"]) == (matches, strict)
    assert "exact_match" not in row


def test_rates_are_shares_of_each_view():
    rows = []
    for view, generated in (
        ("label", "her aunt ."),
        ("label", " Her aunt"),
        ("label", "Her uncle"),
        ("rationale", "She is an aunt ."),
        ("factual", "Because. Answer: Her aunt"),
        ("factual", "Answer: uncle"),
    ):
        [text] = templates.render(EXAMPLE, view, DataConfig())
        rows.append({"view": view} | compare(generated, EXAMPLE, view, text))
    assert match_rates(rows) == pytest.approx(
        {
            "exact_match/label": 2 / 3,
            "exact_match_strict/label": 1 / 3,
            "answer_match/factual": 1 / 2,
            "answer_match_strict/factual": 1 / 2,
        }
    )
    assert match_rates([]) == {}


def test_rows_are_rounded_up_to_what_divides_over_the_mesh(tmp_path):
    found = []
    for number in (1, 3):
        config = helpers.small_config(
            train={"batch_size": 12}, evaluation={"batch_size": 8}
        )
        folder = tmp_path / str(number)
        run = open_run(config, folder, devices=jax.devices()[:number])
        params = student_params(config, run.student, "")()
        found.append(Scorer(run, cache=None)(params)["nll"])
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"row_length": 8}, "row_length=8: use row_length >= "),
        (
            {"max_new_tokens": 100_000, "num_generations": 2},
            r"max_new_tokens=100000: .* room for \d+ in ",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(fields, message, tmp_path):
    config = helpers.small_config(evaluation=fields)
    with pytest.raises(ValueError, match=message):
        distill.open_experiment(config, tmp_path)
    assert not list(tmp_path.glob("config*"))
