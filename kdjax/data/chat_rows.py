"""Chats of rows: their messages in the forms people have, checked, and their tools."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdjax.data.columns import Fields, check_text, is_missing, show
from kdjax.data.readers import ClassName, kind_of, parse_json

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {  # of ShareGPT -> roles
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")  # one of them
# Beside role and content, what a turn of ShareGPT may have.
_MEMBERS = ("weight", "name", "tool_calls", "tool_call_id", *_REASONING)
# Members of turns that would be lost -> what to write instead.
_UNREAD = {
    "function_call": "write it as tool_calls",
    **dict.fromkeys(("tools", "functions"), "give them in a column tools"),
    **dict.fromkeys(("image", "images", "audio", "video"), "texts alone are read"),
}
# Members that say of an assistant's turn whether it is learnt -> what means that it is.
_IS_LEARNT = {"train": 1, "trainable": 1, "training": 1, "loss": 1, "mask": 0}
# Columns that may be the reply to messages that end with a user's.
_REPLIES = ("response", "completion", "output", "answer", "reply", "target", "chosen")
_SHORT = 20  # characters of a prompt that a reply may begin with by chance
_PREAMBLES: tuple[list[str], ...] = ([], ["system"], ["developer"])


def from_sharegpt(fields: Fields, value: list[Any], name: str) -> list[Any]:
    """Return turns {from, value} as messages; those of a role stay."""
    messages: list[Any] = []
    for number, turn in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(turn, Mapping):
            raise fields.error(
                f"{where} is {kind_of(turn)}, not an object: give from and value"
            )
        if "role" in turn:
            messages.append(turn)
            continue
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise fields.error(
                f"{where} is from {show(speaker)}: known are {list(_SPEAKERS)}"
            )
        members = (*_MEMBERS, *_UNREAD, *_IS_LEARNT)
        rest = {n: v for n, v in turn.items() if n in members}
        role = _SPEAKERS[speaker]
        messages.append({"role": role, "content": turn.get("value"), **rest})
    return messages


def parse_text(fields: Fields, value: Any, name: str) -> Any:
    """Return the messages of a text that has some.

    They are JSON, as in a cell of a table, or "Human: ... Assistant: ...".
    """
    if not isinstance(value, str):
        return value
    if re.match(r"\s*\[\s*\{\s*\"(role|content)\"", value):
        return fields.as_list(value, name)
    parts = re.split(r"\n\n(Human|Assistant):", value)
    if parts[0].strip() or "Assistant" not in parts[1::2]:
        return value
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    messages = [{"role": roles[who], "content": text.strip()} for who, text in turns]
    while messages and not messages[-1]["content"]:  # what asks for the next turn
        messages.pop()
    return messages


def check_reply(fields: Fields, name: str, question: str, answer: str) -> None:
    """Raise ValueError for a reply that repeats its prompt, or names a column."""
    if len(question) > _SHORT and answer.startswith(question):
        raise fields.error(
            f"{name} begins with the prompt: give the reply alone, or say by "
            "data.schema='preference' that it is one"
        )
    text = fields.values.get(answer)
    if isinstance(text, str) and " " in text.strip():
        raise fields.error(
            f"{name}={answer!r} is the name of a column: say data.columns={name}="
            "COLUMN, of the reply's text"
        )


def as_read(message: Message) -> Message:
    """Return a message of a prompt: the assistant's are not learnt."""
    is_learnt = message["role"] == "assistant" and "weight" not in message
    return {**message, "weight": 0} if is_learnt else message


def check_ends(fields: Fields, messages: list[Message], name: str) -> None:
    """Raise ValueError for a chat whose beginning or end stands in other columns."""
    roles = [m["role"] for m in messages if m["role"] not in ("system", "developer")]
    if not roles or name not in ("messages", "conversations"):
        return
    lost = ""
    if roles[-1] != "assistant":
        lost = next((other for other in _REPLIES if fields.has(other)), "")
    if roles[0] == "assistant" and fields.has("prompt"):
        lost = "prompt"
    if lost:
        raise fields.error(
            f"{name} seems to go with the column {lost}: put it into the messages, or "
            "give both as prompt and completion"
        )


def without_prompt(turns: list[Message], prompt: list[Message]) -> list[Message] | None:
    """Return the turns after a prompt that they repeat; None if they do not.

    An own system turn may come before it.
    """
    start = turns
    if turns and turns[0]["role"] == "system" and prompt[:1] != turns[:1]:
        start = turns[1:]
    is_repeated = start[: len(prompt)] == prompt
    return start[len(prompt) :] if is_repeated else None


def is_reply(message: Message) -> bool:
    """Return True for an assistant's message that says or calls something."""
    is_empty = is_missing(message["content"]) and not message.get("tool_calls")
    return message["role"] == "assistant" and not is_empty


def check_turns(fields: Fields, turns: list[Any], name: str) -> list[Message]:
    """Check the turns of a chat; [] for one that has an empty turn and is left out."""
    messages = [_message(fields, turn, f"{name}[{i}]") for i, turn in enumerate(turns)]
    return [] if None in messages else [m for m in messages if m is not None]


