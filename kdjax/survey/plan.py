"""The plan of a study: design.json, frozen, and its preregistration sheet."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jinja2

import kdjax
from kdjax.runtime import files, locks
from kdjax.runtime.console import print_table
from kdjax.survey import design, items, power, texts
from kdjax.survey.config import StudyConfig, validate

DESIGN, SHEET, POWER = "design.json", "preregistration.html", "power.svg"
_FORMAT = 1
_PAGES = pathlib.Path(__file__).parent / "pages"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A planned study, as design.json has it."""

    config: StudyConfig
    conditions: tuple[str, ...]
    questions: tuple[items.Question, ...]
    practice: tuple[items.Question, ...]  # what their first condition shows
    texts: dict[str, Any]
    inputs: dict[str, str]  # sha256 of each file that was read
    consent_hash: str  # sha256 of the consent's text
    hash: str  # sha256 of all of the above

    @property
    def layout(self) -> design.Layout:
        """Return the numbers of the design."""
        return layout(self.config, len(self.conditions))


def run(config: StudyConfig, workdir: pathlib.Path, *, power: bool = False) -> Study:
    """Write the design of a study and its sheet; a frozen one must be the same.

    Args:
      config: a valid one.
      workdir: of the study.
      power: also simulate the detectable difference.

    Raises:
      ValueError: no such design, or the directory has another one.
    """
    study = make(config)
    with locks.hold(workdir):
        _freeze(study, workdir / DESIGN)
        curve = _power(study, workdir) if power else None
        sheet = render("preregistration.html.jinja", study=study, curve=curve)
        files.write_atomically(workdir / SHEET, sheet)
    each = study.layout
    rows: list[dict[str, Any]] = [
        {"": "conditions", "value": ", ".join(study.conditions)},
        {"": "questions", "value": len(study.questions)},
        {"": "people", "value": each.participants},
        {"": "rated items per person", "value": each.items_per_participant},
        {"": "people per item", "value": each.ratings_per_item},
        {"": "pages per person", "value": len(design.pages(each, 0))},
        {"": "sha256", "value": study.hash},
    ]
    if curve is not None:
        rows.append({"": f"power {config.power:g} from", "value": curve.sentence})
    print_table(str(workdir / DESIGN), rows)
    print(workdir / SHEET)
    return study


def layout(config: StudyConfig, num_conditions: int) -> design.Layout:
    """Return the numbers of a study's design."""
    return design.Layout(
        seed=config.seed,
        num_conditions=num_conditions,
        participants=config.participants,
        items_per_participant=config.items_per_participant,
        ratings_per_item=config.ratings_per_item,
        num_strata=2 if config.answers == "both" else 1,
        exact_carry_over=config.carry_over == "exact",
        instructed_checks=config.instructed_checks,
        known_checks=config.known_checks,
        practice_items=config.practice_items,
        preferences=config.preferences,
        simulation=config.simulation,
        demographics=config.demographics,
    )


def make(config: StudyConfig) -> Study:
    """Make the design of a study from its inputs.

    Raises:
      ValueError: too few explanations, numbers that cannot be balanced, or texts that
        do not go with the config.
    """
    validate(config)
    students, inputs = items.read(config)
    conditions = (*students, *config.controls)
    each = layout(config, len(conditions))
    design.check(each)
    free = each.num_questions - each.items_per_participant
    if config.preferences > free:
        raise ValueError(
            f"preferences={config.preferences}: {free} questions are not rated by a "
            f"person: use at most {free}"
        )
    known = config.known_checks
    words = texts.read(config, each.items_per_participant)
    if known > len(words["checks"]["known"]):
        raise ValueError(
            f"known_checks={known}: the texts have {len(words['checks']['known'])}"
        )
    if config.instructed_checks + known > each.items_per_participant:
        raise ValueError("instructed_checks and known_checks: more than rated items")
    questions, practice = items.select(
        config,
        students,
        num_questions=each.num_questions,
        num_conditions=len(conditions),
    )
    if "placebo" in config.controls:
        place = conditions.index("placebo")
        questions = [_placebo(question, place, words) for question in questions]
    if config.simulation and not all(question.choices for question in questions):
        raise ValueError(
            "simulation=True: people predict a choice: use simulation=False"
        )
    study = Study(
        config=config,
        conditions=conditions,
        questions=tuple(questions),
        practice=tuple(practice),
        texts=words,
        inputs=inputs,
        consent_hash=_digest(words["consent"]),
        hash="",
    )
    return dataclasses.replace(study, hash=_digest(_content(study)))


def read(workdir: pathlib.Path) -> Study:
    """Read the design of a planned study.

    Raises:
      ValueError: there is none, or it was changed by hand.
    """
    file = workdir / DESIGN
    if not file.is_file():
        raise ValueError(
            f"workdir={str(workdir)!r} has no {DESIGN}: plan the study first"
        )
    value = files.read_json(file, remedy="restore it, or plan in another --workdir")
    digest = value.pop("hash", "")
    if digest != _digest(value) or value["format"] != _FORMAT:
        raise ValueError(
            f"{file} was changed after it was frozen: restore it, or plan the study in "
            "another --workdir"
        )
    config = StudyConfig(**{k: _tuple(v) for k, v in value["config"].items()})
    lists = (
        tuple(
            items.Question(**{k: _tuple(v) for k, v in question.items()})
            for question in value[name]
        )
        for name in ("questions", "practice")
    )
    questions, practice = lists
    return Study(
        config=config,
        conditions=tuple(value["conditions"]),
        questions=questions,
        practice=practice,
        texts=value["texts"],
        inputs=value["inputs"],
        consent_hash=value["consent_hash"],
        hash=digest,
    )


def render(page: str, **values: Any) -> str:
    """Fill in a page's template; all values are escaped."""
    return _environment().get_template(page).render(version=kdjax.__version__, **values)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _placebo(
    question: items.Question, place: int, words: dict[str, Any]
) -> items.Question:
    rationales = list(question.rationales)
    text = words["controls"]["placebo"]
    rationales[place] = text.replace("{answer}", question.answers[place])
    return dataclasses.replace(question, rationales=tuple(rationales))


def _freeze(study: Study, file: pathlib.Path) -> None:
    """Write design.json, unless it is there."""
    if not file.exists():
        files.write_json(file, _content(study) | {"hash": study.hash})
        return
    frozen = read(file.parent)
    if frozen.hash == study.hash:
        return
    old, new = (json.loads(json.dumps(_content(each))) for each in (frozen, study))
    names = [name for name in new if old[name] != new[name]]
    fields = [k for k, v in new["config"].items() if old["config"].get(k) != v]
    raise ValueError(
        f"{file} is frozen, and this plan differs in {', '.join(names)}"
        f"{f' ({fields})' if fields else ''}: use another --workdir, or remove it if "
        "nobody has seen the study"
    )


def _content(study: Study) -> dict[str, Any]:
    value = dataclasses.asdict(study)
    value.pop("hash")
    return {"format": _FORMAT} | value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _power(study: Study, workdir: pathlib.Path) -> power.Curve:
    curve = power.simulate(study.config, study.layout)
    namespace = '<svg xmlns="http://www.w3.org/2000/svg"'
    files.write_atomically(workdir / POWER, curve.svg.replace("<svg", namespace, 1))
    return curve
