"""Segments as texts: what a student reads, and what it is trained on."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdjax.data.views import Segment

_UNFINISHED = "\ufffd"  # what bytes of a part of a character decode to
_MAX_TOKENS = 8  # of one character


class Span(NamedTuple):
    """Tokens in a row that are all trained, or all only read."""

    trained: bool
    tokens: tuple[str, ...]  # texts; "" where a token ends in the next one's character

    def __str__(self) -> str:
        """Return the span as a line; of trained tokens each one is quoted."""
        pieces = self.tokens if self.trained else ("".join(self.tokens),)
        quoted = " ".join(
            json.dumps(piece, ensure_ascii=False) for piece in pieces if piece
        )
        kind = "trained" if self.trained else "read"
        return f"{kind:<7} {len(self.tokens):>5}: {quoted}"


def spans(segment: Segment, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Return the tokens of a segment in the order in which they are read."""
    num_before = len(segment.prompt_ids) + len(segment.prefix_ids)
    in_loss = segment.loss_mask
    if in_loss is None:
        in_loss = np.ones(len(segment.target_ids), bool)
    trained = [False] * num_before + [bool(t) for t in in_loss]
    ids = [*segment.prompt_ids, *segment.prefix_ids, *segment.target_ids]
    result, start = [], 0
    for is_trained, group in itertools.groupby(trained):
        stop = start + len(list(group))
        texts = tuple(token_texts(list(map(int, ids[start:stop])), tokenizer))
        result.append(Span(is_trained, texts))
        start = stop
    return result


def token_texts(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yield the text of each token, with the space that it begins with.

    A character that several tokens share is that of the first; the others have "".
    """
    # A tokenizer may drop the space before the first token, so there is one before it.
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    prefix = _decode(before, tokenizer)
    start = 0
    while start < len(ids):
        for stop in range(start + 1, min(start + _MAX_TOKENS, len(ids)) + 1):
            text = _decode([*before, *ids[start:stop]], tokenizer)[len(prefix) :]
            if not text.endswith(_UNFINISHED):
                break
        else:
            stop = start + 1
        yield text
        yield from [""] * (stop - start - 1)
        start = stop


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(
        tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )


def count_unknown(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase
) -> int:
    """Count the tokens that stand for what the tokenizer does not know."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return 0
    return sum(
        int((ids == unknown).sum())
        for s in segments
        for ids in (s.prompt_ids, s.prefix_ids, s.target_ids)
    )
