"""The built-in task: the relation of X to Y from stated family relations.

A question states a chain of relations from X to Y in shuffled order, among
distractors, and asks for one word. Everything is space-separated words of a small
vocabulary, so a word-level tokenizer loses nothing. An example is a pure function of
(seed, split, index).
"""

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator

from kdjax.config import KinshipConfig
from kdjax.data.example import Example

FEMALE, MALE = 0, 1

# relation -> (word for a woman, word for a man)
WORDS = {
    "parent": ("mother", "father"),
    "child": ("daughter", "son"),
    "sibling": ("sister", "brother"),
    "grandparent": ("grandmother", "grandfather"),
    "grandchild": ("granddaughter", "grandson"),
    "great-grandparent": ("great-grandmother", "great-grandfather"),
    "great-grandchild": ("great-granddaughter", "great-grandson"),
    "pibling": ("aunt", "uncle"),
    "nibling": ("niece", "nephew"),
    "cousin": ("cousin", "cousin"),
}
STATED = ("parent", "child", "sibling")

# X is the <first> of A and A is the <second> of Y, so X is the <value> of Y. Pairs
# with more than one possible answer (a parent's child may be oneself) are left out.
COMPOSE = {
    ("parent", "parent"): "grandparent",
    ("parent", "sibling"): "parent",
    ("child", "parent"): "sibling",
    ("child", "child"): "grandchild",
    ("child", "sibling"): "nibling",
    ("sibling", "parent"): "pibling",
    ("sibling", "child"): "child",
    ("sibling", "sibling"): "sibling",
    ("grandparent", "parent"): "great-grandparent",
    ("grandparent", "sibling"): "grandparent",
    ("grandchild", "child"): "great-grandchild",
    ("great-grandparent", "sibling"): "great-grandparent",
    ("pibling", "sibling"): "pibling",
    ("nibling", "parent"): "cousin",
    ("nibling", "child"): "grandchild",
    ("cousin", "sibling"): "cousin",
}

_WOMEN = """Alice Anna Bella Clara Daisy Diana Ella Emma Fiona Grace Hannah Irene
    Julia Kate Laura Lucy Maria Nora Olive Paula Rosa Sarah Tessa Vera"""
_MEN = """Adam Ben Carl David Eric Felix Frank George Henry Hugo Ivan Jack Karl Leo
    Mark Max Nick Oscar Paul Peter Ralph Sam Tom Victor"""
NAMES = (tuple(_WOMEN.split()), tuple(_MEN.split()))
CONNECTIVES = ("is", "the", "of", ".", "How", "related", "to", "?", "So")
MAX_HOPS = 5
EVAL_SHARE = 8  # one chain in this many belongs to the eval split

_RELATION = {word: name for name, pair in WORDS.items() for word in pair}
_ANSWERS = tuple(dict.fromkeys(word for pair in WORDS.values() for word in pair))


def vocabulary() -> list[str]:
    """Return all words of questions, choices, answers and rationales, sorted."""
    return sorted({*itertools.chain(*NAMES), *_ANSWERS, *CONNECTIVES})


def answer_of(chain: tuple[str, ...]) -> str | None:
    """Compose the words of the facts from X to Y into the word for X to Y.

    Returns:
      The relation word, in X's gender, or None where the chain has no single answer.
    """
    words = _conclusions(chain)
    return words[-1] if words else None


def _conclusions(chain: tuple[str, ...]) -> tuple[str, ...]:
    """Return the word for X to each person of the chain; () without one answer."""
    gender = _gender(chain[0])
    relation = _RELATION[chain[0]]
    words = [chain[0]]
    for word in chain[1:]:
        composed = COMPOSE.get((relation, _RELATION[word]))
        if composed is None:
            return ()
        relation = composed
        words.append(WORDS[relation][gender])
    return tuple(words)


@functools.cache
def _chains(num_hops: int) -> dict[str, list[tuple[str, ...]]]:
    """List the chains of stated relations of one length, by composed relation.

    A chain goes up the tree, then down. One that went up again after going down could
    give somebody two mothers.
    """
    chains: dict[str, list[tuple[str, ...]]] = {}
    for chain in itertools.product(STATED, repeat=num_hops):
        down = chain.index("parent") if "parent" in chain else num_hops
        answer = answer_of(tuple(WORDS[step][FEMALE] for step in chain))
        if answer and "child" not in chain[down:]:
            chains.setdefault(_RELATION[answer], []).append(chain)
    return chains


@functools.cache
def _misreadings(chain: tuple[str, ...]) -> dict[str, list[tuple[str, ...]]]:
    """List the chains with one word of `chain` misread, by their answer."""
    misreadings: dict[str, list[tuple[str, ...]]] = {}
    for hop, relation, gender in itertools.product(
        range(len(chain)), STATED, (FEMALE, MALE)
    ):
        misread = (*chain[:hop], WORDS[relation][gender], *chain[hop + 1 :])
        if answer := answer_of(misread):
            misreadings.setdefault(answer, []).append(misread)
    return misreadings


def _gender(word: str) -> int:
    return WORDS[_RELATION[word]].index(word)


def _fact(subject: str, word: str, of: str) -> str:
    return f"{subject} is the {word} of {of} ."


def _rationale(people: list[str], chain: tuple[str, ...], answer: str) -> str:
    """Write the steps along the chain, ending in `answer`, right or wrong."""
    sentences = [_fact(people[0], chain[0], people[1])]
    conclusions = (*_conclusions(chain)[:-1], answer)
    for hop in range(1, len(chain)):
        sentences.append(_fact(people[hop], chain[hop], people[hop + 1]))
        sentences.append("So " + _fact(people[0], conclusions[hop], people[hop + 1]))
    return " ".join(sentences)


