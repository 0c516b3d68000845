"""Explanations of finished runs or files, and the questions that are rated."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.data.text import normalize_text
from kdjax.runtime import untrusted
from kdjax.survey.config import StudyConfig

REFERENCE = "reference"  # the condition of rationales by a person or a teacher
STRATA = {"right": ("right",), "wrong": ("wrong",), "both": ("right", "wrong")}
_MAX_BYTES = 2**28  # of a file of explanations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """One student's answer to a question, with its rationale."""

    id: str  # of the question
    question: str
    choices: tuple[str, ...]
    answer: str
    right: bool
    rationale: str
    gold: str = ""  # the right answer, where it is known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question with what each condition shows of it."""

    id: str
    question: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]  # one per condition
    right: tuple[bool, ...]  # one per condition
    rationales: tuple[str, ...]  # one per condition; "" = none is given


Students = Mapping[str, Mapping[str, Explanation]]  # name -> question's id -> its own


def read(config: StudyConfig) -> tuple[dict[str, dict[str, Explanation]], dict]:
    """Read what the students of a study have written.

    Returns:
      Explanations by student and id, and the sha256 of each file that was read.

    Raises:
      ValueError: a run that is not finished, a row that is not valid, a student that
        is not there.
    """
    if config.comparison:
        students, hashes = _read_comparison(config)
    else:
        students, hashes = _read_files(config.files)
    if config.students:
        if missing := [name for name in config.students if not students.get(name)]:
            known = [name for name in students if students[name]]
            raise ValueError(
                f"students={missing}: none that explain: use some of {known}"
            )
        students = {name: students[name] for name in config.students}
    students = {name: rows for name, rows in students.items() if rows}
    if not students:
        raise ValueError("no student explains its answers: nothing can be rated")
    if config.reference:
        students[REFERENCE] = _read_reference(config.reference, students, hashes)
    return students, hashes


def _read_comparison(
    config: StudyConfig,
) -> tuple[dict[str, dict[str, Explanation]], dict[str, str]]:
    folder = pathlib.Path(config.comparison)
    listing = folder / "runs.jsonl"
    if not listing.is_file():
        raise ValueError(
            f"comparison={config.comparison!r} has no runs.jsonl: name the --workdir "
            "of a finished kdjax.compare"
        )
    runs = [json.loads(line) for line in listing.read_text().splitlines()]
    seeds = sorted({int(run["seed"]) for run in runs})
    seed = seeds[0] if config.run_seed < 0 else config.run_seed
    if seed not in seeds:
        raise ValueError(f"run_seed={seed}: the comparison has {seeds}")
    students: dict[str, dict[str, Explanation]] = {}
    hashes = {}
    for run in runs:
        if int(run["seed"]) != seed:
            continue
        levels = {k: v for k, v in run.items() if k not in ("index", "run", "seed")}
        name = "-".join(levels.values())
        if config.students and name not in config.students:
            students[name] = {}
            continue
        students[name] = _read_run(folder / run["run"])
        file = folder / run["run"] / "generations.jsonl"
        hashes[f"{run['run']}/{file.name}"] = _hash(file)
    return students, hashes


def _read_run(folder: pathlib.Path) -> dict[str, Explanation]:
    """Read the explanations of a run; none if its method does not explain."""
    from kdjax import config as config_lib
    from kdjax.data import sources
    from kdjax.evaluation import faithfulness

    rows = faithfulness.read_generations(folder)
    config = config_lib.from_json((folder / "config.json").read_text())
    examples = sources.load_examples(config.data, "eval", seed=config.data.kinship.seed)
    return {
        record.id: Explanation(
            id=record.id,
            question=record.question,
            choices=tuple(record.choices),
            answer=record.answer,
            right=normalize_text(record.answer) == normalize_text(record.gold),
            rationale=record.rationale,
            gold=record.gold,
        )
        for record in faithfulness.make_records(rows, examples)
    }


def _read_files(
    names: Sequence[str],
) -> tuple[dict[str, dict[str, Explanation]], dict[str, str]]:
    students: dict[str, dict[str, Explanation]] = {}
    hashes = {}
    for name in names:
        hashes[pathlib.Path(name).name] = _hash(name)
        for where, row in _rows(name):
            explanation = _explanation(row, where)
            of_student = students.setdefault(_text(row, "student", where), {})
            if explanation.id in of_student:
                raise ValueError(
                    f"{where}: id={untrusted.quote(explanation.id)} comes twice of a "
                    "student: give each question once"
                )
            of_student[explanation.id] = explanation
    return students, hashes


