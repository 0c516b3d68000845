"""Long texts as segments: whole, in pieces, or joined and cut (`data.long_text`)."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdjax.config import DataConfig
from kdjax.data import views
from kdjax.data.example import Example
from kdjax.data.tokenizer import fingerprint
from kdjax.data.views import Segment, SegmentCounts

_UNLIMITED = 2**31 - 1


def make_segments(
    examples: Sequence[Example],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[list[Segment], SegmentCounts]:
    """Tokenise every view of every example, as `views.make_segments`.

    Texts (the view "text") of more than `config.max_target` tokens are cut where
    `config.long_text` says so. "pieces" cuts each text; a piece after the first reads
    the token before it as its prompt, so that every token of a text is learnt once.
    "joined" writes the texts one after another, each with its end token, and cuts that
    in the same way: all segments but the last have `max_target` tokens, and a token may
    attend to those of the text before.
    """
    if tuple(names) != ("text",) or config.long_text == "whole":
        return views.make_segments(examples, names, tokenizer, config)
    unlimited = dataclasses.replace(config, max_target=_UNLIMITED)
    texts, counts = views.make_segments(examples, names, tokenizer, unlimited)
    cut = _joined if config.long_text == "joined" else _pieces
    base = fingerprint(tokenizer).encode()
    segments = list(cut(texts, config.max_target, base))
    prompt_tokens = sum(len(segment.prompt_ids) for segment in segments)
    counts = dataclasses.replace(
        counts, segments=len(segments), prompt_tokens=prompt_tokens
    )
    return segments, counts


def _pieces(texts: Sequence[Segment], size: int, base: bytes) -> Iterator[Segment]:
    """Yield each text in pieces of at most `size` target tokens."""
    for text in texts:
        ids = np.concatenate([text.prompt_ids, text.target_ids])
        yield from _cut(text, ids, len(text.prompt_ids), size, base)


def _joined(texts: Sequence[Segment], size: int, base: bytes) -> Iterator[Segment]:
    """Yield all texts as one, in pieces of `size` target tokens."""
    if texts:
        ids = [texts[0].prompt_ids, *(text.target_ids for text in texts)]
        yield from _cut(
            texts[0], np.concatenate(ids), len(texts[0].prompt_ids), size, base
        )


def _cut(
    text: Segment, ids: np.ndarray, num_prompt: int, size: int, base: bytes
) -> Iterator[Segment]:
    """Yield segments whose targets are the ids after the prompt, `size` at a time."""
    starts = range(num_prompt, len(ids), size)
    for number, start in enumerate(starts):
        prompt = ids[:start] if number == 0 else ids[start - 1 : start]
        target = ids[start : start + size]
        yield dataclasses.replace(
            text,
            # Other ids: pieces of one text are not alternatives.
            example_id=f"{text.example_id}#{number}" if number else text.example_id,
            prompt_ids=prompt,
            target_ids=target,
            key=views.content_key(base, prompt, target),
        )
