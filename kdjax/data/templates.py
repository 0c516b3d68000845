"""Templates of the views: prompts and targets of an example."""

import datetime
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kdjax.config import DataConfig
from kdjax.data.example import Example, wrong_choices
from kdjax.data.letters import LETTERS, letter_choices

ANSWER, EXPLAIN, BOTH = "Answer:", "Explain:", "Explain and answer:"
OTHERWISE = "Explain and answer otherwise:"
CHOICES = "Choices:"

# Views whose target is a rationale, "Answer:" and the answer.
EXPLAINED = ("rationale_then_label", "factual")


class Text(NamedTuple):
    """One view of one example."""

    prompt: str
    target: str  # learnt
    prefix: str = ""  # read between the two, not learnt


def words() -> list[str]:
    """List the words that templates add to examples, without those of `OTHERWISE`."""
    letters = [f"({letter})" for letter in LETTERS]
    return [*f"{ANSWER} {EXPLAIN} {BOTH} {CHOICES}".split(), *letters]


def render(example: Example, view: str, config: DataConfig) -> list[Text]:
    """Render a view: one text, but for `counterfactual` one per wrong choice.

    view                  prompt ends with                 target
    label                 "Answer:"                        the answer
    rationale             "Explain:"                       the rationale
    rationale_then_label  "Explain and answer:"            rationale, "Answer:", answer
    factual               "Explain and answer:"            rationale, "Answer:", answer
    counterfactual        "Explain and answer otherwise:"  the wrong choice
    text                  (no prompt)                      the text
    chat                  (none: `kdjax.data.chat` renders the messages)

    The rationale of a wrong choice is read, not learnt: with "Answer:" it is the
    prefix, or it stands in the prompt, before the suffix
    (`config.counterfactual_place`). A wrong choice without a rationale is left out.

    Args:
      example: to render.
      view: one of the above.
      config: its `prefixes` begin the prompts; `prompt_suffix=False` leaves out
        their last line.

    Raises:
      ValueError: an unknown view, or an example without what the view needs.
    """
    if view not in _VIEWS:
        raise ValueError(f"view={view!r}: use one of {tuple(_VIEWS)}")
    suffix, _, target = _VIEWS[view]
    if part := missing_field(example, view):
        raise ValueError(
            f"example {example.name} has no {part}, which view {view!r} needs: give "
            f"the data one{_WHERE.get(part, '')}, or use a method without that view"
        )
    if view == "chat":
        return []
    if view == "counterfactual":
        return list(_render_counterfactuals(example, config))
    if not suffix:
        return [Text("", target(example))]
    return [Text(make_prompt(example, view, config), target(example))]


def missing_field(example: Example, view: str) -> str:
    """Return the first field that a view needs and the example lacks, or ""."""
    needs = _VIEWS[view].needs
    return next((name for name in needs if not any(getattr(example, name))), "")


def make_prompt(
    example: Example, view: str, config: DataConfig, rationale: str = ""
) -> str:
    """Join the question, its lettered choices, a rationale and the view's suffix."""
    before = getattr(config.prefixes, view)
    lines = [f"{before} {example.question}" if before else example.question]
    if example.choices:
        lines.append(f"{CHOICES} {letter_choices(example.choices)}")
    suffix = _VIEWS[view].suffix if config.prompt_suffix else ""
    return "\n".join([*lines, *filter(None, (rationale, suffix))])


def _render_counterfactuals(example: Example, config: DataConfig) -> Iterator[Text]:
    """Yield one text for each wrong choice that has a rationale."""
    pairs = zip(wrong_choices(example), example.counterfactuals, strict=True)
    for choice, rationale in pairs:
        if not rationale or choice == example.answer:
            continue
        if config.counterfactual_place == "prompt":
            yield Text(
                make_prompt(example, "counterfactual", config, rationale), choice
            )
        else:
            prompt = make_prompt(example, "counterfactual", config)
            yield Text(prompt, choice, prefix=f"{rationale}\n{ANSWER}")


def variables(config: DataConfig) -> dict[str, Any]:
    """Parse `data.template_kwargs`: "name=value", with a value in JSON or a word.

    Raises:
      ValueError: one that has no name.
    """
    values: dict[str, Any] = {}
    for item in config.template_kwargs:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(
                f"data.template_kwargs={config.template_kwargs}: {item!r} is not "
                "name=value: use for example ('enable_thinking=false',)"
            )
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = {"True": True, "False": False}.get(text, text)
    return values


def check_variables(config: DataConfig) -> None:
    """Check `template_kwargs` and `template_date`.

    Raises:
      ValueError: naming the field.
    """
    variables(config)
    try:
        datetime.date.fromisoformat(config.template_date)
    except ValueError:
        raise ValueError(
            f"data.template_date={config.template_date!r} is no date: use for example "
            "'2024-07-26'"
        ) from None


def final_answer(generated: str) -> str:
    """Extract the answer of a generated target that ends with it."""
    return generated.rpartition(ANSWER)[2].strip()


class _View(NamedTuple):
    """Prompt suffix, needed fields and target of a view."""

    suffix: str
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
    # Its tokens are made of the messages: `kdjax.data.chat`.
    "chat": _View("", ("messages",), lambda e: ""),
}
