"""Schemas: rows of published and usual forms as examples."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdjax.config import SCHEMAS, DataConfig
from kdjax.data import chat_rows, column_hints
from kdjax.data.answers import AnswerReader, Choices, check_count, parse_choices
from kdjax.data.columns import (
    ColumnMap,
    Fields,
    describe_names,
    is_missing,
    show,
)
from kdjax.data.example import Example
from kdjax.data.readers import ClassName, Row, Values

_BY_PLACE = ("text", "index", "number")  # kinds of answers without labels
# Columns that may name the right one of the choices in a column `answers`.
_KEYS = ("label", "answer", "correct", "correct_answer", "gold", "target", "answer_idx")
_GSM8K = re.compile(r"(^|\n)####[^\n]*\S[^\n]*\s*$")


class Schema:
    """The conversion of a source's rows to examples."""

    def __init__(self, config: DataConfig) -> None:
        """Choose the schema; "auto" is seen from the first row."""
        self._config = config
        self._rename = ColumnMap(config.columns)
        self._name = "text" if config.source == "text" else config.schema
        self._detected = self._name == "auto"
        if self._name not in SCHEMAS:
            raise ValueError(f"schema={self._name!r}: use one of {SCHEMAS}")
        self._answers = AnswerReader(config.answer_kind)
        self._with_choices = ""  # the first row that has some
        self._without_choices = ""  # the first row that has none of them

    def describe(self, row: Row) -> str:
        """Return the schema of a row, the columns that it reads, and the others."""
        row = self._rename(row)
        name = detect(row) if self._name == "auto" else self._name
        names = [c.encode(errors="backslashreplace").decode() for c in row.values]
        columns = [c for c in names if c in COLUMNS[name]]
        others = [c for c in names if c not in COLUMNS[name]]
        rest = f"; not read: {', '.join(others)}" if others else ""
        return f"schema {name} of the columns {', '.join(columns)}{rest}"

    def example(self, row: Row, default_id: str) -> Example:
        """Convert a row.

        Args:
          row: of the source.
          default_id: of a row without an id.

        Raises:
          ValueError: file, row, column and value that are not as the schema says.
        """
        row = self._rename(row)
        if self._name == "auto":
            self._name = detect(row)
        drop = self._config.on_missing == "drop"
        fields = Fields(row, default_id, drop=drop)
        if self._detected:
            self._check_columns(fields)
        return _CONVERTERS[self._name](self, fields)

    def _check_columns(self, fields: Fields) -> None:
        """Raise ValueError for columns that the schema, which was seen, leaves out."""
        choices = fields.values.get("choices")
        is_read = "choices" in COLUMNS[self._name] or not column_hints.is_list(choices)
        if not is_read and parse_choices(fields, choices).texts:
            raise fields.error(
                f"it has choices, which the schema {self._name!r} does not read: name "
                f"data.schema={self._name!r} to leave them out, or 'plain' to read them"
            )
        column_hints.check_other_names(fields, COLUMNS[self._name])

    def _example(self, fields: Fields, **values: Any) -> Example:
        return Example(id=fields.id, origin=fields.where, **values)

    def _text(self, fields: Fields) -> Example:
        return self._example(fields, text=fields.text("text"))

    def _plain(self, fields: Fields) -> Example:
        values = fields.values
        if values.get("text") is not None and values.get("question") is None:
            return self._text(fields)
        choices = parse_choices(fields, values.get("choices"))
        if not self._check_choices(fields, choices.texts):
            return self._example(fields, question=_question(fields))
        answer = self._answer(fields, choices=choices)
        question = _question(fields)
        if not choices.texts:
            self._check_free(fields, answer["answer"], question)
        if self._detected and not choices.texts and _GSM8K.search(answer["answer"]):
            raise fields.error(
                f"answer={show(answer['answer'])} ends as those of GSM8K, the first "
                "row's does not: use data.schema='gsm8k', or 'plain'"
            )
        counterfactuals = _counterfactuals(fields, choices.texts)
        return self._example(
            fields,
            question=question,
            choices=choices.texts,
            **answer,
            rationale=fields.optional_text("rationale"),
            counterfactuals=counterfactuals,
        )

    def _check_choices(self, fields: Fields, texts: tuple[str, ...]) -> bool:
        """Return False for a row whose choices are missing, unlike those of others.

        Its answer would be read as a free one, and may be a letter.
        """
        if texts and self._without_choices:
            raise fields.error(
                f"it has choices, but {self._without_choices} has none: give them to "
                "all rows, or make two files"
            )
        if self._with_choices and not texts:
            fields.require("choices", None, f"{self._with_choices} has some: give them")
            return False
        self._with_choices = self._with_choices or (fields.where if texts else "")
        if not texts:
            self._without_choices = self._without_choices or fields.where
        return True

    def _check_free(self, fields: Fields, answer: str, question: str) -> None:
        """Raise ValueError for a free answer that rather names a choice."""
        if self._detected:
            others = {n: v for n, v in fields.values.items() if n not in _READ}
            column_hints.check_no_choices(fields, others, answer, question)

    def _answer(
        self, fields: Fields, name: str = "answer", *, choices: Any = ((), ())
    ) -> dict[str, Any]:
        """Return the fields of an example that its answer makes."""
        value = fields.get(name)
        if choices.texts and isinstance(value, list | tuple):
            value = self._one_of(fields, name, value, choices)
        value, others = self._first(fields, name, value)
        if value is None:
            return {"answer": ""}
        if not choices.texts:
            if self._config.answer_kind in ("label", "index", "number"):
                raise fields.error(
                    f"{name}={show(value)} names no choice, as data.answer_kind="
                    f"{self._config.answer_kind!r} says: the row has none"
                )
            return {
                "answer": fields.as_text(value, name, number=True),
                "other_answers": tuple(
                    fields.as_text(o, name, number=True) for o in others
                ),
            }
        answer = self._answers.choose(fields, name, value, choices)
        check_count(fields, choices.texts)
        return {"answer": answer}

    def _one_of(
        self, fields: Fields, name: str, values: Sequence[Any], choices: Choices
    ) -> Any:
        """Return the one answer to choices of a list of them, or of a 1 among 0s."""
        is_marked = all(isinstance(v, int) and v in (0, 1) for v in values)
        if is_marked and len(values) == len(choices.texts) > 2 and sum(values) == 1:
            return choices.texts[[*values].index(1)]
        if len(set(map(str, values))) > 1 and self._config.answer_list != "first":
            raise fields.error(
                f"{name}={show(values)} has several answers to choices: give the right "
                "one alone, or use data.answer_list='first'"
            )
        return values

    def _first(
        self, fields: Fields, name: str, value: Any, policy: str = ""
    ) -> tuple[Any, list[Any]]:
        """Return the first of several answers, and the others that count as right."""
        if not isinstance(value, list | tuple):
            return value, []
        values = [item for item in value if not is_missing(item)]
        policy = policy or self._config.answer_list
        if not values:
            return fields.require(name, None), []
        if len(set(map(str, values))) > 1 and policy == "error":
            raise fields.error(
                f"{name}={show(value)} has several answers: say by data.answer_list "
                "that the 'first' counts, or 'any' of them when generations are "
                "compared (the first is trained on)"
            )
        if any(isinstance(item, list | tuple | Mapping) for item in values[1:]):
            raise fields.error(
                f"{name}={show(value)} has lists or objects in it: give texts"
            )
        others = values[1:] if policy == "any" else []
        return values[0], list(dict.fromkeys(others))

    def _keyed(self, fields: Fields) -> Example:
        """Convert a row of a question, choices {label, text}, and answerKey.

        The question may also be an object of a stem and the choices.
        """
        values = fields.values
        name = "question"
        if values.get("question") is None and "question_stem" in values:
            name = "question_stem"
        question = fields.get(name)
        if isinstance(question, Mapping):
            stem, choices = question.get("stem"), question.get("choices")
            stem = fields.require("question.stem", stem)
            text = "" if stem is None else fields.as_text(stem, "question.stem")
        else:
            choices, text = fields.get("choices"), _question(fields, name)
        options = parse_choices(fields, choices)
        key = fields.get("answerKey", "use a split with answers")
        answer = ""
        if not options.texts:
            fields.require("choices", None)
        elif self._config.answer_kind in _BY_PLACE or not options.labels:
            if key is not None:
                answer = self._answers.choose(fields, "answerKey", key, options)
        elif key is not None:
            key = int(key) if isinstance(key, float) and key.is_integer() else key
            key = fields.as_text(key, "answerKey", number=True).strip()
            if key not in options.labels:
                raise fields.error(
                    f"answerKey={key!r} is none of its labels {list(options.labels)}: "
                    "use a split with answers"
                )
            answer = options.texts[options.labels.index(key)]
        if answer:
            check_count(fields, options.texts)
        return self._example(
            fields,
            question=text,
            choices=options.texts,
            answer=answer,
            rationale=fields.optional_text("rationale"),
        )

    def _mmlu(self, fields: Fields) -> Example:
        """Convert a row of a question, a list of choices, and the answer's index."""
        choices = parse_choices(fields, fields.get("choices"))
        if not choices.texts:
            fields.require("choices", None)
            return self._example(fields, question=_question(fields))
        value = fields.get("answer")
        answers = self._answers
        is_index = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, str) and not isinstance(value, ClassName):
            # In a table all values are texts.
            text = value.strip()
            is_index = text.isdecimal() and text not in choices.texts
        if is_index and self._config.answer_kind == "auto":
            if value == -1:  # the mark of a label that is not published
                value = fields.require("answer", None, "use a split with answers")
            answers, choices = AnswerReader("index"), choices._replace(labels=())
        answer = ""
        if value is not None:
            answer = answers.choose(fields, "answer", value, choices)
            check_count(fields, choices.texts)
        return self._example(
            fields,
            question=_question(fields),
            choices=choices.texts,
            answer=answer,
            rationale=fields.optional_text("rationale"),
        )

    def _gsm8k(self, fields: Fields) -> Example:
        """Convert a row of a question and an answer: rationale, "####", result."""
        text = fields.text("answer")
        rationale, mark, answer = text.rpartition("####")
        if text and not mark:
            raise fields.error(
                "no '####' in its answer: give it, or use data.schema='plain'"
            )
        if text and not answer.strip():
            fields.require("answer", None, "give the result after '####'")
        if (
            mark
            and rationale.rpartition("\n")[2].strip()
            and not re.search(r"\d", answer)
        ):
            raise fields.error(
                f"answer={show(text)} has '####' within a line: give the result on a "
                "line of its own, or use data.schema='plain'"
            )
        if "\n" in answer.strip():
            raise fields.error(
                f"text follows the line of the result, {show(answer.strip())}: end the "
                "answer with it"
            )
        question = _question(fields)
        self._check_free(fields, answer, question)
        return self._example(
            fields,
            question=question,
            answer=answer.strip(),
            rationale=rationale.rstrip(),
        )

    def _squad(self, fields: Fields) -> Example:
        """Convert a row of a question and answers {text, answer_start}.

        A context stands before the question, where the rows have one.
        """
        value = fields.get("answers")
        key = next((name for name in _KEYS if fields.has(name)), "")
        if self._detected and key and not isinstance(value, Mapping):
            raise fields.error(
                f"answers={show(value)} may be choices, of which {key}="
                f"{show(fields.values[key])} names one: say data.columns="
                f"choices=answers,answer={key}, or data.schema='squad'"
            )
        if isinstance(value, Mapping):
            if "text" not in value:
                raise fields.error(f"answers={show(value)} has no 'text': give it")
            value = value["text"]
        texts = [] if value is None else fields.as_list(value, "answers.text")
        texts = [t.get("text") if isinstance(t, Mapping) else t for t in texts]
        policy = self._config.answer_list
        policy = "any" if policy == "error" else policy
        first, others = self._first(fields, "answers", texts, policy)
        question = _question(fields)
        if "context" in fields.values and fields.get("context") is None:
            question = ""  # left out
        return self._example(
            fields,
            question=question,
            answer=""
            if first is None
            else fields.as_text(first, "answers.text", number=True),
            other_answers=tuple(
                fields.as_text(other, "answers.text", number=True) for other in others
            ),
        )

    def _alpaca(self, fields: Fields) -> Example:
        """Convert a row of an instruction, perhaps an input, and an output."""
        if fields.values.get("history"):
            raise fields.error(
                "history is not read: write its turns and this one as messages"
            )
        question = fields.text("instruction")
        more = fields.optional_text("input") or fields.optional_text("context")
        if question and more:
            question = f"{question}\n{more}"
        answer = fields.text("output", number=True)
        self._check_free(fields, answer, question)
        return self._chat_of(fields, question, answer)

    def _chat_of(self, fields: Fields, question: str, answer: str) -> Example:
        """Make an example of a question and an answer that is a chat too."""
        messages: list[chat_rows.Message] = []
        if question and answer:
            if system := fields.optional_text("system"):
                messages.append({"role": "system", "content": system})
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        # A column of this name may be about other tools.
        value = fields.values.get("tools")
        is_read = isinstance(value, str) and value.lstrip().startswith("[")
        if isinstance(value, list | tuple):
            is_read = all(isinstance(tool, Mapping) for tool in value)
        tools = chat_rows.parse_tools(fields) if is_read else ()
        asked = chat_rows.question_of(messages, tools)
        return self._example(fields, messages=tuple(messages), tools=tools, **asked)

    def _sharegpt(self, fields: Fields) -> Example:
        """Convert a row of conversations {from, value}."""
        name = "conversations"
        turns = _list(fields, fields.get(name), name)
        return self._chat(fields, chat_rows.from_sharegpt(fields, turns, name), name)

    def _messages(self, fields: Fields) -> Example:
        """Convert a row of messages {role, content}, and perhaps tools."""
        value = _list(fields, fields.get("messages"), "messages")
        return self._chat(fields, value, "messages")

    def _chat(self, fields: Fields, value: list[Any], name: str) -> Example:
        messages = chat_rows.check_turns(fields, value, name)
        system = fields.optional_text("system")
        if messages and system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif messages and system and messages[0]["content"].strip() != system.strip():
            raise fields.error(
                f"system={show(system)} differs from the chat's own system message: "
                "leave one of them out"
            )
        chat_rows.check_ends(fields, messages, name)
        if not any(chat_rows.is_reply(message) for message in messages):
            fields.require(name, None, "give it a reply of the assistant")
            messages = []
        tools = chat_rows.parse_tools(fields)
        asked = chat_rows.question_of(messages, tools)
        return self._example(fields, messages=tuple(messages), tools=tools, **asked)

    def _preference(self, fields: Fields) -> Example:
        """Convert the chosen side of a pair: a text or messages, after a prompt."""
        name = "chosen"
        if name not in fields.values and "completion" in fields.values:
            name = "completion"
        label = fields.values.get("label", True)
        if name == "completion" and str(label).lower() in ("false", "0"):
            raise fields.error(
                f"label={label!r}: its completion is not wanted: leave such rows out"
            )
        preferred = chat_rows.parse_text(fields, fields.get(name), name)
        prompt = chat_rows.parse_text(fields, fields.values.get("prompt"), "prompt")
        if isinstance(preferred, str) and not isinstance(prompt, list | tuple):
            remedy = f"{name} is text without a prompt: give one, or messages"
            prompt = fields.require("prompt", prompt, remedy)
            question = "" if prompt is None else fields.as_text(prompt, "prompt")
            answer = fields.as_text(preferred, name)
            if self._detected:
                chat_rows.check_reply(fields, name, question, answer)
            return self._chat_of(fields, question, answer)
        if isinstance(preferred, str):
            preferred = [{"role": "assistant", "content": preferred}]
        if isinstance(prompt, str) and not is_missing(prompt):
            prompt = [{"role": "user", "content": prompt}]
        given = [] if is_missing(prompt) else _list(fields, prompt, "prompt")
        before = chat_rows.check_turns(fields, given, "prompt")
        turns = chat_rows.check_turns(fields, _list(fields, preferred, name), name)
        if not turns or (given and not before):  # left out
            return self._chat(fields, [], name)
        own = chat_rows.without_prompt(turns, before)
        if own is None and any(message["role"] == "user" for message in turns):
            raise fields.error(
                f"{name} does not begin with the column prompt, but has turns of a "
                "user: leave one of them out"
            )
        start = before if own is None else turns[: len(turns) - len(own)]
        own = turns if own is None else own
        if not any(map(chat_rows.is_reply, own)):
            fields.require(name, None, "give it a reply of the assistant")
            return self._chat(fields, [], name)
        return self._chat(fields, [*map(chat_rows.as_read, start), *own], name)