def _message(fields: Fields, value: Any, where: str) -> dict[str, Any] | None:
    """Check a turn of a chat; what is null in it is left out.

    Returns:
      The turn; None if it is empty, and the chat is to be left out.
    """
    if not isinstance(value, Mapping):
        raise fields.error(f"{where} is {kind_of(value)}, not an object: give a role")
    message = {name: v for name, v in value.items() if v is not None}
    role, content = message.get("role"), message.get("content")
    if isinstance(role, ClassName):
        role = str(role)
    if role not in ROLES:
        raise fields.error(f"{where} has the role {show(role)}: use one of {ROLES}")
    calls = message.get("tool_calls")
    for name, remedy in _UNREAD.items():
        if message.get(name):
            raise fields.error(
                f"{where}.{name}={show(message[name])} would be lost: {remedy}"
            )
    for name, value in _IS_LEARNT.items():
        is_other = name in message and bool(message[name]) != bool(value)
        if is_other and role == "assistant" and "weight" not in message:
            raise fields.error(
                f"{where}.{name}={show(message[name])} would be lost: say by weight, 1 "
                "or 0, what is learnt"
            )
    for name in _REASONING[1:]:
        reasoning = message.pop(name, None)
        if isinstance(reasoning, str) and not message.get("reasoning_content"):
            message["reasoning_content"] = reasoning
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in message:
            text = fields.as_text(message[name], f"{where}.{name}", number=True)
            message[name] = text
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise fields.error(
            f"{where}.weight={show(weight)}: use 1, or 0 for a turn that is not learnt"
        )
    if isinstance(content, list):
        content = _join_parts(fields, content, where)
    if is_missing(content) and role == "assistant" and calls:
        content = content or ""
    elif is_missing(content) and role != "tool":
        remedy = "give each turn a text, or leave the turn out"
        fields.require(f"{where}.content", content, remedy)
        return None
    content = "" if content is None else fields.as_text(content, f"{where}.content")
    message |= {"role": role, "content": content}
    if not calls:
        message.pop("tool_calls", None)
    else:
        calls = fields.as_list(calls, f"{where}.tool_calls")
        message["tool_calls"] = [_tool_call(fields, call, where) for call in calls]
        _check_json(fields, message["tool_calls"], f"{where}.tool_calls")
    return message


def _join_parts(fields: Fields, parts: list[Any], where: str) -> str:
    """Join the parts of a content, which must be texts."""
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type", "text") == "text":
            texts.append(fields.as_text(part.get("text"), f"{where}.content"))
        else:
            raise fields.error(
                f"{where}.content has the part {show(part)}: only parts of the type "
                "'text' are read"
            )
    return "".join(texts)


def _tool_call(fields: Fields, call: Any, where: str) -> dict[str, Any]:
    """Check a call of a tool; arguments that are the text of an object become it."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise fields.error(
            f"{where} has the tool call {show(call)}: give it a function with a name"
        )
    function = {name: v for name, v in function.items() if v is not None}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        if is_missing(arguments) or arguments.strip() == "null":
            arguments = {}
        else:
            name = f"{fields.where}: the arguments of {where}.tool_calls"
            arguments = parse_json(arguments, name)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise fields.error(
            f"{where} has the arguments {show(arguments)} of a tool call: give an "
            "object, or the text of one"
        )
    if arguments is not None:
        is_padded = fields.is_padded and not isinstance(function["arguments"], str)
        function["arguments"] = _without_nulls(arguments) if is_padded else arguments
    return {n: v for n, v in call.items() if v is not None} | {"function": function}


def _without_nulls(value: Any) -> Any:
    """Return a value without members that are null, as columns have for others."""
    if isinstance(value, Mapping):
        return {n: _without_nulls(v) for n, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def parse_tools(fields: Fields) -> tuple[Message, ...]:
    """Return the tools of a row, from its column `tools`.

    Raises:
      ValueError: they are no list of objects.
    """
    value = fields.values.get("tools")
    if is_missing(value):
        return ()
    tools = fields.as_list(value, "tools")
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise fields.error(f"tools={show(value)}: give a list of JSON schemas")
    _check_json(fields, tools, "tools")
    is_padded = fields.is_padded and not isinstance(value, str)
    return tuple(_without_nulls(tools) if is_padded else tools)


def _check_json(fields: Fields, value: Any, name: str) -> None:
    """Check that all texts of a value are Unicode."""
    check_text(json.dumps(value, ensure_ascii=False, default=str), fields.error, name)


def question_of(messages: list[Message], tools: Sequence[Message]) -> dict[str, str]:
    """Return question and answer of a chat of one question and one answer.

    What the system says stands before the question.
    """
    roles = [message["role"] for message in messages]
    if roles[-2:] != ["user", "assistant"] or roles[:-2] not in _PREAMBLES:
        return {}
    is_more = any(m.get("reasoning_content") or m.get("tool_calls") for m in messages)
    if tools or is_more or any(m.get("weight") == 0 for m in messages):
        return {}
    *texts, answer = (message["content"] for message in messages)
    return {"question": "\n".join(texts), "answer": answer}
