"""A tokenizer's chat template, rendered in a process with bounded resources."""

import contextlib
import functools
import json
import os
import pathlib
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from kdjax.config import DataConfig
from kdjax.data import templates
from kdjax.data.think import OPEN

SECONDS = 20.0  # longest time for the texts of one request
MAX_CHARS = 2**24  # longest text
_NUM_CHATS = 64  # of one request
_QUESTION, _ANSWER = "Hello", "Goodbye"
_CHAT = (
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": _ANSWER},
)
_SCRIPT = pathlib.Path(__file__).with_name("template_process.py")


class Beginning(NamedTuple):
    """The first messages of a chat, which are rendered by themselves too."""

    num_messages: int
    generation_prompt: bool  # what asks for the assistant's turn comes after them


class Rendered(NamedTuple):
    """A chat as text."""

    text: str
    spans: list[tuple[int, int]]  # of the template's generation blocks, characters
    # For each beginning, the characters that its text has in common with `text`, and
    # all its characters: equal where it is the beginning of the text.
    beginnings: list[tuple[int, int]]


class ChatTemplate:
    """The chat template of a tokenizer, with the variables and the date of a config.

    Args:
      tokenizer: with a template.
      config: `template_kwargs` and `template_date`.

    Raises:
      ValueError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "data.chat_template=True, or method.name='chat': the tokenizer has no "
                "chat template: use False and another method, or put a "
                f"chat_template.jinja into {tokenizer.name_or_path or 'its folder'}"
            )
        self._tokenizer, self._date = tokenizer, config.template_date
        special = {
            name: token
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        }
        self._variables = special | templates.variables(config)

    def render(
        self,
        chats: Sequence[Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        generation_prompt: bool = False,
        beginnings: Sequence[Sequence[Beginning]] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Rendered]:
        """Render chats.

        Args:
          chats: the messages of each; keys whose value is None are left out.
          tools: of each chat; None = none.
          generation_prompt: what asks for the assistant's turn ends the texts.
          beginnings: of each chat; None = none.
          names: of the chats, for errors.

        Raises:
          ValueError: the template fails, or needs more than it may; with its file, and
            the chat's name.
        """
        requests = self._requests(chats, tools, generation_prompt, beginnings)
        results: list[Rendered] = []
        for number, result in enumerate(self._rendered(requests)):
            if isinstance(result, str):
                where = f"example {names[number]}: " if names else ""
                raise ValueError(
                    f"{where}{template_file(self._tokenizer)} fails: {result}: "
                    f"{self._remedy(requests[number])}"
                )
            results.append(result)
        return results

    def render_or_none(
        self,
        chats: Sequence[Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        generation_prompt: bool = False,
        beginnings: Sequence[Sequence[Beginning]] | None = None,
    ) -> list[Rendered | None]:
        """Render chats, as `render`; None where the template fails."""
        requests = self._requests(chats, tools, generation_prompt, beginnings)
        results = self._rendered(requests)
        return [None if isinstance(result, str) else result for result in results]

    def _requests(
        self,
        chats: Sequence[Sequence[Mapping[str, Any]]],
        tools: Sequence[Sequence[Mapping[str, Any]]] | None,
        generation_prompt: bool,
        beginnings: Sequence[Sequence[Beginning]] | None,
    ) -> list[dict[str, Any]]:
        """Make what the process is asked for, of each chat."""
        return [
            {
                "messages": [_without_none(message) for message in chat],
                "tools": list(tools[number]) or None if tools else None,
                "generation_prompt": generation_prompt,
                "kwargs": self._variables,
                "beginnings": list(beginnings[number]) if beginnings else [],
            }
            for number, chat in enumerate(chats)
        ]

    def _rendered(self, requests: list[dict[str, Any]]) -> Iterator[Rendered | str]:
        """Yield the answers of the process, or its error in one line."""
        for start in range(0, len(requests), _NUM_CHATS):
            for answer in self._answers(requests[start : start + _NUM_CHATS]):
                if error := answer.get("error"):
                    yield " ".join(error.split())[:300]
                    continue
                beginning = [tuple(lengths) for lengths in answer["beginnings"]]
                spans = [tuple(span) for span in answer["spans"]]
                yield Rendered(answer["text"], spans, beginning)

    def _remedy(self, request: dict[str, Any]) -> str:
        """Return what helps where the template fails: what it does not fail without."""
        messages, lacking = _with_arguments(request["messages"])
        if lacking and self._takes(request | {"messages": messages}):
            return f"{lacking} without arguments: give it some, {{}} for none"
        started = [begin for begin in request["beginnings"] if begin.num_messages]
        changed = request | {"beginnings": started}
        if started != request["beginnings"] and self._takes(changed):
            return (
                "the chat begins with the assistant, and the template does not ask for "
                "a turn before any message: give it a user's message first, or have "
                "that turn read and not learnt (its weight 0, or data.chat_loss='last')"
            )
        return "repair the template or the messages that it does not take"

    def _takes(self, request: dict[str, Any]) -> bool:
        return "error" not in self._answers([request])[0]

    def check_prompts(self) -> None:
        """Check that a user's message is followed by what asks for an answer.

        Some templates write nothing there, and answers right after the message.

        Raises:
          ValueError: the template writes it before answers, and not in prompts.
        """
        [asked] = self.render([_CHAT[:1]], generation_prompt=True)
        [alone] = self.render([_CHAT[:1]])
        [whole] = self.render([_CHAT])
        end = asked.text.partition(_QUESTION)[2]
        between = whole.text.partition(_QUESTION)[2].partition(_ANSWER)[0]
        if asked.text == alone.text and between.removeprefix(end).strip():
            raise ValueError(
                f"{template_file(self._tokenizer)} ignores add_generation_prompt: "
                "prompts would end without what begins an answer: write it there "
                "under {% if add_generation_prompt %}, or use data.chat_template=False"
            )

    @functools.cached_property
    def asks_for_reasoning(self) -> bool:
        """True if what asks for the assistant's turn opens its reasoning."""
        [rendered] = self.render([_CHAT[:1]], generation_prompt=True)
        return rendered.text.rstrip().endswith(OPEN)

    @functools.cached_property
    def turn_end_id(self) -> int | None:
        """Id of the token that ends an assistant's turn; None where no token does."""
        [rendered] = self.render([_CHAT])
        after = rendered.text.rpartition(_ANSWER)[2]
        ids = self._tokenizer.encode(after.lstrip(), add_special_tokens=False)
        added = self._tokenizer.added_tokens_decoder
        return ids[0] if ids and ids[0] in added else None

    def _answers(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Ask the process of each template for its chats, in their order."""
        results: dict[int, dict[str, Any]] = {}
        by_template: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            # A tokenizer may have another template for chats with tools.
            source = self._tokenizer.get_chat_template(tools=request["tools"])
            by_template.setdefault(source, []).append(number)
        for source, numbers in by_template.items():
            process = _process(source, self._date, SECONDS, os.getpid())
            answers = process([requests[number] for number in numbers])
            results |= zip(numbers, answers, strict=True)
        return [results[number] for number in range(len(requests))]


@functools.lru_cache(maxsize=8)
def for_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kwargs: tuple[str, ...], date: str, source: str
) -> ChatTemplate:
    """Return the template of a tokenizer, the same one for the same arguments."""
    config = DataConfig(template_kwargs=kwargs, template_date=date)
    return ChatTemplate(tokenizer, config)


def load(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> ChatTemplate:
    """Return the chat template of a tokenizer under a config."""
    source = json.dumps(tokenizer.chat_template)
    return for_tokenizer(
        tokenizer, config.template_kwargs, config.template_date, source
    )


def template_file(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return where a tokenizer's chat template stands, for errors."""
    folder = pathlib.Path(tokenizer.name_or_path or "")
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        if tokenizer.name_or_path and (folder / name).is_file():
            return str(folder / name)
    return f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def _with_arguments(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], str]:
    """Return messages whose tool calls all have arguments, and the first that lacks."""
    lacking = ""
    changed = []
    for index, message in enumerate(messages):
        calls = []
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if isinstance(function, Mapping) and "arguments" not in function:
                lacking = lacking or f"message {index} calls {function.get('name')!r}"
                function = {**function, "arguments": {}}
                call = (
                    {**call, "function": function} if "function" in call else function
                )
            calls.append(call)
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed, lacking


