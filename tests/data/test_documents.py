import dataclasses

import numpy as np
import pytest

from kdjax.config import DataConfig
from kdjax.data import documents, loader, views
from kdjax.data.example import Example
from kdjax.data.tokenizer import make_word_tokenizer

TOKENIZER = make_word_tokenizer([f"w{i}" for i in range(60)])
EOS = TOKENIZER.eos_token_id


def texts(lengths):
    words = iter(
        f"w{i}" for i in np.random.default_rng(0).integers(0, 60, sum(lengths))
    )
    return [
        Example(id=f"t{i}", text=" ".join(next(words) for _ in range(length)))
        for i, length in enumerate(lengths)
    ]


def make(lengths, how, **changes):
    config = DataConfig(max_target=10, long_text=how, **changes)
    return documents.make_segments(texts(lengths), ("text",), TOKENIZER, config)


def all_ids(lengths):
    """The ids of each text, with its end."""
    return [
        [*TOKENIZER.encode(example.text, add_special_tokens=False), EOS]
        for example in texts(lengths)
    ]


LENGTHS = [3, 9, 10, 25, 1, 40]


def test_pieces_of_a_text_are_learnt_once_each_after_the_token_before():
    segments, counts = make(LENGTHS, "pieces")
    by_text = {}
    for segment in segments:
        name = segment.example_id.partition("#")[0]
        before = by_text.setdefault(name, [EOS])
        assert segment.prompt_ids.tolist() == before[-1:]
        assert len(segment.target_ids) <= 10
        before.extend(segment.target_ids.tolist())
    assert [ids[1:] for ids in by_text.values()] == all_ids(LENGTHS)
    assert counts.segments == len(segments) == 1 + 1 + 2 + 3 + 1 + 5
    assert counts.target_tokens == sum(map(len, all_ids(LENGTHS)))
    # Pieces are no alternatives: an epoch has all of them.
    assert loader.as_segments(segments).alternatives.tolist() == list(range(13))
    assert len({segment.key for segment in segments}) == 13


def test_joined_texts_fill_all_rows_but_the_last():
    segments, counts = make(LENGTHS, "joined")
    ids = [i for of in all_ids(LENGTHS) for i in of]
    assert np.concatenate([s.target_ids for s in segments]).tolist() == ids
    assert {s.length for s in segments[:-1]} == {10}
    assert len(segments) == -(-len(ids) // 10) == counts.segments
    plan = loader.BatchPlan(segments, batch_size=1, row_length=10)
    assert plan.packing_efficiency() == len(ids) / (10 * len(segments))


def test_short_texts_are_the_same_either_way():
    whole = make([3, 9, 5], "whole")[0]
    pieces = make([3, 9, 5], "pieces")[0]
    for one, other in zip(whole, pieces, strict=True):
        assert (one.key, one.example_id) == (other.key, other.example_id)
    with pytest.raises(ValueError, match="max_target=10"):
        make([3, 10], "whole")


def test_other_views_are_left_to_views():
    example = Example(id="q", question="w1 w2", answer="w3")
    config = DataConfig(long_text="pieces")
    config = dataclasses.replace(config, max_target=2)
    made, _ = documents.make_segments([example], ("label",), TOKENIZER, config)
    expected, _ = views.make_segments([example], ("label",), TOKENIZER, config)
    assert [s.key for s in made] == [s.key for s in expected]
