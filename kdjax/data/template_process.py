"""A process that renders one chat template: untrusted code with bounded resources.

A template may loop, grow or recurse without end, and Jinja's sandbox bounds none of
that. So it runs here, with limits on seconds, memory and characters, and the process
that asks for texts waits no longer than that. It is started as a script and needs
nothing of kdjax.

Lines of JSON come and go. The first has "template", "date" (ISO), "seconds" and
"max_chars"; each other one is a list of chats, answered by a list of the same length.
"""

import contextlib
import datetime
import json
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

_MEMORY = 4 * 2**30  # bytes of address space


class Generation(jinja2.ext.Extension):
    """The block {% generation %}: its parts of the text are the assistant's."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def __init__(self, environment: jinja2.Environment) -> None:
        """Start without spans."""
        super().__init__(environment)
        environment.extend(rendered=[], spans=[])

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Parse the block as a call that notes where its text stands."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("note")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def note(self, caller: Any) -> str:
        """Note the span of the block in the text, and return its text."""
        environment: Any = self.environment
        text = caller()
        start = sum(map(len, environment.rendered))
        environment.spans.append((start, start + len(text)))
        return text


class TooLong(Exception):
    """A text that exceeds the limit."""


def make_environment(date: datetime.date) -> Any:
    """Return the environment that Transformers' templates expect, at a fixed date."""
    environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    now = datetime.datetime.combine(date, datetime.time())
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def render(
    environment: Any,
    template: jinja2.Template,
    chat: dict[str, Any],
    messages: list[Any],
    generation_prompt: bool,
    max_chars: int,
) -> tuple[str, list[tuple[int, int]]]:
    """Render messages; return the text and the spans of its generation blocks."""
    rendered: list[str] = []
    spans: list[tuple[int, int]] = []
    environment.rendered, environment.spans = rendered, spans
    num_chars = 0
    for block in template.generate(
        messages=messages,
        tools=chat["tools"],
        documents=None,
        add_generation_prompt=generation_prompt,
        **chat["kwargs"],
    ):
        num_chars += len(block)
        if num_chars > max_chars:
            raise TooLong(f"its text exceeds {max_chars} characters")
        rendered.append(block)
    return "".join(rendered), spans


def common_prefix_length(text: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    if text.startswith(other):
        return len(other)
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(other[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def answer(
    environment: Any, template: jinja2.Template, chat: dict[str, Any], max_chars: int
) -> dict[str, Any]:
    """Render a chat, and its beginnings.

    Args:
      environment: of the template.
      template: compiled.
      chat: "messages", "tools", "generation_prompt", "kwargs" and "beginnings", a list
        of (number of messages, whether a generation prompt follows).
      max_chars: longest text.

    Returns:
      "text", "spans" of generation blocks, and for each beginning (characters that its
      text has in common with the whole one, characters of it); or "error".
    """
    messages = chat["messages"]
    try:
        text, spans = render(
            environment, template, chat, messages, chat["generation_prompt"], max_chars
        )
        beginnings = []
        for number, prompt in chat["beginnings"]:
            begin, _ = render(
                environment, template, chat, messages[:number], prompt, max_chars
            )
            beginnings.append((common_prefix_length(text, begin), len(begin)))
    except TimeoutError:
        raise
    except Exception as error:  # whatever a template does is its own error
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text, "spans": spans, "beginnings": beginnings}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it runs for more than {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Answer lines until there are no more."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    settings = json.loads(sys.stdin.readline())
    environment = make_environment(datetime.date.fromisoformat(settings["date"]))
    template, failure = None, {}
    try:
        with time_limit(settings["seconds"]):
            template = environment.from_string(settings["template"])
    except Exception as error:
        line = getattr(error, "lineno", None)
        where = f"line {line}: " if line else ""
        failure = {"error": f"{where}{type(error).__name__}: {error}"}
    for line in sys.stdin:
        chats = json.loads(line)
        answers = [failure] * len(chats)
        if template is not None:
            answers = []
            try:
                with time_limit(settings["seconds"]):
                    for chat in chats:
                        answers.append(
                            answer(environment, template, chat, settings["max_chars"])
                        )
            except TimeoutError as error:
                answers += [{"error": str(error)}] * (len(chats) - len(answers))
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
