"""From explanations to a frozen design."""

import itertools
import json
import re

import pytest

from kdjax.survey import items, plan, power, texts
from kdjax.survey.config import StudyConfig, validate
from tests.survey import explanations


def test_a_design_is_frozen(tmp_path):
    study = explanations.study(tmp_path)
    assert plan.read(tmp_path) == study
    content = (tmp_path / plan.DESIGN).read_bytes()
    assert explanations.study(tmp_path) == study  # the same inputs
    assert (tmp_path / plan.DESIGN).read_bytes() == content
    with pytest.raises(ValueError, match=r"is frozen.*differs in.*config.*seed"):
        explanations.study(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"is frozen.*inputs"):
        explanations.study(tmp_path, rationales={"plain": "Another one."})
    assert (tmp_path / plan.DESIGN).read_bytes() == content
    changed = content.replace(b"red and round", b"green")
    (tmp_path / plan.DESIGN).write_bytes(changed)
    with pytest.raises(ValueError, match="was changed after it was frozen"):
        plan.read(tmp_path)


def test_what_is_rated(tmp_path):
    study = explanations.study(tmp_path)
    assert study.conditions == (*explanations.STUDENTS, "placebo")
    assert len(study.questions) == study.layout.num_questions == 8
    strata = [set(question.right) for question in study.questions]
    assert strata == [{True}] * 4 + [{False}] * 4  # sets of four conditions
    for question in study.questions:
        assert question.rationales[3].startswith(f"The answer is {question.answers[3]}")
    rated = {question.id for question in study.questions}
    assert rated.isdisjoint(question.id for question in study.practice)


@pytest.mark.parametrize("answers", ["right", "wrong", "any"])
def test_answers(tmp_path, answers):
    study = explanations.study(tmp_path, answers=answers)
    right = {r for question in study.questions for r in question.right}
    assert right == {"right": {True}, "wrong": {False}, "any": {True, False}}[answers]


def test_reference_rationales_are_a_condition(tmp_path):
    rows = [{"id": f"q{i}", "text": f"A person says {i}."} for i in range(80)]
    file = tmp_path / "human.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = explanations.study(tmp_path, reference=str(file), controls=())
    assert study.conditions == (*explanations.STUDENTS, "reference")
    for question in study.questions:
        assert question.answers[3] == "apple" and question.right[3]
        assert question.rationales[3].startswith("A person says")


def test_long_missing_and_repeated_questions_are_left_out(tmp_path):
    file = explanations.write(tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["rationale"] = "word " * 401
    rows[2]["rationale"] = " "
    rows[4]["question"] = rows[6]["question"] = "The same?"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in rows if row is not rows[8])
    )
    config = explanations.config(file)
    students, _ = items.read(config)
    pools = items._pools(config, students, list(students))
    assert {"q0", "q2", "q6", "q8"}.isdisjoint(pools["any"])
    assert len(pools["any"]) == 76


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"gold": None}, "gold is a text"),
        ({"gold": ""}, "add gold"),
        ({"answer": 3}, "answer is missing or no text"),
        ({"choices": "a"}, "choices is a list"),
        ({"id": "q1"}, "comes twice"),
        ({"student": ""}, "student is missing"),
    ],
)
def test_rows_that_are_not_valid_are_named(tmp_path, row, message):
    file = explanations.write(tmp_path, num=3)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2] |= row
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(ValueError, match=rf"explanations.jsonl:3: .*{message}"):
        items.read(explanations.config(file))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"students": ("nobody",)}, r"students=\['nobody'\].*plain"),
        ({"participants": 160}, r"needs 40 questions .* there are|practice_items"),
        ({"participants": 17}, "participants=17 .* use participants=16"),
        ({"preferences": 100}, "use at most 4"),
        ({"constructs": ("beauty",)}, r"no statement.*\[statements\]"),
        ({"language": "xx"}, r"use one of \['en'\]"),
        ({"known_checks": 4, "participants": 16}, "the texts have 3"),
    ],
)
def test_what_cannot_be_planned_says_what_can(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        explanations.study(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "name the directory"),
        ({"files": ("a",), "contact": ""}, "whom to write to"),
        ({"files": ("a",), "points": 6}, "points=6: use 5 or 7"),
        ({"files": ("a",), "ratings_per_item": 1}, "ratings_per_item=1 is below 2"),
        ({"files": ("a",), "controls": ("none",)}, "use one of"),
        ({"files": ("a",), "completion_url": "http://x"}, "https://"),
        ({"files": ("a",), "constructs": ()}, "at least one"),
    ],
)
def test_fields_have_limits(fields, message):
    with pytest.raises(ValueError, match=message):
        validate(StudyConfig(**({"contact": "x@example.org"} | fields)))


def test_texts_of_ones_own(tmp_path):
    file = tmp_path / "texts.toml"
    file.write_text('[statements]\nbeauty = "It is <b>beautiful</b>."\n')
    study = explanations.study(tmp_path / "w", constructs=("beauty",), texts=str(file))
    assert study.texts["statements"]["beauty"] == "It is <b>beautiful</b>."
    sheet = (tmp_path / "w" / plan.SHEET).read_text()
    assert "&lt;b&gt;beautiful" in sheet and study.hash in sheet
    for text, message in (
        ("[nowhere]\na = 1\n", r"no \[nowhere\]"),
        ("[buttons]\nnext = 3\n", "buttons.next is no entry"),
        ("[buttons\n", "no valid TOML"),
        ('[consent]\nparagraphs = ["{wages}"]\n', "placeholder 'wages'"),
    ):
        file.write_text(text)
        config = explanations.config(tmp_path, texts=str(file))
        with pytest.raises(ValueError, match=message):
            texts.read(config, 4)


def test_power_rises_with_difference_and_people(tmp_path):
    file = explanations.write(tmp_path)
    study = plan.run(explanations.config(file), tmp_path, power=True)
    curve = power.simulate(study.config, study.layout)
    assert list(curve.powers) == [16, 32, 48]
    for shares in curve.powers.values():
        assert shares[0] < 0.03 and shares[-1] > 0.5  # Bonferroni over six pairs
        assert all(b > a - 0.05 for a, b in itertools.pairwise(shares))
    assert curve.detectable[48] < curve.detectable[32]
    assert "<svg" in (tmp_path / plan.SHEET).read_text()
    assert (tmp_path / plan.POWER).is_file()


def test_components_of_a_pilot(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    people, questions = rng.normal(0, 0.6, 60), rng.normal(0, 0.4, 60)
    lines = ["participant,question,condition,plausibility"]
    for person in range(60):
        for question in range(0, 60, 2):
            value = 3 + people[person] + questions[question] + rng.normal(0, 0.8)
            lines.append(
                f"p{person},q{question},c{(person + question // 2) % 2},{value}"
            )
    file = tmp_path / "pilot.csv"
    file.write_text("\n".join(lines) + "\n")
    components = power.estimate(file, ("plausibility",))
    assert abs(components.participant - people.std()) < 0.1
    assert abs(components.question - questions[::2].std()) < 0.1
    assert abs(components.residual - 0.8) < 0.05
    with pytest.raises(ValueError, match=r"columns \['clarity'\] are missing"):
        power.estimate(file, ("clarity",))


def test_english_has_a_text_for_everything():
    assert texts.languages() == ["en"]
    words = texts.read(StudyConfig(files=("a",), contact="x@example.org"), 12)
    joined = json.dumps(words)
    assert not re.search(r"\{(institution|contact|minutes|num_items)\}", joined)
