import dataclasses
import json

import pytest

from kdjax.config import DataConfig
from kdjax.data import selection, sources
from kdjax.data.example import Example

FULL = Example(
    id="full",
    question="?",
    choices=("here", "there", "away"),
    answer="there",
    rationale="So there.",
    counterfactuals=("Here.", "Away."),
)
BARE = dataclasses.replace(FULL, id="bare", rationale="", counterfactuals=())
TOLD = dataclasses.replace(FULL, id="told", counterfactuals=("", ""))
EXAMPLES = [FULL, BARE, TOLD]
DROP = DataConfig(on_missing="drop")


@pytest.mark.parametrize(
    ("views", "kept", "counts"),
    [
        (("label",), ["full", "bare", "told"], {}),
        (("label", "rationale"), ["full", "told"], {"rationale": 1}),
        (("rationale_then_label",), ["full", "told"], {"rationale": 1}),
        (
            ("label", "factual", "counterfactual"),
            ["full"],
            {"rationale": 1, "counterfactuals": 1},
        ),
    ],
)
def test_examples_without_what_a_view_needs_are_left_out(views, kept, counts):
    found = selection.select(EXAMPLES, views, "train", DROP)
    assert [example.id for example in found.examples] == kept
    assert found.labels == {}
    assert found.notes == [
        f"train: {num} of 3 examples left out, without {part} (data.on_missing=drop)"
        for part, num in counts.items()
    ]


@pytest.mark.parametrize(
    ("split", "config", "message"),
    [
        (
            "train",
            DataConfig(),
            r"^4 of 6 training examples have no rationale, which view 'rationale' "
            r"needs \(first: 'e0', 'e1', 'e2'\): give the data theirs "
            r"\(data.rationales\), leave them out \(data.on_missing='drop'\), or use a "
            "method without that view$",
        ),
        (
            "eval",
            DROP,
            r"^4 of 6 held-out examples .*\(data.eval_rationales\), or use a method",
        ),
    ],
)
def test_missing_rationales_are_an_error_that_counts(split, config, message):
    bare = [dataclasses.replace(BARE, id=f"e{i}") for i in range(4)]
    full = [dataclasses.replace(FULL, id=f"f{i}") for i in range(2)]
    with pytest.raises(ValueError, match=message):
        selection.select([*bare, *full], ("label", "rationale"), split, config)


def test_missing_counterfactuals_are_an_error_that_counts():
    message = r"1 of 2 .* have no counterfactuals, .*\(first: 'told'\).*data.counterf"
    with pytest.raises(ValueError, match=message):
        selection.select([FULL, TOLD], ("counterfactual",), "train", DataConfig())


def test_something_must_stay():
    with pytest.raises(
        ValueError, match=r"leaves none of 1 training examples: .*no rat"
    ):
        selection.select([BARE], ("rationale",), "train", DROP)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(*examples):
    names = ("id", "question", "choices", "answer", "rationale", "counterfactuals")
    return [{name: getattr(e, name) for name in names} for e in examples]


def data(tmp_path, labels, examples=EXAMPLES, **fields):
    return DataConfig(
        source="jsonl",
        path=write(tmp_path / "rows.jsonl", rows(*examples)),
        eval_path=write(tmp_path / "eval.jsonl", rows(*examples)),
        labels=write(tmp_path / "labels.jsonl", labels),
        **fields,
    )


def named(*answers):
    ids = [example.id for example in EXAMPLES]
    return [{"id": i, "answer": a} for i, a in zip(ids, answers, strict=False)]


def test_a_teachers_answers_stand_for_the_gold_ones(tmp_path):
    config = data(tmp_path, named("here", "there", "there"))
    full, bare, told = sources.load_examples(config, "train", seed=0)
    assert (full.answer, full.gold) == ("here", "there")
    # What explained the gold answer is gone; that of another wrong choice is not.
    assert full.rationale == "" and full.counterfactuals == ("", "Away.")
    assert bare == dataclasses.replace(BARE, gold="there")
    assert told == dataclasses.replace(TOLD, gold="there")
    # Held-out rows are gold.
    assert sources.load_examples(config, "eval", seed=0) == EXAMPLES