# Private methods, so that this table is the only list of schemas.
_CONVERTERS: dict[str, Callable[[Schema, Fields], Example]] = {
    "plain": Schema._plain,
    "commonsense_qa": Schema._keyed,
    "arc": Schema._keyed,
    "openbookqa": Schema._keyed,
    "mmlu": Schema._mmlu,
    "gsm8k": Schema._gsm8k,
    "squad": Schema._squad,
    "alpaca": Schema._alpaca,
    "sharegpt": Schema._sharegpt,
    "messages": Schema._messages,
    "preference": Schema._preference,
    "text": Schema._text,
}


# Columns that a schema reads, where there are some.
_PLAIN = (
    *("id", "system", "context", "question", "choices", "answer"),
    *("rationale", "counterfactuals", "text"),
)
_KEYED = (
    *("id", "system", "context", "question", "question_stem"),
    *("choices", "answerKey", "rationale"),
)
COLUMNS = {
    "plain": _PLAIN,
    "commonsense_qa": _KEYED,
    "arc": _KEYED,
    "openbookqa": _KEYED,
    "mmlu": ("id", "system", "context", "question", "choices", "answer", "rationale"),
    "gsm8k": ("id", "system", "context", "question", "answer"),
    "squad": ("id", "system", "context", "question", "answers"),
    "alpaca": ("id", "system", "instruction", "input", "context", "output", "tools"),
    "sharegpt": ("id", "system", "conversations", "tools"),
    "messages": ("id", "system", "messages", "tools"),
    "preference": ("id", "system", "prompt", "chosen", "completion", "tools"),
    "text": ("id", "text"),
}


