"""Exact matches between generated and target texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.data import templates
from kdjax.data.example import Example
from kdjax.data.templates import Text
from kdjax.data.text import normalize_text

MATCHES = (
    "exact_match",
    "exact_match_strict",
    "answer_match",
    "answer_match_strict",
)


def compare(generated: str, example: Example, view: str, text: Text) -> dict[str, Any]:
    """Compare a generated text with its target.

    Returns:
      prompt, target, generated. For the label view exact_match, equality of the last
      two under `normalize_text`, and exact_match_strict, up to white space at their
      ends. For a view that explains, then answers, answer (what is generated after the
      last "Answer:", all of it without one), answer_match and answer_match_strict: the
      same of the answers alone. Any of an example's `other_answers` will do as well.
      A rationale has no match: many are good.
    """
    row: dict[str, Any] = {"prompt": text.prompt, "target": text.target}
    row["generated"] = generated.strip()
    if view == "label":
        row |= _matches("exact_match", generated, text.target, example)
    if view in templates.EXPLAINED:
        row["answer"] = templates.final_answer(generated)
        row |= _matches("answer_match", row["answer"], example.answer, example)
    return row


def _matches(name: str, text: str, target: str, example: Example) -> dict[str, bool]:
    targets = (target, *example.other_answers)
    return {
        name: normalize_text(text) in map(normalize_text, targets),
        f"{name}_strict": text.strip() in [answer.strip() for answer in targets],
    }


def match_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the share of matching generations per view: exact_match/<view>, ..."""
    matches: dict[str, list[bool]] = {}
    for row in rows:
        for name in MATCHES:
            if name in row:
                matches.setdefault(f"{name}/{row['view']}", []).append(row[name])
    return {name: float(np.mean(values)) for name, values in matches.items()}
