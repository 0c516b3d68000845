"""Requests that a teacher completes for each rationale or answer.

Adjectives, critique requests, wrong choices and the seeds of sampling follow from
(annotate.seed, id), whatever the order of the examples.
"""

import dataclasses
import hashlib
import json
from collections.abc import Generator, Sequence

from kdjax.annotation import prompts
from kdjax.annotation.prompts import Messages, PromptFiles
from kdjax.annotation.quality import parse_choice
from kdjax.annotation.store import Key, Row
from kdjax.config import AnnotateConfig
from kdjax.data import think
from kdjax.data.example import Example, wrong_choices


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One text to be generated."""

    id: str  # of the example
    step: str  # "rationale", "answer", "draft", "critique" or "revision"
    messages: Messages
    contrast: Messages | None = None  # decoded against, where there is one
    seed: int  # of its sampling, below 2^31
    max_new_tokens: int  # of its text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One generated text."""

    text: str  # as it came, up to the end token or a stop string
    finish_reason: str  # "stop", "length", or another one of a server
    prompt_tokens: int | None  # None if a server does not report it
    new_tokens: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One rationale to be written."""

    example: Example
    answer: str  # the choice that it explains
    choice: str = ""  # the same, where an example has several rationales

    @property
    def key(self) -> Key:
        """Key of its row."""
        return self.example.id, self.choice


# Methods that write a rationale for each wrong choice.
COUNTERFACTUAL_METHODS = ("counterfactual", "contrastive_counterfactual")


# Methods that decode against a contrast.
CONTRASTIVE_METHODS = ("contrastive", "contrastive_counterfactual")


def make_items(examples: Sequence[Example], config: AnnotateConfig) -> list[Item]:
    """List the items: one per example, or for counterfactuals per wrong choice.

    Raises:
      ValueError: an example without question, answer, or the choices that are needed.
    """
    items = []
    for example in examples:
        if not example.question or not example.answer:
            raise ValueError(
                f"example {example.name} has no question with an answer: rationales "
                "are written for these; use another data.schema"
            )
        for_each_wrong_choice = config.method in COUNTERFACTUAL_METHODS
        if for_each_wrong_choice or (
            config.method == "contrastive" and config.contrast == "wrong"
        ):
            wrong = _wrong(example)
            if not wrong:
                raise ValueError(
                    f"example {example.name} has no wrong choice, which annotate.method"
                    f"={config.method!r} needs: use another one"
                    + (" or contrast='empty'" * (config.method == "contrastive"))
                )
            if for_each_wrong_choice:
                items += [Item(example=example, answer=c, choice=c) for c in wrong]
                continue
        items.append(Item(example=example, answer=example.answer))
    return items


class Work:
    """The progress of an item: its next request, None when it is finished."""

    def __init__(
        self,
        item: Item,
        files: PromptFiles,
        config: AnnotateConfig,
        *,
        think_policy: str = "keep",
    ) -> None:
        self.item = item
        self._think_policy = think_policy
        self._drawn: Row = {}
        self._calls: list[Row] = []
        self._text = ""  # of the last call, with its reasoning or without
        self._answers = config.method == "answer"
        self._sequence = _requests(item, files, config, self._drawn)
        self.request: Request | None = next(self._sequence)
        self.prompt_hash = _digest(self.request)  # of the first prompt

    def take(self, completion: Completion) -> None:
        """Take the completion of the request, and go on to the next one."""
        assert self.request is not None
        call = {"step": self.request.step, "prompt_hash": _digest(self.request)}
        self._calls.append(call | dataclasses.asdict(completion))
        raw, self._text = completion.text, completion.text
        if self._think_policy == "strip":
            self._text = think.strip_think(raw)
        elif self._think_policy == "require":
            self._drawn["think"] = think.has_think(raw)
        completion = dataclasses.replace(completion, text=self._text)
        try:
            self.request = self._sequence.send(completion)
        except StopIteration:
            self.request = None

    def row(self, settings: Row) -> Row:
        """Return the row to write: the last text, and all calls that led to it."""
        row: Row = {"id": self.item.example.id}
        if self.item.choice:
            row["choice"] = self.item.choice
        row["text"] = self._text.strip()
        if self._answers:
            row["answer"] = parse_choice(row["text"], self.item.example)
        row["finish_reason"] = self._calls[-1]["finish_reason"]
        row["prompt_hash"] = self.prompt_hash
        for name in ("prompt_tokens", "new_tokens"):
            counts = [call[name] for call in self._calls]
            row[name] = None if None in counts else sum(counts)
        return row | self._drawn | {"calls": self._calls, "settings": settings}


def _requests(
    item: Item, files: PromptFiles, config: AnnotateConfig, drawn: Row
) -> Generator[Request, Completion, None]:
    """Yield the requests of an item in turn; store random choices in `drawn`."""
    example, where = item.example, (config.seed, *item.key)

    def request(
        step: str, messages: Messages, contrast: Messages | None = None
    ) -> Request:
        content = json.dumps([*map(str, where), step]).encode()
        seed = int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) >> 1
        return Request(
            id=example.id,
            step=step,
            messages=messages,
            contrast=contrast,
            seed=seed,
            max_new_tokens=max_new_tokens(config, step),
        )

    if config.method == "zero_shot":
        yield request("rationale", prompts.zero_shot(example, item.answer))
        return
    if config.method == "answer":
        num = config.num_demonstrations
        asks = prompts.question(example, files, num_demonstrations=num)
        yield request("answer", asks)
        return
    words = files.adjectives[config.quality]
    drawn["adjectives"] = prompts.draw(words, 2, config.seed, example.id, "adjectives")

    def few_shot(answer: str) -> Messages:
        return prompts.few_shot(
            example,
            answer,
            files,
            adjectives=drawn["adjectives"],
            num_demonstrations=config.num_demonstrations,
            conclude=config.conclude,
        )

    if config.method == "contrastive":
        other = ""
        if config.contrast == "wrong":
            [other] = prompts.draw(_wrong(example), 1, *where, "contrast")
        drawn["contrast"] = other
        yield request("rationale", few_shot(item.answer), few_shot(other))
        return
    if config.method == "contrastive_counterfactual":
        drawn["contrast"] = example.answer
        yield request("rationale", few_shot(item.answer), few_shot(example.answer))
        return
    if config.method != "critique_revision":
        yield request("rationale", few_shot(item.answer))
        return
    [pair] = prompts.draw(files.requests, 1, *where, "request")
    drawn["request"] = pair["name"]
    worked = _draw_critiques(files, config, *where)
    draft = (yield request("draft", few_shot(item.answer))).text.strip()
    criticism = yield request(
        "critique",
        prompts.critique(
            example,
            draft,
            pair["critique"],
            worked,
            conclude=config.conclude,
        ),
    )
    yield request(
        "revision",
        prompts.revision(
            example,
            draft,
            criticism.text.strip(),
            pair["revision"],
            files.revisions,
            conclude=config.conclude,
        ),
    )


def max_new_tokens(config: AnnotateConfig, step: str) -> int:
    """Return the limit of new tokens of a step's text."""
    limits = {
        "draft": config.max_draft_tokens,
        "critique": config.max_critique_tokens,
        "revision": config.max_revision_tokens,
    }
    return limits.get(step, 0) or config.max_new_tokens


def _draw_critiques(
    files: PromptFiles, config: AnnotateConfig, *key: object
) -> list[Row]:
    """Draw the worked critiques of an item, in the order of their file.

    Raises:
      ValueError: the file has fewer.
    """
    num, rows = config.num_critiques, files.critiques
    if num > len(rows):
        raise ValueError(
            f"annotate.num_critiques={num}: the prompt files have {len(rows)}: use no "
            "more, or add some"
        )
    return [
        rows[i] for i in sorted(prompts.draw(range(len(rows)), num, *key, "worked"))
    ]


def _wrong(example: Example) -> list[str]:
    """Return the distinct wrong choices."""
    if not example.choices:
        return []
    return [c for c in dict.fromkeys(wrong_choices(example)) if c != example.answer]


def _digest(request: Request) -> str:
    parts = (request.messages, request.contrast)
    return prompts.digest(*(part for part in parts if part is not None))
