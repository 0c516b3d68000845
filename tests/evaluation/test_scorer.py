"""Held-out measures, by hand."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from kdjax.config import DataConfig, StudentConfig
from kdjax.data import templates
from kdjax.data.example import Example
from kdjax.data.tokenizer import make_word_tokenizer
from kdjax.evaluation.scorer import Scorer
from kdjax.evaluation.text_match import compare, match_rates
from kdjax.experiment.models import load_model, student_params
from kdjax.experiment.run import open_run
from kdjax.experiment.teacher import with_vocabulary
from kdjax.models import hf, lm
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


@pytest.mark.parametrize(
    ("data", "evaluation", "message"),
    [
        ({}, {}, r"'choices'.*has \d+ tokens, max_target=8: use max_target >= 1\d"),
        ({"on_long": "drop"}, {}, "on_long='drop' leaves no held-out example with all"),
        ({"max_target": 64}, {"row_length": 24}, "row_length=24: use row_length >= "),
    ],
)
def test_choices_that_do_not_fit_are_refused_before_training(
    data, evaluation, message, tmp_path
):
    """The right ones, which are trained on, are shorter than the others."""
    row = {
        "id": "choices",
        "question": "Who is Alice to Bob?",
        "choices": ["aunt", "the aunt of the sister of the mother of the aunt"],
        "answer": "aunt",
    }
    data = {"max_target": 8, "max_unknown": 1.0, "num_train": 1, "num_eval": 1} | data
    for name in ("path", "eval_path"):
        data[name] = str(tmp_path / f"{name}.jsonl")
        line = json.dumps(row | {"question": f"Who is Alice to {name}?"})
        pathlib.Path(data[name]).write_text(f"{line}\n")
    config = helpers.small_config(
        data=data,
        teacher={"path": str(_teacher(tmp_path, helpers.DECODER))},
        method={"name": "finetune"},
        evaluation=evaluation,
    )
    with pytest.raises(ValueError, match=message):
        distill.open_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _teacher(folder, shape):
    """A folder of a model with random weights and the built-in task's tokenizer."""
    tokenizer = make_word_tokenizer()
    shape = with_vocabulary(shape, tokenizer)
    params = lm.init_params(shape, jax.random.key(0))
    hf.save(folder / "teacher", shape, params, tokenizer)
    return folder / "teacher"


def test_a_teacher_that_does_not_divide_over_the_mesh_is_refused(tmp_path):
    """It is labelled by data parallelism alone, and scored as the student is."""
    config = helpers.small_config(mesh={"data": -1, "tensor": 8})
    config.teacher.decoder = dataclasses.replace(helpers.DECODER, mlp_width=68)
    with pytest.raises(ValueError, match=r"the teacher, .* does not divide over 8"):
        distill.open_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_of_a_teacher_with_an_encoder_are_checked_before_training(tmp_path):
    config = helpers.small_config(
        teacher={"path": str(_teacher(tmp_path, helpers.T5))},
        evaluation={"encoder_row_length": 8},
    )
    with pytest.raises(ValueError, match=r"the teacher, .* encoder_length=8: use"):
        distill.open_experiment(config, tmp_path / "run")


def test_the_dtype_of_a_cache_is_of_decoders_alone(tmp_path):
    """A teacher with an encoder is no reason to refuse it, a student is."""
    path = str(_teacher(tmp_path, helpers.T5))
    config = helpers.small_config(
        teacher={"path": path}, evaluation={"cache_dtype": "int8"}
    )
    run = distill.open_experiment(config, tmp_path / "run")
    Scorer(run, load_model(path, run.mesh, dtype="float32")[0])
    config.student = StudentConfig(init="folder", path=path)
    with pytest.raises(ValueError, match=r"cache_dtype='int8': the student is an enc"):
        distill.open_experiment(config, tmp_path / "other")
