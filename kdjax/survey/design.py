"""Who sees which explanation when: Latin squares in Williams order.

People come in groups of K, K conditions; a person rates r blocks of K explanations, one
of each condition. In a block the K people of a group see the same K questions, each
person another condition of a question (a Latin square), in orders that are the cyclic
shifts of one sequence (a Williams square). So in a group every question meets every
condition once, and every condition stands once at every position. With K even, each
condition follows each other one once per block of a group; with K odd a block and its
reverse do that together. Between blocks the next one starts d conditions after the
last, d going through 1 .. K - 1.

Source: Williams, 1949, Experimental designs balanced for the estimation of residual
effects of treatments, Australian Journal of Scientific Research A 2(2).
"""

import dataclasses
import functools
import math

import numpy as np

RATING, PRACTICE, KNOWN = "rating", "practice", "known"
INSTRUCTIONS, SIMULATION = "instructions", "simulation"
PREFERENCE, DEMOGRAPHICS = "preference", "demographics"
_FARTHEST = 5000  # people up to which another number is looked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The numbers that decide a design."""

    seed: int
    num_conditions: int
    participants: int
    items_per_participant: int
    ratings_per_item: int
    num_strata: int = 1  # kinds of questions, as many of each
    exact_carry_over: bool = True
    instructed_checks: int = 0
    known_checks: int = 0
    practice_items: int = 0
    preferences: int = 0
    simulation: bool = False
    demographics: bool = False

    @property
    def num_blocks(self) -> int:
        """Return the blocks of a person."""
        return self.items_per_participant // self.num_conditions

    @property
    def num_group_blocks(self) -> int:
        """Return the blocks of all groups."""
        return self.participants // self.num_conditions * self.num_blocks

    @property
    def num_sets(self) -> int:
        """Return the sets of questions that are rated together in a block."""
        return self.num_group_blocks // self.ratings_per_item

    @property
    def num_questions(self) -> int:
        """Return the questions of the study."""
        return self.num_sets * self.num_conditions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """One page of a person's survey; indices are those of the study's lists."""

    kind: str
    question: int = -1
    condition: int = -1
    other: int = -1  # the second condition of a preference
    order: int = 0  # of a rated item: 1, 2, ...
    check: int = -1  # of an instructed statement, or a known question


def check(layout: Layout) -> None:
    """Check that a layout can be balanced.

    Raises:
      ValueError: it cannot; the nearest numbers that can are named.
    """
    num_conditions, items = layout.num_conditions, layout.items_per_participant
    if num_conditions < 2:
        raise ValueError(
            f"num_conditions={num_conditions}: compare two or more students or controls"
        )
    if items % num_conditions:
        low = items - items % num_conditions
        near = " or ".join(str(n) for n in (low, low + num_conditions) if n)
        raise ValueError(
            f"items_per_participant={items} is no multiple of {num_conditions} "
            f"conditions, so people would not see each equally often: use {near}"
        )
    if reason := _problem(layout):
        numbers = _nearest(layout)
        remedy = f"use participants={' or '.join(map(str, numbers))}"
        if layout.exact_carry_over:
            looser = dataclasses.replace(layout, exact_carry_over=False)
            if not _problem(looser):
                remedy += ", or carry_over='within_one'"
        if not numbers:
            remedy = "no number of participants helps; use an even number of blocks"
        raise ValueError(f"participants={layout.participants} {reason}: {remedy}")


def _problem(layout: Layout) -> str:
    """Return why the number of people cannot be balanced, or ""."""
    num_conditions, blocks = layout.num_conditions, layout.num_blocks
    if layout.participants % num_conditions:
        return f"is no multiple of {num_conditions} conditions"
    groups = layout.participants // num_conditions
    ratings = layout.ratings_per_item
    if groups < ratings:
        return (
            f"are too few for {ratings} ratings of each explanation by different people"
        )
    if groups * blocks % ratings:
        return f"cannot give each explanation {ratings} ratings"
    if layout.num_sets % layout.num_strata:
        return f"cannot rate equally many questions of {layout.num_strata} kinds"
    # Squares of an odd number go in pairs; distances between blocks in full turns.
    is_paired = num_conditions % 2 == 0 or groups * blocks % 2 == 0
    turns = groups * (blocks - 1) % (num_conditions - 1) == 0
    if not is_paired or (layout.exact_carry_over and not turns):
        return "cannot have each condition follow each other one equally often"
    return ""


