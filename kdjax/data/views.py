"""Views as tokens: an example becomes segments of a prompt and a target.

Prompt and target are tokenised apart and joined, so the boundary never moves. What
joins them is one space, or nothing where the tokenizer adds its own word boundary or a
chat template ends the prompt; see `target_prefix`.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from kdjax.config import DataConfig
from kdjax.data import templates
from kdjax.data.sources import Example
from kdjax.data.tokenizer import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class Segment:
    """One view of one example, as tokens."""

    example_id: str
    view: int  # index into the method's view names
    prompt_ids: Int32[np.ndarray, " P"]  # at least one token
    target_ids: Int32[np.ndarray, " t"]  # ends with eos, unless it was truncated
    key: bytes  # 16 bytes: a hash of tokenizer, prompt and target

    @property
    def length(self) -> int:
        """Input positions: every token but the last one is read."""
        return len(self.prompt_ids) + len(self.target_ids) - 1


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of the examples."""

    segments: int = 0
    prompt_tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0  # segments
    dropped: int = 0  # segments


@dataclass(frozen=True, eq=False, slots=True)
class ChoiceSegments:
    """The label prompt with each choice as the target, in the examples' order."""

    segments: list[Segment]  # N of them
    example: Int32[np.ndarray, " N"]  # index of the example
    choice: Int32[np.ndarray, " N"]  # index of the choice within the example
    correct: Bool[np.ndarray, " N"]  # whether the choice reads as the answer


def target_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between a cue and a target: " " where that survives tokenising.

    A byte-level vocabulary has tokens that start with a space; a SentencePiece one
    that adds its own would see two. The one is taken for which tokenising apart equals
    tokenising together.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    cue, word = templates.ANSWER, "mother"
    for prefix in (" ", ""):
        if ids(cue) + ids(prefix + word) == ids(f"{cue} {word}"):
            return prefix
    return " "


def make_segments(
    examples: Sequence[Example],
    views: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[list[Segment], Counts]:
    """Tokenises every view of every example.

    A beginning-of-sequence token comes first where the tokenizer adds one to plain
    text (chat templates write their own). An empty prompt becomes that token, or else
    eos, so that every target token has something before it.

    Args:
      examples: from `load_examples`.
      views: names; `Segment.view` indexes them.
      tokenizer: prompt and target go through it without special tokens.
      config: `max_prompt`, `max_target`, `on_long`, `chat_template`. A truncated
        prompt loses its beginning, a truncated target its end, eos included.

    Returns:
      Segments ordered by example, then view; and counts, which are logged too.

    Raises:
      ValueError: an example lacks what a view needs, or is too long.
    """
    items = [
        (example, view, *templates.render(example, name))
        for example in examples
        for view, name in enumerate(views)
    ]
    segments, counts = _tokenize(items, tuple(views), tokenizer, config)
    return [segment for segment in segments if segment is not None], counts


def choice_segments(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> ChoiceSegments:
    """The label prompt followed by each choice, for multiple-choice scoring.

    Two choices may read the same; both are `correct` if they read as the answer. An
    example is left out whole if `on_long="drop"` drops one of its choices.

    Raises:
      ValueError: an example without choices, or too long.
    """
    items, place, correct = [], [], []
    for index, example in enumerate(examples):
        prompt, _ = templates.render(example, "label")
        if not example.choices:
            raise ValueError(
                f"example {example.id!r} has no choices to score: use generation"
            )
        for number, choice in enumerate(example.choices):
            items.append((example, 0, prompt, choice))
            place.append((index, number))
            correct.append(choice == example.answer)
    segments, _ = _tokenize(items, ("label",), tokenizer, config)
    lost = {at[0] for s, at in zip(segments, place, strict=True) if s is None}
    kept = np.asarray([at[0] not in lost for at in place], bool)
    place_N2 = np.asarray(place, np.int32).reshape(-1, 2)[kept]
    return ChoiceSegments(
        segments=[s for s, keep in zip(segments, kept, strict=True) if s and keep],
        example=place_N2[:, 0],
        choice=place_N2[:, 1],
        correct=np.asarray(correct, bool)[kept],
    )


def prompt_ids(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool = False,
) -> list[list[int]]:
    """Token ids of prompts as the segments have them, before any length limit."""
    if not prompts:
        return []
    if chat_template:
        if tokenizer.chat_template is None:
            raise ValueError(
                "chat_template=True: the tokenizer has none: use chat_template=False"
            )
        # Equal prompts (one per choice) are common; templates are slow.
        texts = {
            text: str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
            for text in dict.fromkeys(prompts)
            if text
        }
        prompts, start = [texts.get(text, "") for text in prompts], []
    else:
        start = _start(tokenizer)
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    empty = [tokenizer.eos_token_id if bos is None else bos]
    return [(start + ids) or empty for ids in encoded]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] where the tokenizer puts it before plain text."""
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _tokenize(
    items: list[tuple[Example, int, str, str]],
    views: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[list[Segment | None], Counts]:
    """Segments of (example, view, prompt, target); None where one was dropped."""
    counts = Counts()
    if not items:
        return [], counts
    chat = config.chat_template
    prompts = prompt_ids([i[2] for i in items], tokenizer, chat_template=chat)
    prefix = "" if chat else target_prefix(tokenizer)
    texts = [(prefix if prompt else "") + target for _, _, prompt, target in items]
    targets = tokenizer(texts, add_special_tokens=False)["input_ids"]
    base = fingerprint(tokenizer).encode()
    segments: list[Segment | None] = []
    for (example, view, _, _), prompt, target in zip(
        items, prompts, targets, strict=True
    ):
        target = [*target, tokenizer.eos_token_id]
        if len(prompt) > config.max_prompt or len(target) > config.max_target:
            if config.on_long == "error":
                raise ValueError(
                    _too_long(example, views[view], prompt, target, config)
                )
            if config.on_long == "drop":
                counts.dropped += 1
                segments.append(None)
                continue
            counts.truncated += 1
            prompt = prompt[-config.max_prompt :]
            target = target[: config.max_target]
        prompt_P, target_t = np.asarray(prompt, np.int32), np.asarray(target, np.int32)
        counts.segments += 1
        counts.prompt_tokens += len(prompt)
        counts.target_tokens += len(target)
        key = _key(base, prompt_P, target_t)
        segments.append(Segment(example.id, view, prompt_P, target_t, key))
    logger.info("views %s: %s", views, counts)
    return segments, counts


def _key(base: bytes, prompt_P: np.ndarray, target_t: np.ndarray) -> bytes:
    """blake2b-128 of fingerprint, lengths and little-endian ids."""
    lengths = np.asarray([len(prompt_P), len(target_t)], "<i8")
    arrays = (lengths, prompt_P.astype("<i4"), target_t.astype("<i4"))
    content = base + b"".join(array.tobytes() for array in arrays)
    return hashlib.blake2b(content, digest_size=16).digest()


def _too_long(
    example: Example,
    view: str,
    prompt: list[int],
    target: list[int],
    config: DataConfig,
) -> str:
    if len(prompt) > config.max_prompt:
        part, found, limit = "prompt", len(prompt), config.max_prompt
    else:
        part, found, limit = "target", len(target), config.max_target
    return (
        f"example {example.id!r}, view {view!r}: its {part} has {found} tokens, "
        f"max_{part}={limit}: use max_{part} >= {found}, or on_long='truncate' or "
        "'drop' (both are counted)"
    )