class _Process:
    """A process of `template_process`, which renders one template."""

    def __init__(self, source: str, date: str, seconds: float) -> None:
        self._seconds, self._lock = seconds, threading.Lock()
        self._settings = {
            "template": source,
            "date": date,
            "seconds": seconds,
            "max_chars": MAX_CHARS,
        }
        self._popen: subprocess.Popen[bytes] | None = None

    def __call__(self, chats: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Render chats; one object for each, of `template_process.answer`."""
        line = json.dumps(chats, default=str)  # dates and such, as templates print them
        with self._lock:
            if self._popen is None:
                self._start()
            try:
                self._write(line)
                answers = self._read()
            except (OSError, TimeoutError) as error:
                reason = str(error) if isinstance(error, TimeoutError) else ""
                self._close()
                failure = {"error": reason or "its process ended, out of memory"}
                return [failure] * len(chats)
        return json.loads(answers)

    def _close(self) -> None:
        self._finalizer()
        self._popen = None

    def _start(self) -> None:
        # -P: the folder of the script is not searched for modules.
        self._popen = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        # Also where this process ends, or the template is no longer remembered.
        self._finalizer = weakref.finalize(self, _end, self._popen)
        self._rest = b""
        self._write(json.dumps(self._settings))

    def _write(self, text: str) -> None:
        assert self._popen is not None and self._popen.stdin is not None
        line = memoryview(text.encode() + b"\n")
        while line:
            line = line[self._popen.stdin.write(line) :]

    def _read(self) -> bytes:
        """Read a line; the process answers in its time, or is blocked.

        Raises:
          TimeoutError: it did not.
        """
        assert self._popen is not None and self._popen.stdout is not None
        file = self._popen.stdout.fileno()
        pieces = [self._rest]
        while b"\n" not in pieces[-1]:
            poll = select.poll()
            poll.register(file, select.POLLIN)
            if not poll.poll((self._seconds + 10) * 1000):
                raise TimeoutError(f"it runs for more than {self._seconds:g} s")
            piece = os.read(file, 2**16)
            if not piece:
                raise OSError("end of file")
            pieces.append(piece)
        line, _, self._rest = b"".join(pieces).partition(b"\n")
        return line


def _end(popen: subprocess.Popen[bytes]) -> None:
    popen.kill()
    for stream in (popen.stdin, popen.stdout):
        with contextlib.suppress(OSError):
            assert stream is not None
            stream.close()
    popen.wait()


@functools.lru_cache(maxsize=8)
def _process(source: str, date: str, seconds: float, pid: int) -> _Process:
    """Return the process of a template; each process of ours has its own."""
    return _Process(source, date, seconds)
