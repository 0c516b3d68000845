"""Answers of a study as tables: ratings.csv and others."""

import csv
import datetime
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from kdjax.runtime import files
from kdjax.survey import answers, design, forms, plan
from kdjax.survey.answers import Answer, Answers, Participant
from kdjax.survey.plan import Study

RATINGS = "ratings.csv"


def run(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Write all tables of a study beside its answers; return their files.

    Raises:
      ValueError: nobody has answered yet.
    """
    study = plan.read(workdir)
    file = workdir / answers.ANSWERS
    if not file.is_file():
        raise ValueError(f"workdir={str(workdir)!r} has no answers: serve the study")
    written = []
    for name, text in tables(study, Answers(file)).items():
        files.write_atomically(workdir / name, text)
        written.append(workdir / name)
    return written


def tables(study: Study, store: Answers) -> dict[str, str]:
    """Return the tables of all answers as csv, by file name.

    ratings.csv has a row per rated explanation, of people who stopped too (their
    `finished` is empty); preferences.csv one per compared pair; participants.csv what
    people said of themselves. panel.csv, the panel's numbers with ends and codes, is
    apart: nothing in it leads to answers.
    """
    people = [
        (person, design.pages(study.layout, person.number), store.latest(person.id))
        for person in store.participants()
    ]
    result = {RATINGS: _ratings(study, people)}
    if study.config.preferences:
        result["preferences.csv"] = _preferences(study, people)
    if study.config.demographics:
        result["participants.csv"] = _demographics(study, people)
    if panel := store.panel():
        header = (*answers.PANEL, "finished", "code")
        result["panel.csv"] = _csv(header, panel)
    return result


Person = tuple[Participant, Sequence[design.Page], Mapping[int, Answer]]


def _ratings(study: Study, people: Sequence[Person]) -> str:
    config = study.config
    header = [
        *("participant", "item", "question", "condition", "order"),
        *config.constructs,
        *("length", "seconds", "attention_failed", "right", "started", "finished"),
    ]
    if config.simulation:
        header.append("predicted")
    rows = []
    for person, pages, latest in people:
        failed = forms.num_failed(study, pages, latest) >= config.exclude_failed
        for index, page in enumerate(pages):
            if page.kind != design.RATING or index not in latest:
                continue
            answer = latest[index]
            question = study.questions[page.question]
            condition = study.conditions[page.condition]
            row = [
                person.id,
                f"{question.id}|{condition}",
                question.id,
                condition,
                page.order,
                *(
                    answer.fields.get(f"s{i}", "")
                    for i in range(len(config.constructs))
                ),
                len(question.rationales[page.condition].split()),
                f"{answer.seconds:.1f}",
                int(failed),
                int(question.right[page.condition]),
                _time(person.started),
                _time(person.finished),
            ]
            if config.simulation:
                row.append(_predicted(study, pages[index - 1], latest.get(index - 1)))
            rows.append(row)
    return _csv(header, rows)


def _predicted(study: Study, page: design.Page, answer: Answer | None) -> int | str:
    """Return 1 if a person predicted the student's answer, 0 if not, "" = no answer."""
    if answer is None or "p" not in answer.fields:
        return ""
    question = study.questions[page.question]
    choice = question.choices[answer.fields["p"] - 1]
    return int(choice.strip() == question.answers[page.condition].strip())


def _preferences(study: Study, people: Sequence[Person]) -> str:
    rows = []
    for person, pages, latest in people:
        for index, page in enumerate(pages):
            if page.kind == design.PREFERENCE and index in latest:
                names = [study.conditions[c] for c in (page.condition, page.other)]
                value = latest[index].fields.get("b", 0)
                preferred = ("", *names, "neither")[value]
                question = study.questions[page.question].id
                rows.append([person.id, question, *names, preferred])
    header = ("participant", "question", "first", "second", "preferred")
    return _csv(header, rows)


def _demographics(study: Study, people: Sequence[Person]) -> str:
    fields = study.texts["demographics"]["fields"]
    rows = []
    for person, pages, latest in people:
        answer = latest.get(len(pages) - 1)
        values = answer.fields if answer else {}
        places = [values.get(f"d{index}", 0) for index in range(len(fields))]
        texts = [
            field["options"][place - 1] if place else ""
            for field, place in zip(fields, places, strict=True)
        ]
        rows.append([person.id, *texts])
    return _csv(["participant", *(field["name"] for field in fields)], rows)


def _time(seconds: float | None) -> str:
    """Return a time in UTC, to the minute; "" for None."""
    if seconds is None:
        return ""
    moment = datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%MZ")


def _csv(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
