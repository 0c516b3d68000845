"""Explanations of made-up students, and studies of them."""

import json
import pathlib

from kdjax.survey import plan
from kdjax.survey.config import StudyConfig

STUDENTS = ("plain", "multitask", "counterfactual")


def write(folder: pathlib.Path, num: int = 80, **rationales: str) -> pathlib.Path:
    """A file of explanations: even questions are answered right, odd ones wrong."""
    rows = [
        {
            "id": f"q{index}",
            "question": f"Question {index}: which fruit is number {index}?",
            "choices": ["apple", "pear", "plum"],
            "answer": "apple" if index % 2 == 0 else "pear",
            "gold": "apple",
            "rationale": rationales.get(
                student, f"Fruit {index} is red and round, says {len(student)}."
            ),
            "student": student,
        }
        for student in STUDENTS
        for index in range(num)
    ]
    file = folder / "explanations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config(file: pathlib.Path, **fields) -> StudyConfig:
    defaults = {
        "files": (str(file),),
        "controls": ("placebo",),
        "participants": 16,
        "items_per_participant": 4,
        "contact": "study@example.org",
        "exclude_seconds": 0.0,
    }
    return StudyConfig(**(defaults | fields))


def study(workdir: pathlib.Path, **fields) -> plan.Study:
    """A planned study in `workdir`."""
    workdir.mkdir(parents=True, exist_ok=True)
    rationales = fields.pop("rationales", {})
    return plan.run(config(write(workdir, **rationales), **fields), workdir)
