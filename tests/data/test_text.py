"""Normal forms, by hand."""

import pytest

from kdjax.data.text import normalize_text, normalize_words


@pytest.mark.parametrize(
    ("text", "normal", "words"),
    [
        (" Her\u00a0 AUNT\n.", "her aunt", "her aunt"),
        ("the U.S.", "the u.s", "the u s"),
        ("step-mother, (b)", "step-mother, (b)", "step mother b"),
        (" . ", "", ""),
        ("", "", ""),
    ],
)
def test_normal_forms(text, normal, words):
    assert normalize_text(text) == normal
    assert normalize_words(text) == words
