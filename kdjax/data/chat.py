"""Chats as tokens: messages through the tokenizer's template, assistant turns learnt.

A chat is rendered whole. An assistant's turn begins where the chat before it ends, with
what asks for a turn (`add_generation_prompt`), and ends with the token that ends turns,
which is learnt too. So the template itself says where turns stand; where it marks them
(`{% generation %}`), its marks are taken. A template that writes earlier turns in
another way than it wrote them when they were the last ones is refused.
"""

import dataclasses
import json
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
        rendered = self._template.render(
            [self._messages(example) for example in examples],
            tools=[self._encoder.escape(example.tools) for example in examples],
            beginnings=[
                [
                    beginning
                    for index in indices
                    for beginning in (
                        Beginning(index, True),
                        Beginning(index + 1, False),
                    )
                ]
                for indices in turns
            ],
            names=[example.name for example in examples],
        )
        return [
            self._last_turn(example)
            if self._is_composed(indices, chat)
            else self._tokens(example, indices, chat)
            for example, indices, chat in zip(examples, turns, rendered, strict=True)
        ]

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
            tools=[self._encoder.escape(example.tools) for example in examples],
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
        return [self._encoder.escape(message) for message in messages]

    def _check_written(self, example: Example, text: str, num_messages: int) -> None:
        """Check that the text of a chat leaves out no message, call or tool.

        What a template makes of the assistant's own texts is not checked.

        Raises:
          ValueError: it does.
        """
        lost = next((t for t in example.tools if not _is_written(t, text)), None)
        what = "" if lost is None else f"the tool {_function_name(lost)!r}"
        for index, message in enumerate(self._messages(example)[:num_messages]):
            calls = message.get("tool_calls") or ()
            if not all(_is_written(call, text) for call in calls):
                what = f"the tool calls of message {index}"
            content = message.get("content")
            if message["role"] != "assistant" and isinstance(content, str):
                content = content.strip()
                if content not in text and not _is_quoted(content, text):
                    what = f"message {index}, of the role {message['role']!r}"
        if what:
            raise ValueError(
                f"example {example.name}: {self._file()} does not write {what}: use a "
                "template that does, or data without it"
            )

    def _is_composed(self, turns: Sequence[int], rendered: Rendered) -> bool:
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
            tools=[self._encoder.escape(example.tools)],
            generation_prompt=True,
            names=[example.name],
        )
        self._check_written(example, before.text, index)
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
            content = content.lstrip().removeprefix(think.OPEN).lstrip()
            if think.CLOSE not in content:
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
        self._check_written(example, rendered.text, len(example.messages))
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
        messages = example.messages
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
            calls = messages[index].get("tool_calls") or ()
            if not all(_is_written(call, text[start:stop]) for call in calls):
                raise ValueError(
                    f"example {example.name}: {self._file()} does not write the tool "
                    f"calls of message {index} in its turn: use a template that does, "
                    "or data without them"
                )
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


def _function_name(value: Any) -> str:
    """Return the name of a tool, or of a tool that is called; "" for other forms."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _is_written(value: Any, text: str) -> bool:
    """Return True if a text has the name of a tool, or of a tool that is called."""
    return _function_name(value) in text


def _is_quoted(content: str, text: str) -> bool:
    """Return True if a text has a content as JSON has it between quotes."""
    return any(
        json.dumps(content, ensure_ascii=is_ascii)[1:-1] in text
        for is_ascii in (True, False)
    )


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
      ValueError: as `assistant_turns`, or there is no reasoning where the config needs
        it.
    """
    turns = assistant_turns(example)
    if config.think == "require":
        for index in turns if config.chat_loss == "all" else turns[-1:]:
            if not has_reasoning(example.messages[index]):
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


def apply_think(message: Message, policy: str) -> Message:
    """Return an assistant's message without its reasoning if the policy is "strip"."""
    if policy != "strip" or message["role"] != "assistant":
        return message
    rest = {k: v for k, v in message.items() if k != "reasoning_content"}
    content = rest.get("content")
    if isinstance(content, str):
        rest["content"] = think.strip_think(content)
    return rest
