"""Models' texts as pages show them: bounded, without control characters."""

import re
from typing import Any

from kdjax.survey import design
from kdjax.survey.plan import Study

MAX_SHOWN = 4000  # characters of a text
_MAX_CHOICES = 26
# All but tab and line feed that steers a terminal or cannot be written as UTF-8.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def item(study: Study, page: design.Page) -> dict[str, Any]:
    """Return the texts of a page's question, bounded and without control codes."""
    if page.question < 0:
        return {}
    questions = study.questions
    condition = page.condition
    if page.kind == design.PRACTICE:
        questions, condition = study.practice, 0
    question = questions[page.question]

    def explanation(place: int) -> tuple[str, bool]:
        text = question.rationales[place]
        return shown_text(text), len(text) > MAX_SHOWN

    return {
        "question": shown_text(question.question),
        "choices": [shown_text(c, 300) for c in question.choices[:_MAX_CHOICES]],
        "answer": shown_text(question.answers[condition], 300),
        "explanation": explanation(condition),
        "other": explanation(page.other) if page.other >= 0 else ("", False),
        "other_answer": shown_text(question.answers[page.other], 300),
    }


def shown_text(text: str, longest: int = MAX_SHOWN) -> str:
    """Return the beginning of a model's text, without control characters."""
    cut = text[:longest] + ("…" if len(text) > longest else "")
    return _CONTROL.sub("\ufffd", cut)
