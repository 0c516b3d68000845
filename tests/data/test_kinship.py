"""The built-in task, against an oracle that knows graphs and no composition table."""

import itertools
import re

import pytest

from kdjax.config import KinshipConfig
from kdjax.data import kinship

CONFIG = KinshipConfig()
FACT = re.compile(r"(\w+) is the ([\w-]+) of (\w+) \.")
ASKED = re.compile(r"How is (\w+) related to (\w+) \?")


def examples(config=CONFIG, num=300, seed=0, split="train"):
    return kinship.generate(config, num_examples=num, seed=seed, split=split)


def oracle(question):
    """The relation asked for, from steps up and down between the two people.

    Each family edge changes the generation: parents are above. The shortest way from X
    to Y through the stated edges gives (up, sideways, down), and that names a relation.
    """
    edges = {}
    for subject, word, of in FACT.findall(question):
        edge, back = {
            "mother": "du", "father": "du", "daughter": "ud", "son": "ud",
            "sister": "ss", "brother": "ss",
        }[word]  # fmt: skip
        edges.setdefault(subject, {})[of] = edge
        edges.setdefault(of, {})[subject] = back
    x, y = ASKED.search(question).groups()
    paths = [(x, "")]
    seen = {x}
    for person, path in paths:
        if person == y:
            break
        for other, edge in edges[person].items():
            if other not in seen:
                seen.add(other)
                paths.append((other, path + edge))
    else:
        raise AssertionError("no path")
    # Going up and down by one, or sideways before going up, is one step sideways.
    path = path.replace("ud", "s")
    while (short := re.sub("s+", "s", path).replace("su", "u").replace("ds", "d")) != (
        path
    ):
        path = short
    relation = {
        "d": "parent", "u": "child", "s": "sibling", "dd": "grandparent",
        "uu": "grandchild", "ddd": "great-grandparent", "uuu": "great-grandchild",
        "sd": "pibling", "us": "nibling", "usd": "cousin",
    }[path]  # fmt: skip
    gender = next(g for g in (0, 1) if x in kinship.NAMES[g])
    return kinship.WORDS[relation][gender]


@pytest.mark.parametrize(
    "config",
    [CONFIG, KinshipConfig(min_hops=2, max_hops=5, num_distractors=6, num_choices=10)],
)
def test_answers_agree_with_the_oracle(config):
    for example in examples(config):
        assert oracle(example.question) == example.answer, example.question


def test_every_stated_fact_is_possible():
    """One mother, one father, and a gender that never changes."""
    config = KinshipConfig(max_hops=4, num_distractors=5)
    for example in examples(config):
        facts = FACT.findall(example.question)
        assert len(facts) in range(2 + 5, 4 + 5 + 1)
        for subject, word, _ in facts:
            gender = next(g for g in (0, 1) if subject in kinship.NAMES[g])
            assert any(pair[gender] == word for pair in kinship.WORDS.values())
        for word in ("mother", "father"):
            of = [f[2] for f in facts if f[1] == word]
            assert len(of) == len(set(of))


def test_the_ends_of_a_chain_stand_in_one_fact():
    for example in examples(KinshipConfig(num_distractors=6)):
        facts = FACT.findall(example.question)
        x, y = ASKED.search(example.question).groups()
        assert [fact[0] for fact in facts].count(x) == 1
        assert [fact[2] for fact in facts].count(y) == 1


def test_rationales_lead_to_their_choices():
    for example in examples():
        wrong = [choice for choice in example.choices if choice != example.answer]
        assert len(example.counterfactuals) == len(wrong) == CONFIG.num_choices - 1
        facts = set(FACT.findall(example.question))
        x, y = ASKED.search(example.question).groups()
        for choice, rationale in zip(
            [example.answer, *wrong],
            [example.rationale, *example.counterfactuals],
            strict=True,
        ):
            assert rationale.endswith(f"So {x} is the {choice} of {y} .")
        stated = set(FACT.findall(re.sub(r"So [^.]*\.", "", example.rationale)))
        assert stated <= facts
        assert len(set(example.counterfactuals)) == len(wrong)
        assert example.rationale not in example.counterfactuals


def test_sizes_at_the_defaults():
    for example in examples():
        assert len(set(example.choices)) == CONFIG.num_choices
        assert example.answer in example.choices
        words = example.question.split() + [" "] * (2 * CONFIG.num_choices + 2)
        assert len(words) <= 60
        assert len(example.rationale.split()) <= 40


def test_vocabulary_is_complete():
    vocabulary = kinship.vocabulary()
    assert vocabulary == sorted(set(vocabulary))
    for example in examples(KinshipConfig(max_hops=5, num_choices=19), num=200):
        texts = [example.question, example.answer, example.rationale]
        texts += [*example.choices, *example.counterfactuals]
        assert set(" ".join(texts).split()) <= set(vocabulary)


def test_an_example_depends_on_seed_split_and_index_only():
    assert examples(num=50) == examples(num=200)[:50]
    assert examples(num=50) != examples(num=50, seed=1)
    assert examples(num=1) != examples(num=1, split="eval")


def chain(example):
    return re.sub(r"So [^.]*\.", "", example.rationale).split()


def test_train_and_eval_are_disjoint_for_any_seeds():
    train = {tuple(chain(e)) for seed in range(3) for e in examples(seed=seed, num=800)}
    held_out = {tuple(chain(e)) for e in examples(num=800, split="eval")}
    assert not train & held_out


def test_disjointness_holds_where_chains_are_few(monkeypatch):
    """With five names a sex, chains repeat, so that a leak would show."""
    monkeypatch.setattr(kinship, "NAMES", tuple(pool[:5] for pool in kinship.NAMES))
    config = KinshipConfig(min_hops=2, max_hops=2, num_distractors=0)
    train = [tuple(chain(e)) for e in examples(config, num=3000)]
    held_out = {tuple(chain(e)) for e in examples(config, num=500, split="eval")}
    assert len(set(train)) < len(train)
    assert not set(train) & held_out


def test_label_noise_changes_labels_and_nothing_else():
    clean = examples(num=1000)
    noisy = examples(KinshipConfig(label_noise=0.3), num=1000)
    changed = 0
    for a, b in itertools.zip_longest(clean, noisy):
        assert (a.id, a.question, a.choices) == (b.id, b.question, b.choices)
        assert b.rationale.split()[-4] == b.answer
        assert {a.rationale, *a.counterfactuals} == {b.rationale, *b.counterfactuals}
        changed += a.answer != b.answer
    assert 250 < changed < 350
    config = KinshipConfig(label_noise=1.0)
    assert examples(config, split="eval") == examples(split="eval")


def test_answers_and_their_places_are_balanced():
    train = examples(num=2000)
    places = [example.choices.index(example.answer) for example in train]
    for place in range(CONFIG.num_choices):
        assert 320 < places.count(place) < 480
    answers = [example.answer for example in train]
    assert max(answers.count(word) for word in set(answers)) < 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_hops", 1),
        ("max_hops", 1),
        ("max_hops", 6),
        ("num_choices", 1),
        ("num_choices", 20),
        ("num_distractors", 40),
        ("label_noise", 1.5),
    ],
)
def test_a_setting_outside_its_limits_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        examples(KinshipConfig(**{field: value}))


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="split='test'"):
        examples(split="test")