_READ = {name for names in COLUMNS.values() for name in names} - {"answers"}


def detect(row: Row) -> str:
    """Return the schema that a row's columns are of.

    Raises:
      ValueError: none, or several of them.
    """
    names = candidates(row.values)
    if len(names) == 1:
        return names[0]
    has = f"{row.where} has columns {describe_names(row.values)}"
    if names:
        raise ValueError(
            f"{has}, which are of several schemas: say by data.schema which: {names}"
        )
    raise ValueError(
        f"{has}, which are of no schema: name yours by data.columns, for example "
        "data.columns=question=COLUMN,answer=COLUMN or text=COLUMN"
    )


def candidates(values: Values) -> list[str]:
    """Return the schemas whose columns a row has."""
    names = []
    if "answerKey" in values:
        names.append("openbookqa" if "question_stem" in values else "commonsense_qa")
    if "answers" in values and ("question" in values or "context" in values):
        names.append("squad")
    if "question" in values and "answer" in values:
        answer = values["answer"]
        is_gsm8k = isinstance(answer, str) and _GSM8K.search(answer)
        if values.get("choices") is not None:
            names.append("mmlu" if "subject" in values else "plain")
        else:
            names.append("gsm8k" if is_gsm8k else "plain")
    if "instruction" in values and "output" in values:
        names.append("alpaca")
    if "conversations" in values:
        names.append("sharegpt")
    if "messages" in values:
        names.append("messages")
    if "chosen" in values or (not names and {"prompt", "completion"} <= values.keys()):
        names.append("preference")
    if not names and ("text" in values or "question" in values or "answer" in values):
        names.append("plain")  # texts, or what names the missing column
    return names


def _question(fields: Fields, name: str = "question") -> str:
    """Return a question after what the system says, and its context, if any."""
    question, context = fields.text(name), fields.values.get("context")
    if not question:
        return ""
    if isinstance(context, list | tuple) and all(isinstance(t, str) for t in context):
        context = "\n".join(context)
    context = "" if is_missing(context) else fields.as_text(context, "context")
    texts = (fields.optional_text("system"), context, question)
    return "\n".join(filter(None, texts))


def _list(fields: Fields, value: Any, name: str) -> list[Any]:
    return [] if value is None else fields.as_list(value, name)


def _counterfactuals(fields: Fields, choices: tuple[str, ...]) -> tuple[str, ...]:
    value = fields.values.get("counterfactuals")
    if is_missing(value):
        return ()
    texts = [
        "" if is_missing(t) else fields.as_text(t, f"counterfactuals[{i}]")
        for i, t in enumerate(fields.as_list(value, "counterfactuals"))
    ]
    if texts and len(texts) != len(choices) - 1:
        raise fields.error(
            f"it has {len(texts)} counterfactuals for {len(choices)} choices: give one "
            "per choice other than the answer"
        )
    return tuple(texts)
