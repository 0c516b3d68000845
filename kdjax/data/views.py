"""Tokenised views: segments of a prompt and a target.

Prompt and target are tokenised apart and joined, so the boundary never moves. What
joins them is one space, or nothing where the tokenizer adds its own word boundary or a
chat template ends the prompt; see `target_prefix`. A prefix stands between the two and
is joined to both in the same way.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from kdjax.config import DataConfig
from kdjax.data import templates
from kdjax.data.example import Example
from kdjax.data.templates import Text
from kdjax.data.tokenizer import fingerprint

logger = logging.getLogger(__name__)

_EMPTY = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False, slots=True)
class Segment:
    """One view of one example, as tokens."""

    example_id: str
    view: int  # index into the method's view names
    prompt_ids: Int32[np.ndarray, " P"]  # at least one token
    target_ids: Int32[np.ndarray, " t"]  # ends with eos, unless it was truncated
    key: bytes  # 16 bytes: a hash of tokenizer, prompt, prefix and target
    # Read between prompt and target, without loss; mostly empty.
    prefix_ids: Int32[np.ndarray, " p"] = field(default_factory=lambda: _EMPTY)
    weight: float = 1.0  # of its target tokens in the loss
    # Target tokens that are in the loss, for which alone there are records; None = all.
    loss_mask: Bool[np.ndarray, " t"] | None = None

    @property
    def loss_ids(self) -> Int32[np.ndarray, " l"]:
        """Target tokens that are in the loss."""
        return (
            self.target_ids
            if self.loss_mask is None
            else self.target_ids[self.loss_mask]
        )

    @property
    def num_loss_tokens(self) -> int:
        """Number of target tokens that are in the loss."""
        return len(self.target_ids) if self.loss_mask is None else len(self.loss_ids)

    @property
    def ids(self) -> Int32[np.ndarray, " n"]:
        """All tokens, as a model that only decodes has them: prompt, prefix, target."""
        return np.concatenate([self.prompt_ids, self.prefix_ids, self.target_ids])

    @property
    def length(self) -> int:
        """Input positions of such a model: every token but the last one is read."""
        lengths = map(len, (self.prompt_ids, self.prefix_ids, self.target_ids))
        return sum(lengths) - 1


@dataclass(kw_only=True, slots=True)
class SegmentCounts:
    """Numbers of segments and tokens after the length limits."""

    segments: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0  # segments
    dropped: int = 0  # segments


@dataclass(frozen=True, eq=False, slots=True)
class ChoiceSegments:
    """A prompt with each choice as the target, in the examples' order."""

    segments: list[Segment]  # N of them
    example: Int32[np.ndarray, " N"]  # index of the example
    choice: Int32[np.ndarray, " N"]  # index of the choice within the example
    correct: Bool[np.ndarray, " N"]  # whether the choice reads as the answer


def target_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the joint of prompt and target: " " where that survives tokenising.

    A byte-level vocabulary has tokens that start with a space; a SentencePiece one
    that adds its own would see two. The one is taken for which tokenising apart equals
    tokenising together.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    suffix, word = templates.ANSWER, "mother"
    for prefix in (" ", ""):
        if ids(suffix) + ids(prefix + word) == ids(f"{suffix} {word}"):
            return prefix
    return " "


