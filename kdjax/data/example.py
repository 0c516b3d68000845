"""The Example type: a question with answer and rationales, a text, or a chat."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdjax.data.letters import bracketed, letter_index


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question with its answer and explanations, a plain text, or a chat."""

    id: str  # unique within a split
    question: str = ""
    choices: tuple[str, ...] = ()  # empty for a free answer
    answer: str = ""  # text of the right choice, or the final answer
    rationale: str = ""  # leads to the answer
    # One per choice other than the answer, in their order; "" where there is none.
    counterfactuals: tuple[str, ...] = ()
    text: str = ""  # plain text, instead of the above
    # Turns of a chat, instead of the above, as `apply_chat_template` takes them: role,
    # content, perhaps tool_calls, name, tool_call_id, reasoning_content.
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas that the chat may call
    # Answers that are as right as `answer`, in comparisons of generations.
    other_answers: tuple[str, ...] = ()
    gold: str = ""  # the data's own answer, where `answer` is a teacher's
    weight: float = 1.0  # of its tokens in the loss
    # File and row that it was read from, "rows.jsonl:3", for errors; "" = none.
    origin: str = dataclasses.field(default="", compare=False, repr=False)

    @property
    def name(self) -> str:
        """Its id, and where it was read, for errors."""
        return f"{self.id!r} ({self.origin})" if self.origin else repr(self.id)


def wrong_choices(example: Example) -> tuple[str, ...]:
    """Return the choices that `counterfactuals` belong to, in their order.

    These are all choices where there is no answer.
    """
    if not example.answer:
        return example.choices
    at = example.choices.index(example.answer)
    return (*example.choices[:at], *example.choices[at + 1 :])


def contradicts(example: Example) -> bool:
    """Return True if the rationale's last letter, like "(b)", is a wrong choice's."""
    letters = bracketed(example.rationale, len(example.choices))
    if not letters or not example.choices:
        return False
    index = letter_index(letters[-1]) or 0
    return index >= len(example.choices) or example.choices[index] != example.answer
