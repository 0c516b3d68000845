"""From explanations to a frozen design."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from kdjax.survey import items, plan, power, texts
from kdjax.survey.answers import ANSWERS, Answers
from kdjax.survey.config import StudyConfig, validate
from tests.survey import explanations

ROOT = pathlib.Path(__file__).parent.parent.parent


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


def comparison(folder, students):
    """A finished comparison on the built-in task, with made-up generations."""
    from kdjax import config as config_lib
    from kdjax.config import Config, DataConfig, KinshipConfig, MethodConfig
    from kdjax.data import sources

    lines = []
    for index, (name, method) in enumerate(students.items()):
        config = Config(
            data=DataConfig(
                source="kinship",
                num_train=8,
                num_eval=200,
                kinship=KinshipConfig(min_hops=2, max_hops=2),
            ),
            method=MethodConfig(name=method),
        )
        run = folder / "runs" / f"{name}-s0"
        run.mkdir(parents=True)
        (run / "config.json").write_text(config_lib.to_json(config))
        rows = []
        for place, example in enumerate(
            sources.load_examples(config.data, "eval", seed=0)
        ):
            wrong = next(c for c in example.choices if c != example.answer)
            answer = example.answer if place % 3 else wrong
            views = {"label": answer, "rationale": f"{name} says {place} ."}
            if method == "rationale_then_label":
                views = {method: f"{name} says {place} . Answer: {answer}"}
            if method == "finetune":
                del views["rationale"]
            rows += [
                {"id": example.id, "view": view, "generated": text}
                for view, text in views.items()
            ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "generations.jsonl").write_text(text)
        method, labels = name.split("-")
        line = {"index": index, "run": f"runs/{name}-s0", "method": method}
        lines.append(json.dumps(line | {"labels": labels, "seed": "0"}))
    (folder / "runs.jsonl").write_text("\n".join(lines) + "\n")


STUDENTS = {
    "finetune-soft": "finetune",
    "multitask-soft": "multitask",
    "rationale_then_label-soft": "rationale_then_label",
}


def test_the_students_of_a_comparison(tmp_path):
    comparison(tmp_path / "c", STUDENTS)
    config = StudyConfig(comparison=str(tmp_path / "c"), contact="x@example.org")
    students, hashes = items.read(config)
    assert list(students) == ["multitask-soft", "rationale_then_label-soft"]
    assert set(hashes) == {f"runs/{name}-s0/generations.jsonl" for name in STUDENTS}
    for name, explanations_of in students.items():
        assert len(explanations_of) == 200
        first, second = list(explanations_of.values())[:2]
        assert not first.right and second.right and second.answer == second.gold
        assert (
            second.rationale == f"{name} says 1 ." and "Answer" not in second.rationale
        )
    for fields, message in (
        ({"students": ("finetune-soft",)}, "none that explain"),
        ({"run_seed": 3}, r"run_seed=3: the comparison has \[0\]"),
        ({"comparison": str(tmp_path)}, "no runs.jsonl"),
    ):
        other = dataclasses.replace(config, **fields)
        with pytest.raises(ValueError, match=message):
            items.read(other)
    (tmp_path / "c/runs/multitask-soft-s0/generations.jsonl").unlink()
    with pytest.raises(ValueError, match="let the run finish"):
        items.read(config)


COMMAND = re.compile(r"^    (python -m kdjax\.study (?:.*\\\n)*.*)$", re.MULTILINE)


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch):
    """docs/study.md, from a finished comparison on, without the server."""
    page = (ROOT / "docs" / "study.md").read_text()
    commands = [
        shlex.split(text.replace("\\\n", " ")) for text in COMMAND.findall(page)
    ]
    actions = [command[3] for command in commands]
    assert actions[:4] == ["plan", "serve", "export", "analyse"]
    comparison(tmp_path / "runs/compare_kinship", STUDENTS)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    outputs = []
    for command in commands:
        if command[3] in ("serve", "analyse"):  # test_server.py, test_analyse.py
            continue
        if command[3] == "export":
            Answers(tmp_path / "runs/study" / ANSWERS).close()
        process = subprocess.run(
            [sys.executable, *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout)
    study = plan.read(tmp_path / "runs/study")
    assert study.conditions[2:] == ("placebo", "no_rationale")
    assert study.layout.participants == 24
    assert (tmp_path / "runs/study/ratings.csv").is_file()
    assert "preregistration.html" in outputs[0]
