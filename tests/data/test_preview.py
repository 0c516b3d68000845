"""Segments as texts: which tokens are read, which are trained."""

import numpy as np

from kdjax import prepare
from kdjax.config import DataConfig
from kdjax.data import preview, views
from kdjax.data.example import Example
from kdjax.data.tokenizer import make_word_tokenizer
from kdjax.runtime import console
from tests.data.test_views import byte_level

EXAMPLE = Example(
    id="a", question="Who is Lucy ?", choices=("aunt", "niece"), answer="niece"
)


def test_spans_are_what_is_read_and_what_is_trained():
    tokenizer = make_word_tokenizer()
    [segment], _ = views.make_segments([EXAMPLE], ["label"], tokenizer, DataConfig())
    read, trained = preview.spans(segment, tokenizer)
    assert not read.trained and trained.trained
    assert "".join(read.tokens).split()[-2:] == ["niece", "Answer:"]
    assert trained.tokens == (" niece", " <eos>")
    assert str(trained) == 'trained     2: " niece" " <eos>"'
    assert str(read).startswith("read ") and '"' in str(read)


def test_a_mask_splits_the_target():
    tokenizer = make_word_tokenizer()
    ids = np.asarray(tokenizer.encode("aunt niece uncle"), np.int32)
    mask = np.asarray([True, False, True])
    segment = views.Segment("a", 0, ids[:1], ids, b"", loss_mask=mask)
    kinds = [(span.trained, span.tokens) for span in preview.spans(segment, tokenizer)]
    assert kinds == [
        (False, (" aunt",)),
        (True, (" aunt",)),
        (False, (" niece",)),
        (True, (" uncle",)),
    ]


def test_tokens_join_to_the_text():
    tokenizer = byte_level()
    text = " a\u00e9\U0001f600 b"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = list(preview.token_texts(ids, tokenizer))
    assert len(texts) == len(ids) and "".join(texts) == text
    assert "" in texts  # bytes of one character


def test_unknown_tokens_are_counted():
    tokenizer = make_word_tokenizer()
    example = Example(id="a", question="Who is Zzyzx ?", answer="qwerty")
    segments, _ = views.make_segments([example], ["label"], tokenizer, DataConfig())
    assert preview.count_unknown(segments, tokenizer) >= 2


def test_on_a_terminal_kinds_are_colours(monkeypatch, capsys):
    monkeypatch.setattr(console, "has_colors", lambda: True)
    spans = [preview.Span(False, ("[a]", " b")), preview.Span(True, (" c\n", " d"))]
    prepare._print_spans(spans)
    assert capsys.readouterr().out == "[a] b c\n d\n"
    monkeypatch.setattr(console, "has_colors", lambda: False)
    prepare._print_spans(spans)
    assert capsys.readouterr().out == (
        '  read        2: "[a] b"\n  trained     2: " c\\n" " d"\n'
    )