def _wrong_rationale(
    rng: random.Random, people: list[str], chain: tuple[str, ...], choice: str
) -> str:
    """Write steps to `choice`: one fact misread, or else a wrong last conclusion."""
    misread = _misreadings(chain).get(choice)
    return _rationale(people, rng.choice(misread) if misread else chain, choice)


def _is_eval(people: list[str], chain: tuple[str, ...]) -> bool:
    digest = hashlib.blake2b(" ".join([*people, *chain]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % EVAL_SHARE == 0


def _people(rng: random.Random, genders: list[int]) -> list[str]:
    """Draw distinct names of the given genders."""
    pools = [iter(rng.sample(pool, len(genders))) for pool in NAMES]
    return [next(pools[gender]) for gender in genders]


def _distractors(
    rng: random.Random, people: list[str], genders: list[int], strangers: list[str]
) -> Iterator[str]:
    """Yield one fact per stranger about somebody of the chain.

    A stranger is a new child or sibling, never a new parent: nobody gets two mothers,
    and no second path leads from X to Y. X begins one fact and Y ends one, so that both
    ends of the chain can be looked up; what lies between has to be followed.
    """
    for stranger in strangers:
        person = rng.randrange(len(people))
        at_start, at_end = person == 0, person == len(people) - 1
        if at_start or (not at_end and rng.random() < 0.5):
            word = WORDS[rng.choice(("child", "sibling"))]
            gender = int(stranger in NAMES[MALE])
            yield _fact(stranger, word[gender], people[person])
        else:
            word = WORDS[rng.choice(("parent", "sibling"))]
            yield _fact(people[person], word[genders[person]], stranger)


def _example(config: KinshipConfig, split: str, seed: int, index: int) -> Example:
    rng = random.Random(f"{seed}/{split}/{index}")
    num_hops = rng.randint(config.min_hops, config.max_hops)
    by_answer = _chains(num_hops)
    steps = rng.choice(by_answer[rng.choice(list(by_answer))])
    genders = [rng.randrange(2) for _ in range(num_hops + 1 + config.num_distractors)]
    chain = tuple(WORDS[s][g] for s, g in zip(steps, genders, strict=False))
    # Splits never share a chain with its names, whatever the seeds.
    while True:
        names = _people(rng, genders)
        people, strangers = names[: num_hops + 1], names[num_hops + 1 :]
        if _is_eval(people, chain) == (split == "eval"):
            break
    facts = [_fact(*f) for f in zip(people, chain, people[1:], strict=False)]
    facts += _distractors(rng, people, genders, strangers)
    rng.shuffle(facts)

    answer = answer_of(chain)
    assert answer is not None  # `_chains` has only chains with one answer
    # Words of X's gender come first: the others would be ruled out by X's name.
    wrong = rng.sample(_ANSWERS, len(_ANSWERS))
    wrong = [word for word in wrong if word != answer]
    wrong.sort(
        key=lambda word: word not in {pair[genders[0]] for pair in WORDS.values()}
    )
    choices = [answer, *wrong[: config.num_choices - 1]]
    rng.shuffle(choices)
    rationales = {
        choice: _rationale(people, chain, answer)
        if choice == answer
        else _wrong_rationale(rng, people, chain, choice)
        for choice in choices
    }
    # Drawn last, so that noise changes labels and nothing else.
    if split == "train" and rng.random() < config.label_noise:
        answer = rng.choice([choice for choice in choices if choice != answer])
    return Example(
        id=f"kinship-{split}-{seed}-{index}",
        question=f"{' '.join(facts)} How is {people[0]} related to {people[-1]} ?",
        choices=tuple(choices),
        answer=answer,
        rationale=rationales[answer],
        counterfactuals=tuple(rationales[c] for c in choices if c != answer),
    )


def _check(config: KinshipConfig) -> None:
    if not 2 <= config.min_hops <= config.max_hops <= MAX_HOPS:
        raise ValueError(
            f"min_hops={config.min_hops}, max_hops={config.max_hops}: "
            f"need 2 <= min_hops <= max_hops <= {MAX_HOPS}"
        )
    if not 2 <= config.num_choices <= len(_ANSWERS):
        raise ValueError(
            f"num_choices={config.num_choices}: there are {len(_ANSWERS)} relation "
            f"words: use 2 to {len(_ANSWERS)}"
        )
    limit = min(len(pool) for pool in NAMES) - config.max_hops - 1
    if not 0 <= config.num_distractors <= limit:
        raise ValueError(
            f"num_distractors={config.num_distractors}: there are names for {limit}: "
            f"use 0 to {limit}"
        )
    if not 0 <= config.label_noise <= 1:
        raise ValueError(
            f"label_noise={config.label_noise} is no share: use a value from 0 to 1"
        )


def generate(
    config: KinshipConfig, *, num_examples: int, seed: int, split: str
) -> list[Example]:
    """Generate examples.

    Args:
      config: difficulty; `label_noise` applies to the train split only.
      num_examples: number of examples; the first n are the same whatever the number.
      seed: a different seed gives different examples.
      split: "train" or "eval". A chain of relations with its names belongs to one of
        them by its hash, so no eval chain is in any train split of any seed.

    Returns:
      Examples with one rationale that leads to `answer`, and one counterfactual
      rationale for each other choice that leads to that choice.

    Raises:
      ValueError: a setting outside its limits.
    """
    _check(config)
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: use 'train' or 'eval'")
    return [_example(config, split, seed, index) for index in range(num_examples)]