def _nearest(layout: Layout) -> list[int]:
    """Return the nearest smaller and larger numbers of people that are balanced."""
    numbers = []
    for step in (-1, 1):
        number = layout.participants + step
        while 0 < number < _FARTHEST:
            if not _problem(dataclasses.replace(layout, participants=number)):
                numbers.append(number)
                break
            number += step
    return numbers


def williams(num_conditions: int) -> list[int]:
    """Return the first row of a Williams square: 0, 1, K - 1, 2, K - 2, ..."""
    row = [0]
    for step in range(1, num_conditions):
        row.append((step + 1) // 2 if step % 2 else num_conditions - step // 2)
    return row


def schedule(layout: Layout, number: int) -> list[tuple[int, int]]:
    """Return what a person rates, in order: (question, condition) indices.

    Args:
      layout: a valid one.
      number: of the person, from 0; larger ones than the layout has begin again.
    """
    num_conditions, blocks = layout.num_conditions, layout.num_blocks
    group, place = divmod(number % layout.participants, num_conditions)
    member = int(_permutation(layout.seed, num_conditions, 1, group)[place])
    names = _permutation(layout.seed, num_conditions, 2)
    distances = 1 + _permutation(layout.seed, num_conditions - 1, 3)
    sets = (group * blocks + np.arange(blocks)) % layout.num_sets
    sets = sets[_permutation(layout.seed, blocks, 4, group)]
    row, shift, last = np.array(williams(num_conditions)), 0, -1
    items = []
    for block in range(blocks):
        is_reversed = num_conditions % 2 and (group * blocks + block) % 2
        order = row[::-1] if is_reversed else row
        if block:
            index = group * (blocks - 1) + block - 1
            shift = last + int(distances[index % (num_conditions - 1)]) - int(order[0])
        conditions = (order + shift + member) % num_conditions
        last = int(order[-1]) + shift
        columns = _permutation(layout.seed, num_conditions, 5, group, block)
        rows = _permutation(layout.seed, num_conditions, 6, group, block)
        for condition in conditions:
            column = (columns[condition] + rows[member]) % num_conditions
            question = int(sets[block]) * num_conditions + int(column)
            items.append((question, int(names[condition])))
    return items


def pages(layout: Layout, number: int) -> list[Page]:
    """Return all pages of a person, after the consent.

    Instructed statements and known questions lie evenly among the rated items, each
    person's in an own order; compared pairs are of questions that the person has not
    rated.
    """
    items = schedule(layout, number)
    result = [Page(kind=INSTRUCTIONS)]
    result += [
        Page(kind=PRACTICE, question=index) for index in range(layout.practice_items)
    ]
    checks = [(RATING, index) for index in range(layout.instructed_checks)]
    checks += [(KNOWN, index) for index in range(layout.known_checks)]
    checks = [checks[i] for i in _permutation(layout.seed, len(checks), 7, number)]
    after = {
        math.ceil((index + 1) * len(items) / (len(checks) + 1)): each
        for index, each in enumerate(checks)
    }
    for order, (question, condition) in enumerate(items, start=1):
        kind, index = after.get(order, ("", -1))
        if layout.simulation:
            page = Page(kind=SIMULATION, question=question, condition=condition)
            result.append(dataclasses.replace(page, order=order))
        result.append(
            Page(
                kind=RATING,
                question=question,
                condition=condition,
                order=order,
                check=index if kind == RATING else -1,
            )
        )
        if kind == KNOWN:
            result.append(Page(kind=KNOWN, check=index))
    result += _preferences(layout, number, {question for question, _ in items})
    if layout.demographics:
        result.append(Page(kind=DEMOGRAPHICS))
    return result


def _preferences(layout: Layout, number: int, rated: set[int]) -> list[Page]:
    """Return pages that compare two explanations; ordered pairs come in turn."""
    count, num_conditions = layout.preferences, layout.num_conditions
    order = _permutation(layout.seed, layout.num_questions, 8, number)
    questions = [int(q) for q in order if int(q) not in rated][:count]
    pairs = [
        (first, second)
        for first in range(num_conditions)
        for second in range(num_conditions)
        if first != second
    ]
    turn = _permutation(layout.seed, len(pairs), 9)
    result = []
    for index, question in enumerate(questions):
        first, second = pairs[turn[(number * count + index) % len(pairs)]]
        result.append(
            Page(kind=PREFERENCE, question=question, condition=first, other=second)
        )
    return result


@functools.lru_cache(maxsize=4096)
def _permutation(seed: int, count: int, *stream: int) -> np.ndarray:
    """Return a permutation that follows from the seed and what it is for."""
    return np.random.default_rng([seed, *stream]).permutation(count)
