"""The words of the views: how an example reads as a prompt and a target."""

from collections.abc import Callable

from kdjax.data.sources import Example

ANSWER, EXPLAIN, BOTH = "Answer:", "Explain:", "Explain and answer:"
CHOICES = "Choices:"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words() -> list[str]:
    """Every word that a template adds, for word-level vocabularies."""
    letters = [f"({letter})" for letter in LETTERS]
    return [*f"{ANSWER} {EXPLAIN} {BOTH} {CHOICES}".split(), *letters]


def render(example: Example, view: str) -> tuple[str, str]:
    """The (prompt, target) texts of an example.

    view                  prompt ends with       target
    label                 "Answer:"              the answer
    rationale             "Explain:"             the rationale
    rationale_then_label  "Explain and answer:"  the rationale, "Answer:", the answer
    text                  (no prompt)            the text

    Raises:
      ValueError: an unknown view, or an example without what the view needs.
    """
    if view not in _VIEWS:
        raise ValueError(f"view={view!r}: use one of {tuple(_VIEWS)}")
    cue, parts, target = _VIEWS[view]
    for part in parts:
        if not getattr(example, part):
            raise ValueError(
                f"example {example.id!r} has no {part}, which view {view!r} needs: "
                f"give the data one, or use a method without that view"
            )
    return (prompt(example, cue) if cue else ""), target(example)


def prompt(example: Example, cue: str) -> str:
    """The question, its lettered choices if any, and a cue, one per line."""
    lines = [example.question]
    if example.choices:
        lettered = zip(LETTERS, example.choices, strict=False)
        lines.append(" ".join([CHOICES, *(f"({a}) {text}" for a, text in lettered)]))
    return "\n".join([*lines, cue])


def final_answer(generated: str) -> str:
    """The answer in a generated target of a view that ends with the answer."""
    return generated.rpartition(ANSWER)[2].strip()


_View = tuple[str, tuple[str, ...], Callable[[Example], str]]

# view -> cue, needed fields, target
_VIEWS: dict[str, _View] = {
    "label": (ANSWER, ("question", "answer"), lambda e: e.answer),
    "rationale": (EXPLAIN, ("question", "rationale"), lambda e: e.rationale),
    "rationale_then_label": (
        BOTH,
        ("question", "rationale", "answer"),
        lambda e: f"{e.rationale}\n{ANSWER} {e.answer}",
    ),
    "text": ("", ("text",), lambda e: e.text),
}
