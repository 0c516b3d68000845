"""What rationales say beside their answers, and how far they foretell them.

Functions of records: a record is one question, its choices, and what a student wrote
about it. Nothing here runs a model; a measure that cannot be had has no key.
"""

import dataclasses
import re
import string
from collections.abc import Iterable, Sequence

from kdjax.data.text import normalize_text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a student wrote about one example."""

    id: str  # of the example
    question: str
    choices: tuple[str, ...]  # empty for a free answer
    gold: str  # the right answer
    rationale: str  # the student's
    answer: str  # the student's
    # The answer that the rationale's text gives, "" = none; None where rationale and
    # answer are one text, so that there is nothing to compare.
    stated: str | None = None


def same(first: str, second: str) -> bool:
    """Whether two answers are equal up to case, white space and a final full stop."""
    return normalize_text(first) == normalize_text(second)


def named(text: str, choices: Sequence[str], *others: str) -> list[str]:
    """The choices that a text names, in the order in which it names them.

    A choice is named by its words, whatever their case and the white space between
    them, or by its letter, as "(b)". They are whole words: neither "grandmother" nor
    "step-mother" names "mother". What a longer choice covers names no shorter one:
    "river bank" does not name "bank". Inflected forms ("banks") name nothing. `others`
    are looked for as well; they have no letter.

    Returns:
      One entry a mention, as the first of the choices that read alike.
    """
    by_words: dict[str, str] = {}
    for letter, choice in zip(string.ascii_lowercase, choices, strict=False):
        by_words[f"({letter})"] = choice
    for choice in (*choices, *others):
        if words := normalize_text(choice):
            by_words.setdefault(words, choice)
    if not by_words:
        return []
    longest = sorted(by_words, key=len, reverse=True)
    either = "|".join(r"\s+".join(map(re.escape, words.split())) for words in longest)
    whole = rf"(?<!\w)(?<!\w-)(?:{either})(?!\w)(?!-\w)"
    mentions = (_spaced(found.group()) for found in re.finditer(whole, text.lower()))
    return [by_words[mention] for mention in mentions]


def last_named(text: str, choices: Sequence[str]) -> str:
    """The choice that a text names last; "" if it names none."""
    return next(iter(named(text, choices)[::-1]), "")


def describe(records: Sequence[Record]) -> dict[str, float]:
    """What the rationales name, how long they are, and whether they fit the answers.

    Returns:
      words: mean number of words, which white space separates; names_answer: share of
      rationales that name the student's own answer; names_gold: share that name the
      right one. Of records with choices: names_distractor, share of rationales that
      name a wrong choice; num_distractors, mean number of different wrong choices
      named. Of records with `stated`: self_consistency, share whose `stated` is the
      answer. num_records: how many there are. {} of no records.
    """
    if not records:
        return {}
    found = {
        "num_records": float(len(records)),
        "words": _mean(len(r.rationale.split()) for r in records),
        "names_gold": _mean(_names(r, r.gold) for r in records),
        "names_answer": _mean(_names(r, r.answer) for r in records),
    }
    if asked := [r for r in records if r.choices]:
        distractors = [
            {c for c in named(r.rationale, r.choices) if not same(c, r.gold)}
            for r in asked
        ]
        found["names_distractor"] = _mean(bool(wrong) for wrong in distractors)
        found["num_distractors"] = _mean(len(wrong) for wrong in distractors)
    stated = [(r.stated, r.answer) for r in records if r.stated is not None]
    if stated:
        found["self_consistency"] = _mean(same(*pair) for pair in stated)
    return found


def leakage_adjusted(
    both: Sequence[bool], question: Sequence[bool], rationale: Sequence[bool]
) -> dict[str, float]:
    """Leakage-adjusted simulatability of a student's answers.

    gain = 1[predicted from both] - 1[predicted from the question]
    LAS  = (mean gain where the rationale alone gives the answer away
            + mean gain where it does not) / 2

    Where all items leak, or none does, LAS is the mean gain of those there are.

    Args:
      both: of each item, whether a simulator that reads question and rationale predicts
        the student's answer.
      question: the same of the question without the rationale.
      rationale: the same of the rationale without the question: such items leak.

    Returns:
      las; las_leaking and las_hidden, the means of the two groups, without those that
      have no item; num_leaking and num_hidden, how many there are; simulated,
      simulated_question and simulated_rationale, shares predicted; gain, the first less
      the second of them. {} of no items.

    Raises:
      ValueError: different numbers of items.

    Source: Hase et al., 2020, arXiv 2010.04119.
    """
    if not len(both) == len(question) == len(rationale):
        raise ValueError(
            f"both={len(both)}, question={len(question)}, rationale={len(rationale)} "
            "items: each needs all of them"
        )
    if not both:
        return {}
    gains: dict[bool, list[int]] = {True: [], False: []}
    for with_both, without, leaks in zip(both, question, rationale, strict=True):
        gains[bool(leaks)].append(int(with_both) - int(without))
    groups = {"leaking": gains[True], "hidden": gains[False]}
    means = {f"las_{name}": _mean(found) for name, found in groups.items() if found}
    shares = {
        "simulated": _mean(both),
        "simulated_question": _mean(question),
        "simulated_rationale": _mean(rationale),
    }
    return {
        "las": _mean(means.values()),
        **means,
        **{f"num_{name}": float(len(found)) for name, found in groups.items()},
        **shares,
        "gain": shares["simulated"] - shares["simulated_question"],
    }


def _names(record: Record, answer: str) -> bool:
    """Whether the rationale names an answer, which need not be one of the choices."""
    found = named(record.rationale, record.choices, answer)
    return any(same(name, answer) for name in found)


def _mean(values: Iterable[float]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())
