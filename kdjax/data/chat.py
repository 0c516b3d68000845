"""Chats as tokens: messages through the tokenizer's template, assistant turns learnt.

A chat is rendered whole. An assistant's turn begins where the chat before it ends, with
what asks for a turn (`add_generation_prompt`), and ends with the token that ends turns,
which is learnt too. So the template itself says where turns stand; where it marks them
(`{% generation %}`), its marks are taken. A template that writes earlier turns in
another way than it wrote them when they were the last ones is refused.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from kdjax.config import DataConfig
from kdjax.data import chat_template, think
from kdjax.data.chat_template import Beginning, Rendered
from kdjax.data.example import Example
from kdjax.data.tokenizer import TextEncoder

Message = Mapping[str, Any]


class ChatTokens(NamedTuple):
    """The tokens of a chat up to the last one that is learnt."""

    ids: Int32[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]  # True for the tokens of learnt turns
    ends: list[int]  # tokens up to the end of each learnt turn

    def cut(self, num_tokens: int) -> "ChatTokens | None":
        """Return the turns that end within so many tokens; None if none does."""
        ends = [end for end in self.ends if end <= num_tokens]
        if not ends:
            return None
        return ChatTokens(self.ids[: ends[-1]], self.loss_mask[: ends[-1]], ends)


class ChatEncoder:
    """Encoder of chats for one tokenizer and config.

    Args:
      tokenizer: with a chat template.
      config: `template_kwargs`, `template_date`, `chat_loss`, `think`,
        `parse_special` and the length limits.

    Raises:
      ValueError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._template = chat_template.load(tokenizer, config)
        self._encoder = TextEncoder(tokenizer, parse_special=config.parse_special)
        ends = {tokenizer.eos_token_id, self._template.turn_end_id}
        self._turn_ends = frozenset(ends - {None})
        self.asks_for_reasoning = self._template.asks_for_reasoning

    def examples(self, examples: Sequence[Example]) -> Iterator[Example]:
        """Yield the chats to encode, up to the last turn that is learnt.

        With `chat_loss="each"` there is one for each turn. With `on_missing="drop"`
        chats without a turn to learn are left out.

        Raises:
          ValueError: as `learnt_turns`.
        """
        for example in examples:
            try:
                turns = assistant_turns(example)
                if self._config.chat_loss != "each":
                    turns = learnt_turns(example, self._config)[-1:]
            except MissingTurnError:
                if self._config.on_missing == "drop":
                    continue
                raise
            for index in turns:
                chat = dataclasses.replace(
                    example, messages=example.messages[: index + 1]
                )
                if self._config.chat_loss == "each":
                    chat = dataclasses.replace(chat, id=f"{example.id}/{index}")
                    if not self._is_learnt(chat):
                        continue
                yield chat

    def _is_learnt(self, chat: Example) -> bool:
        """Return False for a chat that `on_missing="drop"` leaves out."""
        try:
            learnt_turns(chat, self._config)
        except MissingTurnError:
            if self._config.on_missing == "drop":
                return False
            raise
        return True

    def __call__(self, examples: Sequence[Example]) -> list[ChatTokens]:
        """Encode chats, whatever their lengths.

        Raises:
          ValueError: a chat without what the config needs, that the template refuses,
            or whose turns it does not show; with the example's id.
        """
        turns = [learnt_turns(example, self._config) for example in examples]
        if self._config.chat_loss == "each":  # the last one alone, of `examples`
            turns = [indices[-1:] for indices in turns]
        messages = [self._messages(example) for example in examples]
        rendered = self._template.render(
            messages,
            tools=[self._escape(example, example.tools) for example in examples],
            beginnings=[_beginnings(indices) for indices in turns],
            names=[example.name for example in examples],
        )
        composed = [self._is_composed(chat) for chat in rendered]
        tokens = [
            self._last_turn(example)
            if is_composed
            else self._tokens(example, indices, chat)
            for example, indices, chat, is_composed in zip(
                examples, turns, rendered, composed, strict=True
            )
        ]
        whole = [number for number, part in enumerate(composed) if not part]
        self._check_written(
            [examples[number] for number in whole],
            [messages[number] for number in whole],
            [turns[number] for number in whole],
        )
        return tokens

    def prompt_ids(self, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the ids of messages and of what asks for the assistant's turn."""
        escaped = [[self._encoder.escape(m) for m in messages] for messages in chats]
        rendered = self._template.render(escaped, generation_prompt=True)
        return self._encoder.encode([chat.text for chat in rendered])

    def example_prompt_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the ids before the last learnt turn of each chat."""
        number = [learnt_turns(example, self._config)[-1] for example in examples]
        rendered = self._template.render(
            [
                self._messages(example)[:index]
                for example, index in zip(examples, number, strict=True)
            ],
            tools=[self._escape(example, example.tools) for example in examples],
            generation_prompt=True,
            names=[example.name for example in examples],
        )
        return self._encoder.encode([chat.text for chat in rendered])

    def without_oldest(self, example: Example) -> Example | None:
        """Return a chat without its oldest turns, up to a user's; None if none is left.

        System messages at its beginning stay.
        """
        messages = example.messages
        start = next((i for i, m in enumerate(messages) if m["role"] not in _SYSTEM), 0)
        last = learnt_turns(example, self._config)[-1]
        users = [i for i in range(start + 1, last) if messages[i]["role"] == "user"]
        if not users:
            return None
        rest = (*messages[:start], *messages[users[0] :])
        return dataclasses.replace(example, messages=rest)

    def _messages(self, example: Example) -> list[Message]:
        """Return the messages with their reasoning as the config says, marked."""
        messages = [apply_think(m, self._config.think) for m in example.messages]
        return [self._escape(example, message) for message in messages]

    def _escape(self, example: Example, value: Any) -> Any:
        try:
            return self._encoder.escape(value)
        except ValueError as error:
            raise ValueError(f"example {example.name}: {error}") from None

    def _check_written(
        self,
        examples: Sequence[Example],
        chats: Sequence[Sequence[Message]],
        turns: Sequence[Sequence[int]],
        *,
        generation_prompt: bool = False,
    ) -> None:
        """Check that texts of chats leave out no message, call, tool or reasoning.

        A word is put into each of them, and what has lost its word is not written. What
        a template makes of the content of assistants is not checked; where it fails on
        a word, or writes turns in another way, it has read it.

        Args:
          examples: of the chats, with their tools.
          chats: messages of each.
          turns: of each chat that are learnt, which have their calls and reasoning.
          generation_prompt: what asks for the assistant's turn ends the texts.

        Raises:
          ValueError: one leaves out something.
        """
        marked = [
            _mark(chat, self._escape(example, example.tools), indices)
            for example, chat, indices in zip(examples, chats, turns, strict=True)
        ]
        in_turns = [
            indices if any(mark.turn is not None for mark in chat.marks) else ()
            for chat, indices in zip(marked, turns, strict=True)
        ]
        rendered = self._template.render_or_none(
            [chat.messages for chat in marked],
            tools=[chat.tools for chat in marked],
            generation_prompt=generation_prompt,
            beginnings=[_beginnings(indices) for indices in in_turns],
        )
        for example, chat, indices, result in zip(
            examples, marked, in_turns, rendered, strict=True
        ):
            try:
                spans = self._spans(example, indices, result) if result else []
            except ValueError:  # not so without the words
                result = None
            if result is None:
                continue
            texts: dict[int | None, str] = {None: result.text}
            for index, (start, stop) in zip(indices, spans, strict=True):
                texts[index] = result.text[start:stop]
            for mark in chat.marks:
                if mark.word not in texts[mark.turn].lower():
                    raise ValueError(
                        f"example {example.name}: {self._file()} does not write "
                        f"{mark.lost}"
                    )

    def _is_composed(self, rendered: Rendered) -> bool:
        """Return True if the one turn is not written after what asks for it.

        Templates of models that reason end what asks for a turn with <think>, and take
        the reasoning out of every message, the last one included.
        """
        common, length = rendered.beginnings[-2]
        return self._config.chat_loss != "all" and common < length

    def _last_turn(self, example: Example) -> ChatTokens:
        """Encode the messages before the last learnt one, and its content."""
        index = learnt_turns(example, self._config)[-1]
        messages = self._messages(example)
        [before] = self._template.render(
            [messages[:index]],
            tools=[self._escape(example, example.tools)],
            generation_prompt=True,
            names=[example.name],
        )
        self._check_written([example], [messages[:index]], [()], generation_prompt=True)
        content = messages[index].get("content")
        if not isinstance(content, str) or messages[index].get("tool_calls"):
            raise ValueError(
                f"example {example.name}: {self._file()} does not write message "
                f"{index} after what asks for it, and it is more than a text: use "
                "another template"
            )
        reasoning = messages[index].get("reasoning_content")
        if reasoning:
            content = think.join_think(reasoning, content)
        if before.text.rstrip().endswith(think.OPEN):
            content = think.after_opening(content)
            if content is None:
                raise ValueError(
                    f"example {example.name}: {self._file()} asks for reasoning "
                    f"(<think>), and message {index} has none: give it "
                    "reasoning_content, leave it out of the data, or set "
                    "data.template_kwargs so that none is asked for"
                )
        end = self._template.turn_end_id
        end = self._tokenizer.eos_token_id if end is None else end
        text = before.text + content
        borders = [len(before.text), len(text)]
        ids, (start, _) = self._encode(example, text, borders)
        ids_n = np.asarray([*ids, end], np.int32)
        return ChatTokens(ids_n, np.arange(len(ids_n)) >= start, [len(ids_n)])

    def _encode(
        self, example: Example, text: str, borders: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        try:
            return self._encoder.encode_with_ends(text, borders)
        except ValueError as error:
            raise ValueError(f"example {example.name}: {error}") from None

    def _tokens(
        self, example: Example, turns: Sequence[int], rendered: Rendered
    ) -> ChatTokens:
        """Find the tokens of the learnt turns of a rendered chat."""
        spans = self._spans(example, turns, rendered)
        borders = [border for span in spans for border in span]
        ids, ends = self._encode(example, rendered.text, borders)
        mask = np.zeros(len(ids) + 1, bool)
        stops = []
        for number, (start, stop) in enumerate(zip(ends[::2], ends[1::2], strict=True)):
            end = self._turn_end(ids, start, stop)
            if end is None and stop == len(ids):
                ids, end = [*ids, self._tokenizer.eos_token_id], stop + 1
            if end is None:
                raise ValueError(
                    f"example {example.name}: {self._file()} writes no token that ends "
                    f"message {turns[number]}, so that a student would not learn to "
                    "stop: use data.chat_loss='last', or a template with one"
                )
            mask[start:end] = True
            stops.append(end)
        length = stops[-1]
        return ChatTokens(np.asarray(ids[:length], np.int32), mask[:length], stops)

    def _spans(
        self, example: Example, turns: Sequence[int], rendered: Rendered
    ) -> list[tuple[int, int]]:
        """Return the characters of each learnt turn, checked against the beginnings."""
        text, marks = rendered.text, rendered.spans
        assistant = [
            i for i, m in enumerate(example.messages) if m["role"] == "assistant"
        ]
        if marks and len(marks) != len(assistant):
            raise ValueError(
                f"example {example.name}: {self._file()} marks {len(marks)} turns of "
                f"{len(assistant)} of the assistant: repair its generation blocks"
            )
        spans = []
        pairs = zip(rendered.beginnings[::2], rendered.beginnings[1::2], strict=True)
        for index, ((common, start), (stop, length)) in zip(turns, pairs, strict=True):
            if stop < length:  # what ends a chat, not a turn, differs
                stop = self._last_end(text, start, stop)
            if common < start or stop <= start:
                raise ValueError(
                    f"example {example.name}: {self._file()} writes message {index} of "
                    "the assistant, or what is before it, in another way than in its "
                    "own turn, when nothing follows: use data.chat_loss='last', or "
                    "'each' for every turn as the last one of a chat of its own"
                )
            if marks:
                mark_start, mark_stop = marks[assistant.index(index)]
                start = max(start, mark_start)
                stop = min(stop, self._with_end(text, mark_stop))
            spans.append((start, stop))
        return spans

    def _last_end(self, text: str, start: int, stop: int) -> int:
        """Return where the last token that ends turns ends in a part of a text."""
        ends = [
            place + len(token)
            for token in self._end_texts()
            if (place := text.rfind(token, start, stop)) >= 0
        ]
        return max(ends, default=start)

    def _with_end(self, text: str, stop: int) -> int:
        """Return the end of a marked turn with the token that ends turns after it."""
        for token in self._end_texts():
            after = text[stop:].lstrip() if not text[:stop].endswith(token) else ""
            if after.startswith(token):
                return len(text) - len(after) + len(token)
        return stop

    def _end_texts(self) -> list[str]:
        tokens = self._tokenizer.convert_ids_to_tokens(sorted(self._turn_ends))
        return [str(token) for token in tokens]

    def _turn_end(self, ids: Sequence[int], start: int, stop: int) -> int | None:
        """Return one past the first token that ends the turn; None if none does.

        What follows it in the turn is white space, and tokens that end turns again.
        """
        end = None
        for place in range(stop - 1, start - 1, -1):
            if ids[place] in self._turn_ends:
                end = place + 1
            elif str(self._tokenizer.decode([ids[place]])).strip():
                break
        return end

    def _file(self) -> str:
        return chat_template.template_file(self._tokenizer)


class _Mark(NamedTuple):
    """A word in a chat, which a template writes if it writes what has the word."""

    word: str
    lost: str  # what has the word, and the remedy where it is not written
    turn: int | None = None  # message in whose turn it is to be written


class _Marked(NamedTuple):
    """A chat with marks."""

    messages: Sequence[Message]
    tools: Sequence[Any]
    marks: list[_Mark]


def _mark(
    messages: Sequence[Message], tools: Sequence[Any], turns: Sequence[int]
) -> _Marked:
    """Put marks into the tools, calls and contents of a chat, and learnt reasoning."""
    marks: list[_Mark] = []

    def new(lost: str, turn: int | None = None) -> str:
        marks.append(_Mark(f"kdjax{len(marks)}mark", lost, turn))
        return marks[-1].word

    remedy = "use a template that does, or data without it"
    without = f"{remedy} (data.columns='tools=' leaves the column out)"
    marked_tools = [
        _with_word(tool, new(f"the tool {_name(tool)!r}: {without}")) for tool in tools
    ]
    marked = []
    for index, message in enumerate(messages):
        changed = dict(message)
        turn = index if index in turns else None
        where = f"of message {index}" + (" in its turn" if turn is not None else "")
        content = message.get("content")
        if message["role"] == "assistant":
            thought = message.get("reasoning_content")
            if turn is not None and isinstance(thought, str) and thought.strip():
                lost = (
                    f"the reasoning_content {where}: write it into the content as "
                    "<think>...</think>, use data.think='strip', or another template"
                )
                changed["reasoning_content"] = _with_word(thought, new(lost, turn))
        elif isinstance(content, str) and content.strip():
            lost = f"message {index}, of the role {message['role']!r}: {remedy}"
            changed["content"] = _with_word(content, new(lost))
        if calls := message.get("tool_calls"):
            lost = f"the tool calls {where}: {remedy}"
            changed["tool_calls"] = [_with_word(c, new(lost, turn)) for c in calls]
        marked.append(changed)
    return _Marked(marked, marked_tools, marks)


def _with_word(value: Any, word: str) -> Any:
    """Return a text with a word in it; or a tool, or a call of one.

    A call has it in its name and arguments: some templates write an id for the name.
    """
    if isinstance(value, str):
        place = min(len(value) // 2, 20)  # a template may cut long ones
        return value[:place] + word + value[place:]
    if not isinstance(value, Mapping):
        return value
    if value.get("function"):
        return {**value, "function": _with_word(value["function"], word)}
    changed = {**value, "name": _with_word(_name(value), word)}
    arguments = value.get("arguments")
    if isinstance(arguments, str):
        changed["arguments"] = _with_word(arguments, word)
    elif isinstance(arguments, Mapping):
        changed["arguments"] = {**arguments, word: word}
    return changed


def _name(value: Any) -> str:
    """Return the name of a tool, or of a tool that is called; "" for other forms."""
    function = value.get("function") or value if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _beginnings(turns: Sequence[int]) -> list[Beginning]:
    """Return the beginnings of a chat that end before its turns, and after them."""
    return [
        beginning
        for index in turns
        for beginning in (Beginning(index, True), Beginning(index + 1, False))
    ]


class MissingTurnError(ValueError):
    """A chat without a turn to learn; `data.on_missing` says what becomes of it."""


_SYSTEM = ("system", "developer")


def assistant_turns(example: Example) -> list[int]:
    """Return the indices of the assistant's messages, without those of weight 0.

    Raises:
      ValueError: there is none, or a message without what it needs.
    """
    turns = []
    for index, message in enumerate(example.messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"example {example.name}: message {index} is {str(message)[:80]!r}: "
                "give it a role and a content"
            )
        weight = message.get("weight", 1)
        if weight not in (0, 1, None):
            raise ValueError(
                f"example {example.name}: message {index} has weight={weight!r}: use "
                "1, or 0 for a turn that is not learnt"
            )
        if message["role"] == "assistant" and weight != 0:
            turns.append(index)
    if not turns:
        raise MissingTurnError(
            f"example {example.name} has no message of the assistant to learn: give it "
            "one, or leave it out (data.on_missing='drop')"
        )
    return turns


def learnt_turns(example: Example, config: DataConfig) -> list[int]:
    """Return the indices of the messages that are learnt.

    These are all `assistant_turns`, or the last one with `chat_loss="last"`.

    Raises:
      ValueError: as `assistant_turns`, or one ends within its reasoning, or there is no
        reasoning where the config needs it.
    """
    turns = assistant_turns(example)
    for index in turns if config.chat_loss == "all" else turns[-1:]:
        message = example.messages[index]
        if is_cut_off(message, config.think):
            raise MissingTurnError(
                f"example {example.name}: message {index} of the assistant ends within "
                "its reasoning, as of a model that was cut off: write it to its end, "
                "leave it out (data.on_missing='drop'), or give it weight 0"
            )
        if config.think == "require" and not has_reasoning(message):
            raise MissingTurnError(
                f"example {example.name}: message {index} of the assistant has no "
                "<think>...</think>, which data.think='require' needs: leave it "
                "out (data.on_missing='drop'), or use 'keep'"
            )
    return turns[-1:] if config.chat_loss == "last" else turns


def has_reasoning(message: Message) -> bool:
    """Return True if an assistant's message has reasoning."""
    content = message.get("content")
    if message.get("reasoning_content"):
        return True
    return isinstance(content, str) and think.has_think(content)


def is_cut_off(message: Message, policy: str) -> bool:
    """Return True if an assistant's message ends within its reasoning.

    It opens reasoning and never closes it, or nothing follows its `reasoning_content`;
    or, where the policy is not "keep", the reasoning in its content.
    """
    content = message.get("content") or ""
    if message.get("tool_calls") or not isinstance(content, str):
        return False
    if think.is_cut_off(content, anywhere=policy == "strip"):
        return True
    apart = message.get("reasoning_content")
    reasons = apart if policy == "keep" else has_reasoning(message)
    return bool(reasons) and not think.strip_think(content).strip()


def apply_think(message: Message, policy: str) -> Message:
    """Return an assistant's message without its reasoning if the policy is "strip"."""
    if policy != "strip" or message["role"] != "assistant":
        return message
    rest = {k: v for k, v in message.items() if k != "reasoning_content"}
    content = rest.get("content")
    if isinstance(content, str):
        rest["content"] = think.strip_think(content)
    return rest