def test_what_is_joined_explains_the_teachers_answers(tmp_path):
    rationales = [{"id": "full", "text": "So here."}]
    counterfactuals = [
        {"id": "full", "choice": "here", "text": "Was for a wrong choice."},
        {"id": "full", "choice": "away", "text": "So away."},
        {"id": "full", "choice": "there", "text": "So there."},
    ]
    config = data(
        tmp_path,
        named("here"),
        rationales=write(tmp_path / "r.jsonl", rationales),
        counterfactuals=write(tmp_path / "c.jsonl", counterfactuals),
    )
    full, bare, _ = sources.load_examples(config, "train", seed=0)
    assert full.rationale == "So here."
    assert full.counterfactuals == ("So there.", "So away.")
    assert bare.answer == ""  # none in the file


@pytest.mark.parametrize(
    ("wrong_labels", "kept", "dropped"),
    [
        ("keep", {"full": 1.0, "told": 1.0}, 0),
        ("drop", {"told": 1.0}, 1),
        ("weight", {"full": 0.25, "told": 1.0}, 0),
    ],
)
def test_wrong_answers_are_kept_left_out_or_weighed(
    tmp_path, wrong_labels, kept, dropped
):
    config = data(
        tmp_path,
        named("here", "", "there"),
        wrong_labels=wrong_labels,
        wrong_label_weight=0.25,
        on_missing="drop",
    )
    examples = sources.load_examples(config, "train", seed=0)
    found = selection.select(examples, ("label",), "train", config)
    assert {example.id: example.weight for example in found.examples} == kept
    assert found.labels == {
        "examples": 3,
        "without": 1,
        "wrong": 1,
        "dropped": dropped,
        "accuracy": 0.5,
    }
    [note] = found.notes
    assert note.startswith("labels: 50.00% of the teacher's answers to 3 training")
    held_out = sources.load_examples(config, "eval", seed=0)
    found = selection.select(held_out, ("label",), "eval", config)
    assert found.examples == held_out
    assert (found.labels, found.notes) == ({}, [])


def test_free_answers_are_compared_as_they_are(tmp_path):
    examples = [
        Example(id=name, question="1 + 1?", answer="2")
        for name in ("full", "bare", "told")
    ]
    config = data(tmp_path, named(" 2 ", 2, "3"), examples)
    found = sources.load_examples(config, "train", seed=0)
    assert [example.answer for example in found] == ["2", "2", "3"]
    assert selection.apply_label_policy(found, config)[1]["accuracy"] == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize(
    ("labels", "fields", "message"),
    [
        (named("moon"), {}, "'full' has 'moon', which is no choice of .*'here'"),
        (named("here") * 2, {}, "'full' occurs twice"),
        (named(1), {}, "'full' has the number 1, which may be an index or a text"),
        (named(True), {}, "labels.jsonl:1: answer=True is a truth value, not text"),
        (named(["here"]), {}, "labels.jsonl:1: answer=.'here'. is a list, not text"),
        ([{"id": "full", "text": "here"}], {}, "use id, answer"),
        ([{"id": "x", "answer": "here"}], {}, "no id of the examples"),
        (named("", None, ""), {}, "no id of the examples"),
        (
            named("here", ""),
            {},
            r"no answer for 2 of 3 .*\(first: 'bare', 'told'\).*on_missing='drop'",
        ),
        (
            named(*["here"] * 3),
            {"wrong_labels": "drop"},
            "wrong_labels='drop' leaves none of 3",
        ),
    ],
)
def test_bad_labels_are_named(tmp_path, labels, fields, message):
    config = data(tmp_path, labels, **fields)
    with pytest.raises(ValueError, match=message):
        selection.apply_label_policy(
            sources.load_examples(config, "train", seed=0), config
        )


def test_texts_have_no_labels(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"id": "t", "text": "Once."}] * 1)
    labels = write(tmp_path / "l.jsonl", [{"id": "t", "answer": "x"}])
    config = DataConfig(source="jsonl", path=path, eval_path=labels, labels=labels)
    with pytest.raises(ValueError, match=r"'t' .*t.jsonl:1\) has no answer to rep"):
        sources.load_examples(config, "train", seed=0)
