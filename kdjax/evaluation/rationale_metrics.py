"""Measures of rationales as text: mentions of choices, agreement with the answer, LAS.

All are functions of records; none runs a model. A measure without records to apply to
has no key.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from kdjax.data.letters import letter
from kdjax.data.text import normalize_text, states_answer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A student's rationale and answer to one example."""

    id: str  # of the example
    question: str
    choices: tuple[str, ...]  # empty for a free answer
    gold: str  # the right answer
    rationale: str  # the student's
    answer: str  # the student's
    # The answer that the rationale's text gives, "" = none; None where rationale and
    # answer are one text, so that there is nothing to compare.
    stated: str | None = None


def answers_match(first: str, second: str) -> bool:
    """Return True for answers equal up to case, white space and a final full stop."""
    return normalize_text(first) == normalize_text(second)


def find_mentions(text: str, choices: Sequence[str], *others: str) -> list[str]:
    """Return the choices that a text names, in the order of their mentions.

    A choice is named by its words, whatever their case and the white space between
    them, or by its letter, as "(b)". They are whole words: neither "grandmother" nor
    "step-mother" names "mother". What a longer choice covers names no shorter one:
    "river bank" does not name "bank". Inflected forms ("banks") name nothing. `others`
    are found as well; they have no letter.

    Returns:
      One entry per mention; of choices that read alike, the first one.
    """
    by_words: dict[str, str] = {}
    for index, choice in enumerate(choices):
        by_words[f"({letter(index)})"] = choice
    for choice in (*choices, *others):
        if words := normalize_text(choice):
            by_words.setdefault(words, choice)
    if not by_words:
        return []
    longest = sorted(by_words, key=len, reverse=True)
    names = "|".join(r"\s+".join(map(re.escape, words.split())) for words in longest)
    pattern = rf"(?<!\w)(?<!\w-)(?:{names})(?!\w)(?!-\w)"
    mentions = re.findall(pattern, text.lower())
    return [by_words[" ".join(mention.split())] for mention in mentions]


def last_mention(text: str, choices: Sequence[str]) -> str:
    """Return the choice that a text names last; "" if it names none."""
    return next(iter(find_mentions(text, choices)[::-1]), "")


def describe_rationales(records: Sequence[Record]) -> dict[str, float]:
    """Compute length, mentions and self-consistency of rationales.

    Returns:
      words: mean number of words, separated by white space; names_answer: share of
      rationales that name the student's own answer; names_gold: share that name the
      right one; states_answer: share that say which is the answer. Of records with
      choices: names_distractor, share of rationales that name a wrong choice;
      num_distractors, mean number of different wrong choices named. Of records with
      `stated`: self_consistency, share whose `stated` is the answer.
      num_records: how many there are. {} of no records.
    """
    if not records:
        return {}
    metrics = {
        "num_records": float(len(records)),
        "words": _mean(len(r.rationale.split()) for r in records),
        "names_gold": _mean(_mentions(r, r.gold) for r in records),
        "names_answer": _mean(_mentions(r, r.answer) for r in records),
        "states_answer": _mean(states_answer(r.rationale) for r in records),
    }
    if multiple_choice := [r for r in records if r.choices]:
        distractors = [
            {
                choice
                for choice in find_mentions(r.rationale, r.choices)
                if not answers_match(choice, r.gold)
            }
            for r in multiple_choice
        ]
        metrics["names_distractor"] = _mean(bool(wrong) for wrong in distractors)
        metrics["num_distractors"] = _mean(len(wrong) for wrong in distractors)
    stated = [(r.stated, r.answer) for r in records if r.stated is not None]
    if stated:
        metrics["self_consistency"] = _mean(answers_match(*pair) for pair in stated)
    return metrics


def leakage_adjusted_simulatability(
    both: Sequence[bool], question: Sequence[bool], rationale: Sequence[bool]
) -> dict[str, float]:
    """Compute the leakage-adjusted simulatability of a student's answers.

    gain = 1[predicted from both] - 1[predicted from the question]
    LAS  = (mean gain where the rationale alone gives the answer away
            + mean gain where it does not) / 2

    Where all items leak, or none does, LAS is the mean gain of all.

    Args:
      both: True for each item of which a simulator that reads question and rationale
        predicts the student's answer.
      question: the same of the question without the rationale.
      rationale: the same of the rationale without the question: such items leak.

    Returns:
      las; las_leaking and las_hidden, the mean gains of the two groups, no key for an
      empty one; num_leaking and num_hidden, their sizes; simulated,
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
    means = {f"las_{name}": _mean(group) for name, group in groups.items() if group}
    shares = {
        "simulated": _mean(both),
        "simulated_question": _mean(question),
        "simulated_rationale": _mean(rationale),
    }
    return {
        "las": _mean(means.values()),
        **means,
        **{f"num_{name}": float(len(group)) for name, group in groups.items()},
        **shares,
        "gain": shares["simulated"] - shares["simulated_question"],
    }


def _mentions(record: Record, answer: str) -> bool:
    """Return True if the rationale names an answer, one of the choices or not."""
    mentions = find_mentions(record.rationale, record.choices, answer)
    return any(answers_match(mention, answer) for mention in mentions)


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)