def make_segments(
    examples: Sequence[Example],
    views: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[list[Segment], SegmentCounts]:
    """Tokenise every view of every example.

    A counterfactual view makes one segment for each wrong choice that has a rationale,
    which `BatchPlan` takes in turns.

    A beginning-of-sequence token comes first where the tokenizer adds one to plain
    text (chat templates write their own). An empty prompt becomes that token, or else
    eos, so that every target token has something before it.

    Args:
      examples: from `load_examples`.
      views: names; `Segment.view` indexes them.
      tokenizer: prompt and target go through it without special tokens.
      config: how prompts read, and `max_prompt`, `max_target`, `on_long`,
        `chat_template`. Truncated, a prompt or prefix loses its beginning, a target its
        end, eos included; a target leaves to its prefix what is left of `max_target`.

    Returns:
      Segments ordered by example, then view, then choice; and counts, which are logged
      too.

    Raises:
      ValueError: an example lacks what a view needs, or is too long, or the tokenizer
        does not know a view's prefix.
    """
    _check_prefixes(views, tokenizer, config)
    items = [
        (example, view, text)
        for example in examples
        for view, name in enumerate(views)
        for text in templates.render(example, name, config)
    ]
    segments, counts = _tokenize(items, tuple(views), tokenizer, config)
    return [segment for segment in segments if segment is not None], counts


def choice_segments(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    texts: Sequence[Text] | None = None,
) -> ChoiceSegments:
    """Make a segment of each choice after its prompt, for multiple-choice scoring.

    Two choices may read the same; both are `correct` if they read as the answer. An
    example is left out whole if `on_long="drop"` drops one of its choices.

    Args:
      examples: with choices.
      tokenizer: as in `make_segments`.
      config: as in `make_segments`.
      texts: prompt and prefix of each example; None = those of the label view.

    Raises:
      ValueError: an example without choices, or too long.
    """
    items, index_pairs, correct = [], [], []
    if texts is None:
        texts = [templates.render(e, "label", config)[0] for e in examples]
    for index, (example, text) in enumerate(zip(examples, texts, strict=True)):
        if not example.choices:
            raise ValueError(
                f"example {example.id!r} has no choices to score: use generation"
            )
        for number, choice in enumerate(example.choices):
            items.append((example, 0, text._replace(target=choice)))
            index_pairs.append((index, number))
            correct.append(choice == example.answer)
    segments, _ = _tokenize(items, ("label",), tokenizer, config)
    dropped = {i for s, (i, _) in zip(segments, index_pairs, strict=True) if s is None}
    mask = np.asarray([i not in dropped for i, _ in index_pairs], bool)
    index_N2 = np.asarray(index_pairs, np.int32).reshape(-1, 2)[mask]
    return ChoiceSegments(
        segments=[s for s, keep in zip(segments, mask, strict=True) if s and keep],
        example=index_N2[:, 0],
        choice=index_N2[:, 1],
        correct=np.asarray(correct, bool)[mask],
    )


def prompt_ids(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool = False,
) -> list[list[int]]:
    """Tokenise prompts as segments have them, before any length limit."""
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
    """Return [bos] where the tokenizer puts it before plain text, else []."""
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _check_prefixes(
    views: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> None:
    """Raise ValueError for prompt prefixes that hold an unknown token."""
    for view in views:
        prefix = getattr(config.prefixes, view, "")
        ids = tokenizer.encode(prefix, add_special_tokens=False)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ValueError(
                f"data.prefixes.{view}={prefix!r}: the tokenizer does not know it: use "
                "words of its vocabulary, or add this one to it"
            )


def _tokenize(
    items: list[tuple[Example, int, Text]],
    views: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[list[Segment | None], SegmentCounts]:
    """Make the segments of (example, view, text); None where one was dropped."""
    counts = SegmentCounts()
    if not items:
        return [], counts
    chat = config.chat_template
    prompts = prompt_ids([i[2].prompt for i in items], tokenizer, chat_template=chat)
    joint = target_prefix(tokenizer)
    first = "" if chat else joint  # after the prompt
    prefixes, texts = [], []
    for _, _, text in items:
        prefixes.append(first + text.prefix if text.prefix else "")
        joined = joint if text.prefix else first if text.prompt else ""
        texts.append(joined + text.target)
    encoded = tokenizer(prefixes + texts, add_special_tokens=False)["input_ids"]
    base = fingerprint(tokenizer).encode()
    segments: list[Segment | None] = []
    for (example, view, _), prompt, prefix, target in zip(
        items, prompts, encoded[: len(items)], encoded[len(items) :], strict=True
    ):
        target = [*target, tokenizer.eos_token_id]
        max_prefix = config.max_target - len(target)
        if len(prompt) > config.max_prompt or len(prefix) > max_prefix:
            if config.on_long == "error":
                where = f"example {example.id!r}, view {views[view]!r}"
                raise ValueError(
                    _too_long_message(where, prompt, prefix, target, config)
                )
            if config.on_long == "drop":
                counts.dropped += 1
                segments.append(None)
                continue
            counts.truncated += 1
            prompt = prompt[-config.max_prompt :]
            prefix = prefix[max(0, len(prefix) - max(0, max_prefix)) :]
            target = target[: config.max_target]
        parts = (np.asarray(ids, np.int32) for ids in (prompt, target, prefix))
        prompt_P, target_t, prefix_p = parts
        counts.segments += 1
        counts.prompt_tokens += len(prompt)
        counts.prefix_tokens += len(prefix)
        counts.target_tokens += len(target)
        key = _key(base, prompt_P, target_t, prefix_p)
        prefix_p = prefix_p if prefix else _EMPTY
        segments.append(
            Segment(example.id, view, prompt_P, target_t, key, prefix_p, example.weight)
        )
    logger.info("views %s: %s", views, counts)
    return segments, counts


def _key(
    base: bytes,
    prompt_P: np.ndarray,
    target_t: np.ndarray,
    prefix_p: np.ndarray = _EMPTY,
    loss_mask: np.ndarray | None = None,
) -> bytes:
    """Hash fingerprint, lengths and little-endian ids by blake2b-128.

    With a prefix its length and ids follow those of the prompt. The encoding is
    unambiguous: the first two lengths give the length of content without a prefix.
    A mask of the target comes last, a byte per token, and makes it another hash
    (blake2b's personalisation is "loss mask").
    """
    read = (prompt_P, prefix_p) if len(prefix_p) else (prompt_P,)
    parts = (*read, target_t)
    lengths = np.asarray([len(part) for part in parts], "<i8")
    arrays = (lengths, *(part.astype("<i4") for part in parts))
    content = base + b"".join(array.tobytes() for array in arrays)
    if loss_mask is None:
        return hashlib.blake2b(content, digest_size=16).digest()
    content += loss_mask.astype(np.uint8).tobytes()
    return hashlib.blake2b(content, digest_size=16, person=b"loss mask").digest()


def _too_long_message(
    where: str,
    prompt: list[int],
    prefix: list[int],
    target: list[int],
    config: DataConfig,
) -> str:
    part, length, limit = "prompt", len(prompt), config.max_prompt
    if length <= limit:
        part, length, limit = "target", len(prefix) + len(target), config.max_target
    before = "" if part == "prompt" or not prefix else f" ({len(prefix)} before it)"
    return (
        f"{where}: its {part} has {length} tokens{before}, "
        f"max_{part}={limit}: use max_{part} >= {length}, or on_long='truncate' or "
        "'drop' (both are counted)"
    )