def _rows(name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the rows of a jsonl file, each with its place."""
    data = untrusted.read_bytes(name, max_bytes=_MAX_BYTES)
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            where = f"{name}:{number}"
            row = untrusted.parse_json(line, where)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row is an object with fields")
            yield where, row


def _explanation(row: dict[str, Any], where: str) -> Explanation:
    choices = row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"{where}: choices is a list of texts")
    answer = _text(row, "answer", where)
    gold = row.get("gold", "")
    if not isinstance(gold, str):
        raise ValueError(f"{where}: gold is a text, the right answer")
    right = row.get("right", normalize_text(answer) == normalize_text(gold))
    if not isinstance(right, bool) or ("right" not in row and not gold):
        raise ValueError(
            f"{where}: whether the answer is right is not known: add gold, the right "
            "answer, or right, true or false"
        )
    return Explanation(
        id=_text(row, "id", where),
        question=_text(row, "question", where),
        choices=tuple(choices),
        answer=answer,
        right=right,
        rationale=_text(row, "rationale", where, empty=True),
        gold=gold,
    )


def _text(row: dict[str, Any], name: str, where: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and name == "id":
        value = str(value)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{where}: {name} is missing or no text: every row has it")
    return value


def _read_reference(
    name: str, students: Students, hashes: dict[str, str]
) -> dict[str, Explanation]:
    """Read rationales of the right answers, by a person or a teacher."""
    first = next(iter(students.values()))
    hashes[pathlib.Path(name).name] = _hash(name)
    explanations = {}
    for where, row in _rows(name):
        of_student = first.get(_text(row, "id", where))
        if of_student is not None and of_student.gold:
            explanations[of_student.id] = dataclasses.replace(
                of_student,
                answer=of_student.gold,
                right=True,
                rationale=_text(row, "text", where),
            )
    return explanations


def select(
    config: StudyConfig, students: Students, *, num_questions: int, num_conditions: int
) -> tuple[list[Question], list[Question]]:
    """Draw the questions that are rated, and those for practice.

    All conditions are of the same questions. Controls show the first student's answer.
    With answers="both" questions that all students answer right and such that all
    answer wrong come in turn, `num_conditions` of each.

    Returns:
      Rated questions, in sets of `num_conditions`, and practice ones.

    Raises:
      ValueError: there are too few; how many there are is said.
    """
    names = [name for name in students if name != REFERENCE]
    pools = _pools(config, students, names)
    strata = STRATA.get(config.answers, ("any",))
    for pool in pools.values():
        order = np.random.default_rng([config.seed, 100]).permutation(len(pool))
        pool[:] = [pool[i] for i in order]
    share = num_questions // len(strata)
    for stratum in strata:
        if len(pools[stratum]) < share:
            counts = {name: len(pool) for name, pool in pools.items()}
            raise ValueError(
                f"answers={config.answers!r} needs {share} questions that all "
                f"{len(names)} students explain{_KINDS[stratum]}, and there are "
                f"{len(pools[stratum])} ({counts}): fewer participants or items, more "
                "ratings_per_item, more generations, fewer students, or answers='any'"
            )
    queues = [iter(pools[stratum][:share]) for stratum in strata]
    ids: list[str] = []
    while len(ids) < num_questions:
        queue = queues[len(ids) // num_conditions % len(queues)]
        ids += [next(queue) for _ in range(num_conditions)]
    spare = [key for key in pools["any"] if key not in set(ids)]
    if len(spare) < config.practice_items:
        raise ValueError(
            f"practice_items={config.practice_items}: {len(spare)} questions are left "
            "for practice: use fewer, or fewer rated ones"
        )
    return (
        [_question(config, students, key) for key in ids],
        [_question(config, students, key) for key in spare[: config.practice_items]],
    )


_KINDS = {"right": " and answer right", "wrong": " and answer wrong", "any": ""}


def _pools(
    config: StudyConfig, students: Students, names: Sequence[str]
) -> dict[str, list[str]]:
    """Return the ids of questions that may be rated, by how they are answered."""
    pools: dict[str, list[str]] = {"right": [], "wrong": [], "any": []}
    seen = set()
    for key, explanation in students[names[0]].items():
        rows = [rows.get(key) for rows in students.values()]
        if any(
            row is None
            or not row.rationale.strip()
            or len(row.rationale.split()) > config.max_words
            for row in rows
        ):
            continue
        text = normalize_text(explanation.question)
        if text in seen:
            continue  # a person would see it twice
        seen.add(text)
        right = {students[name][key].right for name in names}
        pools["any"].append(key)
        if len(right) == 1:
            pools["right" if right.pop() else "wrong"].append(key)
    return pools


def _question(config: StudyConfig, students: Students, key: str) -> Question:
    rows = [of_student[key] for of_student in students.values()]
    shown = [(row.answer, row.right, row.rationale) for row in rows]
    shown += [(rows[0].answer, rows[0].right, "") for _ in config.controls]
    answers, right, rationales = zip(*shown, strict=True)
    return Question(
        id=key,
        question=rows[0].question,
        choices=rows[0].choices,
        answers=answers,
        right=right,
        rationales=rationales,
    )


def _hash(file: str | pathlib.Path) -> str:
    data = untrusted.read_bytes(file, max_bytes=_MAX_BYTES)
    return hashlib.sha256(data).hexdigest()
