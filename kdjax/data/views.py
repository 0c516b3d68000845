"""Tokenised views: segments of a prompt and a target.

Prompt and target are tokenised apart and joined, so the boundary never moves. What
joins them is one space, or nothing where the tokenizer adds its own word boundary or a
chat template ends the prompt; see `target_prefix`. A prefix stands between the two and
is joined to both in the same way.
"""

import collections
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from kdjax.config import DataConfig
from kdjax.data import chat_template, templates, think
from kdjax.data.chat import ChatEncoder, ChatTokens
from kdjax.data.example import Example
from kdjax.data.templates import Text
from kdjax.data.tokenizer import TextEncoder, fingerprint

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
    loss_tokens: int = 0  # those of the target tokens that are in the loss
    truncated: int = 0  # segments
    dropped: int = 0  # segments
    without_turn: int = 0  # chats without a turn to learn
    max_id: int = -1  # largest id of a token
    unknown: int = 0  # tokens that stand for what the tokenizer lacks
    # what they stand for, of the first texts with some
    unknown_texts: collections.Counter[str] = field(default_factory=collections.Counter)
    looked_up: int = 0  # texts of `unknown_texts`

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.prompt_tokens + self.prefix_tokens + self.target_tokens

    def __add__(self, other: "SegmentCounts") -> "SegmentCounts":
        """Return the counts of the segments of both."""
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)
        }
        return SegmentCounts(**sums | {"max_id": max(self.max_id, other.max_id)})

    def add(self, segment: Segment) -> None:
        """Count a segment."""
        self.segments += 1
        self.prompt_tokens += len(segment.prompt_ids)
        self.prefix_tokens += len(segment.prefix_ids)
        self.target_tokens += len(segment.target_ids)
        self.loss_tokens += segment.num_loss_tokens
        for ids in (segment.prompt_ids, segment.prefix_ids, segment.target_ids):
            if len(ids):
                self.max_id = max(self.max_id, int(ids.max()))


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
        A chat has `max_prompt` + `max_target` tokens at most; truncated, it loses its
        last turns, or with the loss on one turn its oldest.

    Returns:
      Segments ordered by example, then view, then choice; and counts, which are logged
      too.

    Raises:
      ValueError: an example lacks what a view needs, or is too long, or the tokenizer
        does not know a view's prefix.
    """
    _check_prefixes(views, tokenizer, config)
    if "chat" in views:
        segments, counts = _tokenize_chats(
            examples, views.index("chat"), tokenizer, config
        )
        return [segment for segment in segments if segment is not None], counts
    items = [
        (example, view, text)
        for example in escape(examples, tokenizer, config)
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
    examples = escape(examples, tokenizer, config)
    if texts is None:
        texts = [templates.render(e, "label", config)[0] for e in examples]
    for index, (example, text) in enumerate(zip(examples, texts, strict=True)):
        if not example.choices:
            raise ValueError(
                f"example {example.name} has no choices to score: use generation"
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


def escape(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[Example]:
    """Mark the special tokens in users' texts as text, unless `parse_special`.

    `prompt_ids` and segments read the marks, which most texts do not need.

    Raises:
      ValueError: a text has a character that marks are made of.
    """
    encoder = TextEncoder(tokenizer, parse_special=config.parse_special)
    names = ("question", "choices", "answer", "rationale", "counterfactuals", "text")
    escaped = []
    for example in examples:
        try:
            texts = {name: encoder.escape(getattr(example, name)) for name in names}
        except ValueError as error:
            raise ValueError(f"example {example.name}: {error}") from None
        same = all(text is getattr(example, name) for name, text in texts.items())
        escaped.append(example if same else replace(example, **texts))
    return escaped


def prompt_ids(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[list[int]]:
    """Tokenise prompts as segments have them, before any length limit.

    Args:
      prompts: texts, in which special tokens are tokens, but for those that `escape`
        has marked.
      tokenizer: of the segments.
      config: with `chat_template` each prompt is a user's message.
    """
    if not prompts:
        return []
    encoder = TextEncoder(tokenizer)
    if config.chat_template:
        # Equal prompts (one per choice) are common; templates are slow.
        distinct = [text for text in dict.fromkeys(prompts) if text]
        chats = [[{"role": "user", "content": text}] for text in distinct]
        template = chat_template.load(tokenizer, config)
        rendered = template.render(chats, generation_prompt=True)
        texts = dict(zip(distinct, (chat.text for chat in rendered), strict=True))
        prompts, start = [texts.get(text, "") for text in prompts], []
    else:
        start = _start(tokenizer)
    bos = tokenizer.bos_token_id
    empty = [tokenizer.eos_token_id if bos is None else bos]
    return [(start + ids) or empty for ids in encoder.encode(prompts)]


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
    if chat and any(text.prompt for *_, text in items):
        items = _after_prompts(items, views, tokenizer, config)
    prompts = prompt_ids([i[2].prompt for i in items], tokenizer, config)
    end_id = tokenizer.eos_token_id
    if chat and (turn_end_id := chat_template.load(tokenizer, config).turn_end_id):
        end_id = turn_end_id
    joint = target_prefix(tokenizer)
    first = "" if chat else joint  # after the prompt
    prefixes, texts = [], []
    for _, _, text in items:
        prefixes.append(first + text.prefix if text.prefix else "")
        joined = joint if text.prefix else first if text.prompt else ""
        texts.append(joined + text.target)
    encoded = TextEncoder(tokenizer).encode(prefixes + texts)
    _count_unknown(
        counts,
        tokenizer,
        [*(text.prompt for _, _, text in items), *prefixes, *texts],
        [*prompts, *encoded],
    )
    base = fingerprint(tokenizer).encode()
    segments: list[Segment | None] = []
    for (example, view, _), prompt, prefix, target in zip(
        items, prompts, encoded[: len(items)], encoded[len(items) :], strict=True
    ):
        target = [*target, end_id]
        max_prefix = config.max_target - len(target)
        if len(prompt) > config.max_prompt or len(prefix) > max_prefix:
            if config.on_long == "error":
                where = f"example {example.name}, view {views[view]!r}"
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
        key = content_key(base, prompt_P, target_t, prefix_p)
        prefix_p = prefix_p if prefix else _EMPTY
        segment = Segment(
            example.id, view, prompt_P, target_t, key, prefix_p, example.weight
        )
        counts.add(segment)
        segments.append(segment)
    logger.info("views %s: %s", views, counts)
    return segments, counts


def _after_prompts(
    items: list[tuple[Example, int, Text]],
    views: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> list[tuple[Example, int, Text]]:
    """Return the texts as they follow prompts of the chat template.

    Raises:
      ValueError: the template does not ask for an answer, or it opens reasoning that a
        target does not close.
    """
    template = chat_template.load(tokenizer, config)
    template.check_prompts()
    if not template.asks_for_reasoning:
        return items
    after = []
    for example, view, text in items:
        target = think.after_opening(text.target) if text.prompt else text.target
        if target is None:
            raise ValueError(
                f"example {example.name}, view {views[view]!r}: "
                f"{chat_template.template_file(tokenizer)} asks for reasoning "
                "(<think>), and the target has none: set data.template_kwargs so that "
                "none is asked for, use method.name='chat' with reasoning, or "
                "data.chat_template=False"
            )
        after.append((example, view, text._replace(target=target)))
    return after


def _tokenize_chats(
    examples: Sequence[Example],
    view: int,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[list[Segment | None], SegmentCounts]:
    """Make the segment of each chat; None where one was dropped."""
    counts = SegmentCounts()
    encoder = ChatEncoder(tokenizer, config)
    base = fingerprint(tokenizer).encode()
    chats = list(encoder.examples(examples))
    if config.chat_loss != "each":  # which has more of them
        counts.without_turn += len(examples) - len(chats)
    segments: list[Segment | None] = []
    for example, tokens in zip(chats, encoder(chats), strict=True):
        fitting = _fit_chat(encoder, example, tokens, config)
        if fitting is None:
            counts.dropped += 1
            segments.append(None)
            continue
        counts.truncated += fitting is not tokens
        ids, mask = fitting.ids, fitting.loss_mask
        start = int(mask.argmax())
        prompt_P, target_t, loss_mask = ids[:start], ids[start:], mask[start:]
        masked = None if loss_mask.all() else loss_mask
        segment = Segment(
            example.id,
            view,
            prompt_P,
            target_t,
            content_key(base, prompt_P, target_t, loss_mask=masked),
            weight=example.weight,
            loss_mask=masked,
        )
        counts.add(segment)
        segments.append(segment)
    texts = [" ".join(str(m.get("content")) for m in e.messages) for e in chats]
    id_lists = [[] if s is None else s.ids.tolist() for s in segments]
    _count_unknown(counts, tokenizer, texts, id_lists)
    logger.info("chats: %s", counts)
    return segments, counts


def _fit_chat(
    encoder: ChatEncoder, example: Example, tokens: ChatTokens, config: DataConfig
) -> ChatTokens | None:
    """Return the tokens of a chat within the limits; None if it is dropped.

    Raises:
      ValueError: it is too long, with `on_long="error"`.
    """
    limit, length = config.max_prompt + config.max_target, len(tokens.ids)
    if length <= limit:
        return tokens
    if config.on_long == "error":
        raise ValueError(
            f"example {example.name}: its chat has {length} tokens, max_prompt="
            f"{config.max_prompt} and max_target={config.max_target} make {limit}: "
            "raise one of them, or use on_long='truncate' or 'drop' (both are counted)"
        )
    if config.on_long == "drop":
        return None
    if config.chat_loss == "all":
        return tokens.cut(limit)
    while len(tokens.ids) > limit:
        shorter = encoder.without_oldest(example)
        if shorter is None:
            return None
        example = shorter
        [tokens] = encoder([example])
    return tokens


_NUM_SHOWN = 1000  # texts with unknown tokens in which they are looked up


def _count_unknown(
    counts: SegmentCounts,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
) -> None:
    """Count the unknown tokens of texts, and what they stand for."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    for text, tokens in zip(texts, ids, strict=True):
        number = tokens.count(unknown)
        counts.unknown += number
        if number and tokenizer.is_fast and counts.looked_up < _NUM_SHOWN:
            counts.looked_up += 1
            encoding = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True
            )
            offsets = encoding["offset_mapping"]
            counts.unknown_texts.update(
                text[start:end].strip()
                for token, (start, end) in zip(
                    encoding["input_ids"], offsets, strict=True
                )
                if token == unknown
            )


def check_unknown(
    counts: SegmentCounts, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> None:
    """Check the share of unknown tokens in data.

    Args:
      counts: of all its segments.
      tokenizer: of the segments.
      config: `max_unknown`.

    Raises:
      ValueError: there are more; what they stand for is named.
    """
    share = counts.unknown / max(1, counts.tokens)
    if share <= config.max_unknown:
        return
    common = [repr(text)[:40] for text, _ in counts.unknown_texts.most_common(10)]
    raise ValueError(
        f"tokenizer={tokenizer.name_or_path!r} does not know {share:.1%} of the tokens "
        f"(most often {', '.join(common)}), data.max_unknown={config.max_unknown}: a "
        "student cannot read or write them: use another data.tokenizer, write them "
        "otherwise in the data, or raise data.max_unknown to lose them"
    )


def content_key(
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
