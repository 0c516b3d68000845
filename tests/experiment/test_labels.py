"""Whole runs on a teacher's answers, and on data with missing rationales."""

import json

import numpy as np
import pytest

from kdjax import config as config_lib
from kdjax import train
from kdjax.data import kinship
from kdjax.data import tokenizer as tokenizers
from kdjax.experiment import resume, validate, workdir
from kdjax.experiment.data import load_data
from tests import helpers

NUM, NUM_EVAL = 12, 4


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Examples of which every fourth has no rationale, and a teacher's answers."""
    base = tmp_path_factory.mktemp("labels")
    tokenizers.make_word_tokenizer().save_pretrained(base / "tokenizer")
    num = NUM + NUM_EVAL
    found = kinship.generate(
        helpers.small_config().data.kinship, num_examples=num, seed=0, split="train"
    )
    names = ("id", "question", "choices", "answer")
    rows, labels, rationales = [], [], []
    for index, example in enumerate(found):
        wrong = next(c for c in example.choices if c != example.answer)
        rows.append({name: getattr(example, name) for name in names})
        answer = wrong if index % 3 == 0 else example.answer
        labels.append({"id": example.id, "answer": answer})
        if index % 4:
            rationales.append({"id": example.id, "text": example.rationale})
    for name, each in (("rows", rows), ("labels", labels), ("r", rationales)):
        (base / f"{name}.jsonl").write_text("\n".join(map(json.dumps, each)))
    return base


def config(places, name="finetune", **data):
    made = helpers.small_config(
        data={
            "source": "jsonl",
            "path": str(places / "rows.jsonl"),
            "num_train": 0,
            "num_eval": NUM_EVAL,
            "tokenizer": str(places / "tokenizer"),
            **data,
        },
        method={"name": name, "hard_weight": 1.0, "soft_weight": 0.0},
        train={"steps": 2, "save_every": 0},
        evaluation={"num_generations": 0},
    )
    validate.validate(made)
    return made


def load(made, splits=("train",)):
    return load_data(made, splits=splits)


def test_a_run_reports_how_right_the_teacher_is(places, tmp_path, capsys):
    labels = str(places / "labels.jsonl")
    made = config(places, labels=labels, wrong_labels="weight", wrong_label_weight=0.25)
    train.run(made, tmp_path)
    said = capsys.readouterr().err
    assert "labels: 66.67% of the teacher's answers to 12 training" in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["labels"] == {
        "examples": 12,
        "without": 0,
        "wrong": 4,
        "dropped": 0,
        "accuracy": pytest.approx(2 / 3),
    }
    # It has hard labels alone, and no teacher.
    assert summary["teacher"] == {} and summary["parameters"]["teacher"] is None
    assert np.isfinite(summary["student"]["nll"]) and "kl" not in summary["student"]
    # The run is measured by gold answers.
    gold, told = load(config(places), ("eval",)), load(made, ("eval",))
    assert [s.key for s in told.evaluation] == [s.key for s in gold.evaluation]
    for name, value in (
        ("wrong_labels", "drop"),
        ("labels", ""),
        ("wrong_label_weight", 0.5),
    ):
        other = config_lib.from_json(config_lib.to_json(made))
        setattr(other.data, name, value)
        with pytest.raises(ValueError, match=f"another config .data.{name}: "):
            workdir.check_owner(tmp_path, other)
        assert len(resume.differences(made, other)) == 1


def test_targets_are_the_teachers_answers(places):
    labels = str(places / "labels.jsonl")
    gold = load(config(places)).train
    kept = load(config(places, labels=labels)).train
    dropped = load(config(places, labels=labels, wrong_labels="drop")).train
    same = [
        np.array_equal(a.target_ids, b.target_ids)
        for a, b in zip(gold, kept, strict=True)
    ]
    assert same == [index % 3 != 0 for index in range(NUM)]
    assert [s.key for s in dropped] == [
        s.key for s in gold if s.key in {t.key for t in kept}
    ]
    assert {segment.weight for segment in (*gold, *kept, *dropped)} == {1.0}
    weighed = config(
        places, labels=labels, wrong_labels="weight", wrong_label_weight=0.0
    )
    found = [segment.weight for segment in load(weighed).train]
    assert found == [float(index % 3 != 0) for index in range(NUM)]


def test_examples_without_rationales_are_left_out_whole(places, capsys):
    rationales = str(places / "r.jsonl")
    fields = {"rationales": rationales, "eval_rationales": rationales}
    with pytest.raises(ValueError, match="3 of 12 training examples have no rationale"):
        load(config(places, "multitask", **fields))
    made = config(places, "multitask", **fields, on_missing="drop")
    data = load(made)
    ids = [segment.example_id for segment in load(config(places)).train]
    kept = [name for index, name in enumerate(ids) if index % 4]
    assert [s.example_id for s in data.train] == [name for name in kept for _ in "lr"]
    assert "3 of 12 examples left out, without rationale" in capsys.readouterr().err
    # Held-out examples are not chosen by what explains them.
    with pytest.raises(ValueError, match="1 of 4 held-out examples have no rationale"):
        load(made, ("eval",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"wrong_labels": "doubt", "labels": "l"},
            "data.wrong_labels='doubt' is unknown",
        ),
        ({"on_missing": "label_only"}, "data.on_missing='label_only' is unknown"),
        ({"wrong_label_weight": 1.5}, "data.wrong_label_weight=1.5 is a share"),
        ({"wrong_labels": "drop"}, "data.wrong_labels='drop' with data.labels=''"),
    ],
)
def test_what_cannot_be_is_named(places, fields, message):
    with pytest.raises(ValueError, match=message):
        config(places, **fields)
    with pytest.raises(ValueError, match=r"data.labels='l' with data.source"):
        validate.validate(helpers.small_config(data={"labels": "l"}))
