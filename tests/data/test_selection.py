import dataclasses

import pytest

from kdjax.config import DataConfig
from kdjax.data import selection
from kdjax.data.example import Example

FULL = Example(
    id="full",
    question="?",
    choices=("here", "there", "away"),
    answer="there",
    rationale="So there.",
    counterfactuals=("Here.", "Away."),
)
BARE = dataclasses.replace(FULL, id="bare", rationale="", counterfactuals=())
TOLD = dataclasses.replace(FULL, id="told", counterfactuals=("", ""))
EXAMPLES = [FULL, BARE, TOLD]
DROP = DataConfig(on_missing="drop")


@pytest.mark.parametrize(
    ("views", "kept", "counts"),
    [
        (("label",), ["full", "bare", "told"], {}),
        (("label", "rationale"), ["full", "told"], {"rationale": 1}),
        (("rationale_then_label",), ["full", "told"], {"rationale": 1}),
        (
            ("label", "factual", "counterfactual"),
            ["full"],
            {"rationale": 1, "counterfactuals": 1},
        ),
    ],
)
def test_examples_without_what_a_view_needs_are_left_out(views, kept, counts):
    found = selection.select(EXAMPLES, views, "train", DROP)
    assert [example.id for example in found.examples] == kept
    assert found.notes == [
        f"train: {num} of 3 examples left out, without {part} (data.on_missing=drop)"
        for part, num in counts.items()
    ]


@pytest.mark.parametrize(
    ("split", "config", "message"),
    [
        (
            "train",
            DataConfig(),
            r"^4 of 6 training examples have no rationale, which view 'rationale' "
            r"needs \(first: 'e0', 'e1', 'e2'\): give the data theirs "
            r"\(data.rationales\), leave them out \(data.on_missing='drop'\), or use a "
            "method without that view$",
        ),
        (
            "eval",
            DROP,
            r"^4 of 6 held-out examples .*\(data.eval_rationales\), or use a method",
        ),
    ],
)
def test_missing_rationales_are_an_error_that_counts(split, config, message):
    bare = [dataclasses.replace(BARE, id=f"e{i}") for i in range(4)]
    full = [dataclasses.replace(FULL, id=f"f{i}") for i in range(2)]
    with pytest.raises(ValueError, match=message):
        selection.select([*bare, *full], ("label", "rationale"), split, config)


def test_missing_counterfactuals_are_an_error_that_counts():
    message = r"1 of 2 .* have no counterfactuals, .*\(first: 'told'\).*data.counterf"
    with pytest.raises(ValueError, match=message):
        selection.select([FULL, TOLD], ("counterfactual",), "train", DataConfig())


def test_something_must_stay():
    with pytest.raises(
        ValueError, match=r"leaves none of 1 training examples: .*no rat"
    ):
        selection.select([BARE], ("rationale",), "train", DROP)
