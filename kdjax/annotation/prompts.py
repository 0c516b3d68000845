"""Prompts that make a teacher write rationales, as chat messages or plain text.

A turn states a question, its lettered choices and the answer to be explained; worked
examples come before it as turns of their own. The answer stands before its explanation
and is no part of it, unless explanations are asked to conclude with it. What the worked
examples say is in the files of a folder, by default `prompt_files/`:

  demonstrations.jsonl  {question, choices, answer, rationale}
  adjectives.json       {good: [...], bad: [...]}: qualities of a rationale
  requests.jsonl        {name, critique, revision}: the requests for both
  critiques.jsonl       {question, choices, answer, rationale, request, critique}
  revisions.jsonl       the same, and revision
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

from kdjax.data.example import Example
from kdjax.data.letters import letter, letter_choices
from kdjax.data.templates import ANSWER, CHOICES
from kdjax.data.text import CONCLUSION, states_answer

QUESTION, EXPLANATION = "Question:", "Explanation"
CRITIQUE, REVISION = "Critique:", "Revised explanation:"
STEP_BY_STEP = "Let's think step by step about why this is the answer."
EXPLAIN_TASK = (
    "Each question comes with an answer. Explain in a few sentences why that answer "
    "fits."
)
CONCLUDE_TASK = "End each explanation with the answer."
CRITIQUE_TASK = "Each explanation of an answer is followed by a critique of it."
REVISION_TASK = "Each explanation of an answer is criticised and then written anew."
ANSWER_TASK = "Answer each question."
FOLDER = pathlib.Path(__file__).parent / "prompt_files"

Message = dict[str, str]  # role ("user" or "assistant") and content
Messages = list[Message]
_T = TypeVar("_T")

_WORKED = ("question", "choices", "answer", "rationale")
_COLUMNS = {
    "demonstrations": _WORKED,
    "requests": ("name", "critique", "revision"),
    "critiques": (*_WORKED, "request", "critique"),
    "revisions": (*_WORKED, "request", "critique", "revision"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromptFiles:
    """The content of a folder of prompt files."""

    demonstrations: tuple[dict[str, Any], ...]
    adjectives: dict[str, list[str]]  # quality -> adjectives
    requests: tuple[dict[str, Any], ...]
    critiques: tuple[dict[str, Any], ...]
    revisions: tuple[dict[str, Any], ...]
    digest: str  # of all of it


def load(folder: str = "") -> PromptFiles:
    """Read and check a folder of prompt files; "" is the built-in one.

    Raises:
      ValueError: a file, column or adjective that is missing, or an answer that is none
        of its choices.
    """
    path = pathlib.Path(folder) if folder else FOLDER
    tables = {name: _rows(path / f"{name}.jsonl", _COLUMNS[name]) for name in _COLUMNS}
    adjectives = _json(path / "adjectives.json", _read(path / "adjectives.json"))
    for quality in ("good", "bad"):
        words = adjectives.get(quality) if isinstance(adjectives, dict) else None
        if not isinstance(words, list) or len(set(words)) < 2:
            raise ValueError(
                f"{path / 'adjectives.json'}: {quality!r} is {words!r}: give a list of "
                "two adjectives or more"
            )
    content = json.dumps([tables, adjectives], sort_keys=True)
    return PromptFiles(
        **{name: tuple(rows) for name, rows in tables.items()},
        adjectives=adjectives,
        digest=hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
    )


def draw(items: Sequence[_T], num: int, *key: object) -> list[_T]:
    """Draw items without replacement; the key (seed, id, purpose) decides which."""

    def rank(index: int) -> bytes:
        text = json.dumps([*map(str, key), index])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    return [items[index] for index in sorted(range(len(items)), key=rank)[:num]]


def zero_shot(example: Example, answer: str) -> Messages:
    """Prompt with the question, its answer, and the request to think step by step."""
    return [_user(f"{_stated(example, answer)}\n{STEP_BY_STEP}")]


def few_shot(
    example: Example,
    answer: str,
    files: PromptFiles,
    *,
    adjectives: Sequence[str],
    num_demonstrations: int,
    conclude: bool = False,
) -> Messages:
    """Prompt with worked examples and the question, all qualified by adjectives.

    Args:
      example: to be explained.
      answer: the text of the choice to explain, right or wrong; "" leaves it open.
      files: where the worked examples are.
      adjectives: "Explanation (clear, complete):" asks for two of them.
      num_demonstrations: of the file, the first ones.
      conclude: explanations end with "So the answer is (b) shed."

    Raises:
      ValueError: the file has fewer.
    """
    shown = _first(files, num_demonstrations)
    cue = f"{EXPLANATION} ({', '.join(adjectives)}):"
    turns = [
        (f"{_stated(_example(row), row['answer'])}\n{cue}", _worked(row, conclude))
        for row in shown
    ]
    task = f"{EXPLAIN_TASK} {CONCLUDE_TASK}" if conclude else EXPLAIN_TASK
    return _dialogue(task, turns, f"{_stated(example, answer)}\n{cue}")


def question(
    example: Example, files: PromptFiles, *, num_demonstrations: int
) -> Messages:
    """Prompt with answered questions, and the question, whose answer is open.

    Raises:
      ValueError: the file has fewer worked examples.
    """
    shown = [_example(row) for row in _first(files, num_demonstrations)]
    turns = [(_stated(e, ""), lettered(e, e.answer)) for e in shown]
    return _dialogue(ANSWER_TASK, turns, _stated(example, ""))


def critique(
    example: Example,
    rationale: str,
    request: str,
    worked: Sequence[dict[str, Any]],
    *,
    conclude: bool = False,
) -> Messages:
    """Prompt with worked critiques, and the request for one of this rationale.

    Args:
      example: that the rationale is of.
      rationale: to be criticised.
      request: of a request pair.
      worked: rows of the file of critiques.
      conclude: as in `few_shot`.
    """
    turns = [
        (
            _criticise(_example(row), _worked(row, conclude), row["request"]),
            row["critique"],
        )
        for row in worked
    ]
    return _dialogue(CRITIQUE_TASK, turns, _criticise(example, rationale, request))


def revision(
    example: Example,
    rationale: str,
    criticism: str,
    request: str,
    worked: Sequence[dict[str, Any]],
    *,
    conclude: bool = False,
) -> Messages:
    """Prompt with worked revisions, and the request for one of this rationale.

    Args:
      example: that the rationale is of.
      rationale: to be revised.
      criticism: of it.
      request: of a request pair.
      worked: rows of the file of revisions.
      conclude: as in `few_shot`.
    """
    turns = [
        (
            _revise(
                _example(row), _worked(row, conclude), row["critique"], row["request"]
            ),
            _worked(row, conclude, "revision"),
        )
        for row in worked
    ]
    last = _revise(example, rationale, criticism, request)
    return _dialogue(REVISION_TASK, turns, last)


def plain(messages: Messages) -> str:
    """Join the messages into one text for models without a chat template.

    A turn ends with a blank line; the assistant's text follows its cue after one
    space.
    """
    text = ""
    for message in messages:
        text += message["content"]
        text += " " if message["role"] == "user" else "\n\n"
    return text.rstrip(" ")


def digest(*prompts: Messages) -> str:
    """Compute the blake2b-128 of prompts, hexadecimal."""
    content = json.dumps(prompts, ensure_ascii=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def lettered(example: Example, choice: str) -> str:
    """Return a choice with its letter, as "(b) shed"; a free answer as it is."""
    if choice not in example.choices:
        return choice
    return f"({letter(example.choices.index(choice))}) {choice}"


def _first(files: PromptFiles, num: int) -> Sequence[dict[str, Any]]:
    """Return the first demonstrations."""
    if num > len(files.demonstrations):
        raise ValueError(
            f"annotate.num_demonstrations={num}: the prompt files have "
            f"{len(files.demonstrations)}: use no more, or add some"
        )
    return files.demonstrations[:num]


def _worked(row: dict[str, Any], conclude: bool, column: str = "rationale") -> str:
    """Return a worked explanation, with the answer at its end where that is asked."""
    text = row[column]
    if not conclude or states_answer(text):
        return text
    return f"{text} {CONCLUSION} {lettered(_example(row), row['answer'])}."


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _dialogue(task: str, turns: list[tuple[str, str]], last: str) -> Messages:
    """Make a chat of the task, worked turns (user, assistant) and the last turn."""
    contents = [*(content for content, _ in turns), last]
    contents[0] = f"{task}\n\n{contents[0]}"
    messages = [_user(contents[0])]
    for (_, reply), content in zip(turns, contents[1:], strict=True):
        messages += [{"role": "assistant", "content": reply}, _user(content)]
    return messages


def _stated(example: Example, answer: str) -> str:
    lines = [f"{QUESTION} {example.question}"]
    if example.choices:
        lines.append(f"{CHOICES} {letter_choices(example.choices)}")
    lines.append(f"{ANSWER} {lettered(example, answer)}".rstrip())
    return "\n".join(lines)


def _explained(example: Example, rationale: str) -> str:
    stated = _stated(example, example.answer)
    return f"{stated}\n{EXPLANATION}: {rationale}".rstrip()


def _criticise(example: Example, rationale: str, request: str) -> str:
    return f"{_explained(example, rationale)}\n{request}\n{CRITIQUE}"


def _revise(example: Example, rationale: str, criticism: str, request: str) -> str:
    explained = _explained(example, rationale)
    return f"{explained}\n{CRITIQUE} {criticism}".rstrip() + f"\n{request}\n{REVISION}"


def _example(row: dict[str, Any]) -> Example:
    return Example(
        id="",
        question=row["question"],
        choices=tuple(row["choices"]),
        answer=row["answer"],
    )


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read ({error.strerror}): annotate.prompts names a "
            f"folder with {', '.join(f'{name}.jsonl' for name in _COLUMNS)} and "
            "adjectives.json"
        ) from error


def _json(where: object, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _rows(file: pathlib.Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read(file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        row = _json(where, line)
        if not isinstance(row, dict) or any(not row.get(name) for name in columns):
            raise ValueError(f"{where} lacks one of the columns {', '.join(columns)}")
        if "choices" in columns and row["answer"] not in row["choices"]:
            raise ValueError(
                f"{where}: answer={row['answer']!r} is none of its choices "
                f"{row['choices']}: give the text of the right one"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} has no rows: give one or more")
    return rows
