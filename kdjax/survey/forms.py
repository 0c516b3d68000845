"""Forms of a survey's pages: their fields, and what is valid in them."""

import dataclasses
from collections.abc import Mapping, Sequence

from kdjax.survey import answers, content, design
from kdjax.survey.plan import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """A question with options; its value is the place of one, from 1."""

    name: str
    label: str
    options: tuple[str, ...]
    needed: bool = True
    expected: int = 0  # of an attention check; 0 = any


def fields(study: Study, page: design.Page) -> list[Field]:
    """Return the fields of a page, in the order in which they are shown."""
    config, texts = study.config, study.texts
    if page.kind in (design.RATING, design.PRACTICE):
        scale = tuple(texts["scale"][str(config.points)])
        result = [
            Field(name=f"s{index}", label=texts["statements"][name], options=scale)
            for index, name in enumerate(config.constructs)
        ]
        if page.check >= 0:
            # The second label and the last but one in turn: neither end nor middle.
            expected = 2 if page.check % 2 else config.points - 1
            label = texts["checks"]["instructed"].replace(
                "{option}", scale[expected - 1]
            )
            check = Field(name="c", label=label, options=scale, expected=expected)
            result.insert((len(result) + 1) // 2, check)
        return result
    if page.kind == design.KNOWN:
        known = texts["checks"]["known"][page.check]
        choices = tuple(known["choices"])
        expected = choices.index(known["answer"]) + 1
        return [
            Field(name="c", label=known["question"], options=choices, expected=expected)
        ]
    if page.kind == design.SIMULATION:
        label = texts["simulation"]["text"]
        choices = study.questions[page.question].choices
        options = tuple(content.shown_text(choice, 300) for choice in choices)
        return [Field(name="p", label=label, options=options)]
    if page.kind == design.PREFERENCE:
        words = texts["preference"]
        options = (words["first"], words["second"], words["neither"])
        return [Field(name="b", label=words["text"], options=options)]
    if page.kind == design.DEMOGRAPHICS:
        return [
            Field(
                name=f"d{index}",
                label=field["label"],
                options=tuple(field["options"]),
                needed=False,
            )
            for index, field in enumerate(texts["demographics"]["fields"])
        ]
    return []


def parse(page_fields: Sequence[Field], form: Mapping[str, str]) -> dict[str, int]:
    """Return the values of a form.

    Raises:
      ValueError: a value that no page offers.
    """
    values = {}
    for field in page_fields:
        text = form.get(field.name, "")
        if not text:
            continue
        options = {str(place) for place in range(1, len(field.options) + 1)}
        if text not in options:
            raise ValueError(f"{field.name}: no such option")
        values[field.name] = int(text)
    if unknown := set(form) - {field.name for field in page_fields}:
        raise ValueError(f"{sorted(unknown)[0][:40]!r}: no such field")
    return values


def missing(page_fields: Sequence[Field], values: Mapping[str, int]) -> list[Field]:
    """Return the fields that need a value and have none."""
    return [f for f in page_fields if f.needed and f.name not in values]


def num_failed(
    study: Study, pages: Sequence[design.Page], latest: Mapping[int, answers.Answer]
) -> int:
    """Return how many attention checks a person has answered wrong."""
    failed = 0
    for index, page in enumerate(pages):
        if page.check < 0 or index not in latest:
            continue
        for field in fields(study, page):
            value = latest[index].fields.get(field.name, 0)
            failed += bool(field.expected and value and value != field.expected)
    return failed


def first_open(
    pages: Sequence[design.Page], latest: Mapping[int, answers.Answer]
) -> int:
    """Return the first page without a complete answer; len(pages) if there is none."""
    for index in range(len(pages)):
        if index not in latest or not latest[index].complete:
            return index
    return len(pages)


def is_locked(
    pages: Sequence[design.Page], latest: Mapping[int, answers.Answer], index: int
) -> bool:
    """Return True for a prediction that was made: the answer was shown since."""
    is_made = index in latest and latest[index].complete
    return index < len(pages) and pages[index].kind == design.SIMULATION and is_made
