"""The words of the views: how an example reads as a prompt and a target."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kdjax.config import DataConfig
from kdjax.data.example import Example, wrong_choices

ANSWER, EXPLAIN, BOTH = "Answer:", "Explain:", "Explain and answer:"
OTHERWISE = "Explain and answer otherwise:"
CHOICES = "Choices:"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# Views whose target is a rationale, "Answer:" and the answer.
EXPLAINED = ("rationale_then_label", "factual")


class Text(NamedTuple):
    """One view of one example."""

    prompt: str
    target: str  # what is learnt
    prefix: str = ""  # read between the two, not learnt


def words() -> list[str]:
    """Every word that a template adds, for word-level vocabularies; but `OTHERWISE`."""
    letters = [f"({letter})" for letter in LETTERS]
    return [*f"{ANSWER} {EXPLAIN} {BOTH} {CHOICES}".split(), *letters]


def render(example: Example, view: str, config: DataConfig) -> list[Text]:
    """The texts of a view: one, but a counterfactual for each wrong choice.

    view                  prompt ends with                 target
    label                 "Answer:"                        the answer
    rationale             "Explain:"                       the rationale
    rationale_then_label  "Explain and answer:"            rationale, "Answer:", answer
    factual               "Explain and answer:"            rationale, "Answer:", answer
    counterfactual        "Explain and answer otherwise:"  the wrong choice
    text                  (no prompt)                      the text

    What leads to the wrong choice is read, not learnt: its rationale and "Answer:" as
    the prefix, or the rationale in the prompt, before the cue
    (`config.counterfactual_place`). A wrong choice without a rationale is left out.

    Args:
      example: what is rendered.
      view: one of the above.
      config: its `prefixes` begin the prompts; `prompt_suffix=False` leaves out
        their last line.

    Raises:
      ValueError: an unknown view, or an example without what the view needs.
    """
    if view not in _VIEWS:
        raise ValueError(f"view={view!r}: use one of {tuple(_VIEWS)}")
    cue, _, target = _VIEWS[view]
    if part := lacking(example, view):
        raise ValueError(
            f"example {example.id!r} has no {part}, which view {view!r} needs: give "
            f"the data one{_WHERE.get(part, '')}, or use a method without that view"
        )
    if view == "counterfactual":
        return list(_counterfactuals(example, config))
    if not cue:
        return [Text("", target(example))]
    return [Text(ask(example, view, config), target(example))]


def lacking(example: Example, view: str) -> str:
    """What a view needs and the example has not, as its field; "" where it has all."""
    needs = _VIEWS[view].needs
    return next((part for part in needs if not any(getattr(example, part))), "")


def ask(example: Example, view: str, config: DataConfig, given: str = "") -> str:
    """The question, its lettered choices if any, what is given, and the view's cue."""
    before = getattr(config.prefixes, view)
    lines = [f"{before} {example.question}" if before else example.question]
    if example.choices:
        lettered = zip(LETTERS, example.choices, strict=False)
        lines.append(" ".join([CHOICES, *(f"({a}) {text}" for a, text in lettered)]))
    cue = _VIEWS[view].cue if config.prompt_suffix else ""
    return "\n".join([*lines, *filter(None, (given, cue))])


def _counterfactuals(example: Example, config: DataConfig) -> Iterator[Text]:
    """One text for each wrong choice that has a rationale."""
    pairs = zip(wrong_choices(example), example.counterfactuals, strict=True)
    for choice, rationale in pairs:
        if not rationale or choice == example.answer:
            continue
        if config.counterfactual_place == "prompt":
            yield Text(ask(example, "counterfactual", config, rationale), choice)
        else:
            prompt = ask(example, "counterfactual", config)
            yield Text(prompt, choice, prefix=f"{rationale}\n{ANSWER}")


def final_answer(generated: str) -> str:
    """The answer in a generated target of a view that ends with the answer."""
    return generated.rpartition(ANSWER)[2].strip()


class _View(NamedTuple):
    cue: str
    needs: tuple[str, ...]  # fields of the example
    target: Callable[[Example], str]


def _explained(example: Example) -> str:
    return f"{example.rationale}\n{ANSWER} {example.answer}"


_WHERE = {
    "rationale": " (data.rationales)",
    "counterfactuals": " (data.counterfactuals)",
}
_VIEWS = {
    "label": _View(ANSWER, ("question", "answer"), lambda e: e.answer),
    "rationale": _View(EXPLAIN, ("question", "rationale"), lambda e: e.rationale),
    **{
        v: _View(BOTH, ("question", "rationale", "answer"), _explained)
        for v in EXPLAINED
    },
    "counterfactual": _View(
        OTHERWISE, ("question", "choices", "counterfactuals"), lambda e: ""
    ),
    "text": _View("", ("text",), lambda e: e.text),
}
