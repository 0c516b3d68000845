"""Accuracies of choices, row by row, against lm-evaluation-harness on the export."""

import json

import jax
import numpy as np
import pytest

from kdjax.data import templates
from kdjax.evaluation.scorer import Scorer
from kdjax.experiment.run import open_run
from kdjax.models import hf, lm
from tests import helpers
from tests.data.test_views import byte_level

TASK = """
task: arc_like
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: prompt
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
"""
NOUNS = ["sun", "rain", "élan", "stone", "leaf", "tide", "mist", "granite", "ash"]


def arc_like(num: int) -> list[dict]:
    """Make questions with 3 to 5 choices of different lengths, not all in ASCII."""
    draws = np.random.default_rng(0)
    rows = []
    for number in range(num):
        texts = {" ".join(draws.choice(NOUNS, draws.integers(1, 4))) for _ in range(5)}
        choices = sorted(texts)[: draws.integers(2, 6)]
        rows.append(
            {
                "id": str(number),
                "question": f"Which of these is number {number}?",
                "choices": choices,
                "answer": choices[draws.integers(len(choices))],
            }
        )
    return rows


@pytest.mark.slow
def test_a_student_has_the_harness_accuracies(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import evaluator, tasks
    from lm_eval.models.huggingface import HFLM

    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "rows.jsonl"
    rows = arc_like(101)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = helpers.small_config(
        data={
            "source": "jsonl",
            "path": str(file),
            "num_train": 1,
            "num_eval": 100,
            "tokenizer": str(tmp_path / "tokenizer"),
            "max_prompt": 250,
            "max_target": 60,
        },
        method={"name": "finetune", "soft_weight": 0.0},
        evaluation={"row_length": 320},
    )
    config.student.decoder.init_std = 0.3
    run = open_run(config, tmp_path, splits=("eval",))
    params = lm.init_params(run.student.shape, jax.random.key(0))
    scorer = Scorer(run)
    metrics = scorer(params)
    own = scorer.choice_rows()
    hf.save(tmp_path / "export", run.student.shape, params, tokenizer)

    examples = run.data.eval_examples
    documents = [
        {
            "prompt": templates.render(example, "label", config.data)[0].prompt,
            "choices": example.choices,
            "answer": example.choices.index(example.answer),
        }
        for example in examples
    ]
    data = tmp_path / "documents.json"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "arc_like.yaml").write_text(TASK.format(file=data))
    results = evaluator.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "export"), device="cpu", batch_size=8),
        tasks=["arc_like"],
        task_manager=tasks.TaskManager(
            include_path=str(tmp_path / "tasks"), include_defaults=False
        ),
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["arc_like"], key=lambda row: row["doc_id"])
    assert len(samples) == len(own) == 100
    for sample, row in zip(samples, own, strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(row["log_probs"], theirs, rtol=2e-5, atol=2e-4)
        for name in ("acc", "acc_norm", "acc_bytes"):
            assert row[name] == bool(sample[name]), (name, row)
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert metrics[name] == pytest.approx(
            results["results"]["arc_like"][f"{name},none"]
        )
    assert 0 < metrics["acc"] < 1
    assert any(row["acc"] != row["acc_norm"] for row in own)
