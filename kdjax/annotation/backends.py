"""Backends that complete requests: a model of this process, or a server."""

import importlib
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.annotation import prompts
from kdjax.annotation.prompts import Messages
from kdjax.annotation.requests import (
    CONTRASTIVE_METHODS,
    Completion,
    Request,
    Work,
)
from kdjax.config import AnnotateConfig, Config, DataConfig, T5Config
from kdjax.data import loader, think, views
from kdjax.data import tokenizer as tokenizers
from kdjax.data.chat import ChatEncoder
from kdjax.experiment.data import stop_ids
from kdjax.experiment.models import load_model
from kdjax.models import hf, lm
from kdjax.models.generate import Decoding, Generator
from kdjax.parallel import sharding

_FIRST_DELAY, _MAX_DELAY = 0.5, 60.0  # seconds between attempts
_MAX_ANSWER_BYTES = 16 * 2**20  # of a body, decompressed
_POLL_SECONDS = 0.1  # until `abort` is noticed
_SHORTEST_KEY = 8  # characters; a shorter one may be a word of a text
_TRANSIENT_STATUSES = (408, 409, 429)  # worth a retry, as are all from 500


class Local:
    """A Hugging Face folder run by this process on its own devices.

    What is sampled for a request follows from its seed alone. Prompts go through the
    tokenizer's chat template where `data.chat_template` is set.

    Args:
      config: of the annotation.
      path: the folder, with its own tokenizer.

    Raises:
      ValueError: nothing to load there, or weights that are not finite.
    """

    def __init__(self, config: Config, path: str) -> None:
        self._annotate, self._data = config.annotate, config.data
        self._tokenizer = tokenizers.load(hf.resolve(path))
        self._chat = None
        if config.data.chat_template:
            self._chat = ChatEncoder(self._tokenizer, config.data)
        self._eos_ids = stop_ids(config, self._tokenizer, (path,))
        mesh = sharding.make_mesh(config.mesh, devices=jax.local_devices())
        self.batch_size = sharding.divisible_rows(self._annotate.batch_size, mesh)
        self._mesh = mesh
        self._model, self._params = load_model(path, mesh, dtype=config.train.dtype)
        _check_finite(self._params, path)
        self._generators: dict[int, Generator] = {}  # by the limit of new tokens

    def _generator(self, max_new_tokens: int) -> Generator:
        """Return the generator of texts of at most so many tokens."""
        if max_new_tokens not in self._generators:
            self._generators[max_new_tokens] = Generator(
                self._model.shape,
                self._model.graphdef,
                self._decoding(max_new_tokens),
                batch_size=self.batch_size,
                mesh=self._mesh,
                cache_dtype=self._annotate.cache_dtype,
                stop=self._annotate.stop,
                decode_text=self._text,
            )
        return self._generators[max_new_tokens]

    def _decoding(self, max_new_tokens: int) -> Decoding:
        """Return the decoding method of the config."""
        annotate = self._annotate
        return Decoding(
            max_new_tokens=max_new_tokens,
            eos_ids=self._eos_ids,
            pad_id=tokenizers.pad_id(self._tokenizer),
            temperature=annotate.temperature,
            top_p=annotate.top_p,
            seed=annotate.seed,
            contrast_weight=annotate.contrast_weight
            if annotate.method in CONTRASTIVE_METHODS
            else None,
            contrast_stop=annotate.contrast_stop,
        )

    @property
    def is_continuous(self) -> bool:
        """Whether many requests at once are decoded faster than by `batch_size`."""
        has_contrasts = self._annotate.method in CONTRASTIVE_METHODS
        return not (has_contrasts or isinstance(self._model.shape, T5Config))

    def check(self, work: Work) -> None:
        """Check that all prompts of an item fit, however long the texts in them become.

        Raises:
          ValueError: a prompt too long for the model.
        """
        written = 0
        while request := work.request:
            self._tokens(request, request.messages, written=written)
            if request.contrast is not None:
                self._tokens(request, request.contrast)
            written += request.max_new_tokens
            nothing = Completion(
                text="", finish_reason="length", prompt_tokens=0, new_tokens=0
            )
            work.take(nothing)

    def __call__(
        self, requests: Sequence[Request], on_finish: Callable[[int, Completion], None]
    ) -> None:
        """Answer requests of one step together; all or none have a contrast.

        Args:
          requests: what is to be completed.
          on_finish: called with the number of each and its completion.

        Raises:
          ValueError: a prompt too long for the model.
        """
        prompt_ids = [self._tokens(request, request.messages) for request in requests]
        contrasts = [
            self._tokens(request, request.contrast)
            for request in requests
            if request.contrast is not None
        ]
        max_new_tokens = requests[0].max_new_tokens
        self._generator(max_new_tokens)(
            self._params,
            prompt_ids,
            contrasts=contrasts or None,
            seeds=[request.seed for request in requests],
            on_finish=lambda index, new: on_finish(
                index, self._completion(prompt_ids[index], new, max_new_tokens)
            ),
        )

    def _tokens(
        self, request: Request, messages: Messages, *, written: int = 0
    ) -> list[int]:
        """Tokenise a prompt as the model reads it.

        Args:
          request: its step.
          messages: of the prompt.
          written: tokens that texts of earlier steps may still add to it.
        """
        if self._chat is not None:
            [ids] = self._chat.prompt_ids([messages])
        else:
            encoder = tokenizers.TextEncoder(
                self._tokenizer, parse_special=self._data.parse_special
            )
            text = encoder.escape(prompts.plain(messages))
            [ids] = views.prompt_ids([text], self._tokenizer, DataConfig())
        shape = self._model.shape
        if isinstance(shape, T5Config):
            return loader.with_end(ids, shape.eos_id)
        limit = lm.max_prompt_length(shape, request.max_new_tokens)
        if len(ids) + written > limit:
            what = "may have up to" if written else "has"
            raise ValueError(
                f"example {request.id!r}: its {request.step} prompt {what} "
                f"{len(ids) + written} tokens, {max(0, limit)} fit before "
                f"{request.max_new_tokens} new ones: lower "
                f"annotate.max_new_tokens={self._annotate.max_new_tokens} (or the "
                "limit of the step) or annotate.num_demonstrations="
                f"{self._annotate.num_demonstrations}"
            )
        return ids

    def _text(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _completion(
        self, prompt: list[int], new: list[int], max_new_tokens: int
    ) -> Completion:
        text = self._text(new)
        if self._chat is not None and self._chat.asks_for_reasoning:
            text = f"{think.OPEN}\n{text}"  # which the prompt has
        cut = _before(text, self._annotate.stop)
        ended = len(new) < max_new_tokens and cut == text
        return Completion(
            text=cut,
            finish_reason="stop" if ended or cut != text else "length",
            prompt_tokens=len(prompt),
            new_tokens=len(new) + ended,
        )


class Stopped(Exception):
    """A request that was not made, because another one ended the run."""


class _Transient(Exception):
    """A failure that may pass; `wait` is the server's Retry-After, seconds."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class Server:
    """An OpenAI-compatible server, called through the official client by many threads.

    Too many requests, errors of the server, timeouts, lost connections and malformed
    answers are retried with growing delays. The timeout is that of a whole answer, and
    its size has a limit. The key comes from the environment and is written nowhere.

    Args:
      annotate: url, model, key_variable, num_retries, timeout, token_budget, sampling.
      spent: tokens that count against the budget already.

    Raises:
      ValueError: the client is not installed, or the variable has no key.
    """

    def __init__(self, annotate: AnnotateConfig, *, spent: int = 0) -> None:
        try:
            import openai
            import tenacity
        except ImportError as error:
            raise ValueError(
                f"annotate.backend='server' needs the package {error.name}: pip "
                "install 'kdjax[annotate]'"
            ) from error
        self._openai, self._annotate = openai, annotate
        self._key = "none"
        if annotate.key_variable:
            self._key = os.environ.get(annotate.key_variable, "").strip()
            if not self._key:
                raise ValueError(
                    f"annotate.key_variable={annotate.key_variable!r}: this variable "
                    "of the environment is not set: put the server's key there, or use "
                    "--config.annotate.key_variable='' for a server without one"
                )
            if not (self._key.isascii() and self._key.isprintable()):
                raise ValueError(
                    f"annotate.key_variable={annotate.key_variable!r}: the key in this "
                    "variable of the environment has a line break, or another "
                    "character that no key has: set it to the key alone"
                )
        # The client's own log of a request would have the prompt, and its headers.
        logging.getLogger("openai").setLevel(logging.WARNING)
        client_class = openai.DefaultHttpxClient
        client = client_class(transport=_bounded_transport(client_class))
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=annotate.url,
            timeout=float(annotate.timeout),
            max_retries=0,  # it does not see malformed answers, nor `stop`
            http_client=client,
            default_headers={"Accept-Encoding": "identity"},
        )
        self._stopped, self._aborted = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._spent, self._pending = spent, 0
        backoff = tenacity.wait_random_exponential(_FIRST_DELAY, _MAX_DELAY)

        def delay(state: tenacity.RetryCallState) -> float:
            """Return the backoff, or the server's longer wait."""
            error: Any = state.outcome and state.outcome.exception()
            return max(backoff(state), error.wait)

        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Transient),
            stop=tenacity.stop_after_attempt(annotate.num_retries + 1),
            wait=delay,
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )

    def __call__(self, request: Request) -> Completion:
        """Complete one request; called from many threads.

        Raises:
          ValueError: the server refuses key, model or request, every attempt failed, or
            the budget is spent.
          Stopped: `stop` was called.
        """
        try:
            return self._retrying(self._attempt, request)
        except _Transient as error:
            num_retries = self._annotate.num_retries
            raise ValueError(
                f"the server at {self._annotate.url} failed {num_retries + 1} times "
                f"for example {request.id!r} ({error}): start again when it is well, "
                f"or raise annotate.num_retries={num_retries}; what is done is kept"
            ) from None

    def stop(self) -> None:
        """Make no further request; those under way are completed."""
        self._stopped.set()

    def abort(self) -> None:
        """Make no further request, and wait for none."""
        self._stopped.set()
        self._aborted.set()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _attempt(self, request: Request) -> Completion:
        """Make one request within the budget; a failure that may pass is transient."""
        if self._stopped.is_set():
            raise Stopped
        self._reserve(request.max_new_tokens)
        try:
            return self._read(self._within_timeout(lambda: self._send(request)))
        finally:
            with self._lock:
                self._pending -= request.max_new_tokens

    def _within_timeout(self, send: Callable[[], str]) -> str:
        """Call a function in a thread that is left behind if it takes too long.

        The client's own timeout starts anew with each byte that comes.
        """
        outcomes: list[str | BaseException] = []
        done = threading.Event()

        def work() -> None:
            try:
                outcomes.append(send())
            except BaseException as error:
                outcomes.append(error)
            done.set()

        timeout = float(self._annotate.timeout)
        deadline = time.monotonic() + timeout
        threading.Thread(target=work, daemon=True).start()
        while not done.wait(_POLL_SECONDS):
            if self._aborted.is_set():
                raise Stopped
            if time.monotonic() > deadline:
                raise _Transient(f"no answer within annotate.timeout={timeout} s")
        if isinstance(outcomes[0], BaseException):
            raise outcomes[0]
        return outcomes[0]

    def _send(self, request: Request) -> str:
        """Send a request, and return the body of the answer."""
        annotate, openai = self._annotate, self._openai
        messages: Any = request.messages  # as plain dicts
        try:
            answer = self._client.chat.completions.with_raw_response.create(
                model=annotate.model,
                messages=messages,
                max_tokens=request.max_new_tokens,
                temperature=float(annotate.temperature),
                top_p=float(annotate.top_p),
                stop=list(annotate.stop) or openai.omit,
                seed=request.seed,
            )
        except openai.APITimeoutError:
            raise _Transient(
                f"no answer within annotate.timeout={annotate.timeout} s"
            ) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise _Transient(self._safe(f"no connection: {cause}")) from None
        except openai.APIStatusError as error:
            status = error.status_code
            if status not in _TRANSIENT_STATUSES and status < 500:
                raise ValueError(self._refusal(error, request)) from None
            raise _Transient(
                self._safe(f"status {status}: {_error_text(error)}"),
                _retry_after(error.response.headers.get("retry-after")),
            ) from None
        return answer.http_response.text

    def _read(self, body: str) -> Completion:
        """Parse the completion in an answer's body."""
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            message = choice["message"]
            text, reason = message["content"], choice["finish_reason"]
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            usage = answer.get("usage") or {}
            counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text = f"an answer that is no chat completion: {body[:100]!r}"
            raise _Transient(self._safe(text)) from None
        counts = [n if type(n) is int and n >= 0 else None for n in counts]
        with self._lock:
            self._spent += sum(n or 0 for n in counts)
        if isinstance(reasoning, str) and reasoning.strip():
            text = think.join_think(reasoning, text or "")
        if not isinstance(text, str | None) or not isinstance(reason, str):
            text = f"an answer with content {text!r}, finish_reason {reason!r}"
            raise _Transient(self._safe(text))
        if None in counts:
            if self._annotate.token_budget:
                raise ValueError(
                    f"annotate.token_budget={self._annotate.token_budget}: the server "
                    "does not say how many tokens it used: use 0"
                )
            counts = [None, None]
        return Completion(
            # Some leave the stop string in.
            text=_before(self._without_key(text or ""), self._annotate.stop),
            finish_reason=reason,
            prompt_tokens=counts[0],
            new_tokens=counts[1],
        )

    def _reserve(self, num_tokens: int) -> None:
        """Count a request's new tokens as pending, if the budget covers them."""
        budget = self._annotate.token_budget
        with self._lock:
            if budget and self._spent + self._pending + num_tokens > budget:
                raise ValueError(
                    f"annotate.token_budget={budget} is spent ({self._spent} tokens "
                    "used): raise it and start again; what is done is kept"
                )
            self._pending += num_tokens

    def _refusal(self, error: Any, request: Request) -> str:
        """Describe an error that no retry mends."""
        annotate, status = self._annotate, error.status_code
        if status in (401, 403):
            key = "its key" if annotate.key_variable else "requests without one"
            return (
                f"annotate.key_variable={annotate.key_variable!r}: the server at "
                f"{annotate.url} refuses {key} (status {status}): put a valid key "
                "into an environment variable and name that"
            )
        if status == 404:
            return self._safe(
                f"annotate.model={annotate.model!r}: unknown to the server at "
                f"{annotate.url}, or that is not the url of its API (status 404: "
                f"{_error_text(error)}): give the name it is served by"
            )
        return self._safe(
            f"annotate.model={annotate.model!r}: the server at {annotate.url} refuses "
            f"the {request.step} prompt of example {request.id!r} (status {status}: "
            f"{_error_text(error)})"
        )

    def _without_key(self, text: str) -> str:
        """Return a text without the key, unless that is so short as to be a word."""
        if len(self._key) < _SHORTEST_KEY:
            return text
        return text.replace(self._key, "[key]")

    def _safe(self, text: str) -> str:
        """Return one line without the key, which servers may repeat."""
        if self._annotate.key_variable:
            text = text.replace(self._key, "[key]")
        return " ".join(text.split())[:500]


def _check_finite(params: Any, path: str) -> None:
    """Check that no weight is infinite or not a number: texts would mean nothing.

    Raises:
      ValueError: one is.
    """
    leaves = jax.tree.leaves(params)
    is_finite = jax.jit(lambda xs: jnp.array([jnp.isfinite(x).all() for x in xs]))
    if not is_finite(leaves).all():
        raise ValueError(
            f"the model at {path} has weights that are infinite or not a number: "
            "export or download it again, or name another annotate.model"
        )


def _bounded_transport(client_class: Any) -> Any:
    """Make a transport whose answers end at the largest size there may be.

    Args:
      client_class: of the openai package, whose versions have different httpx packages.
    """
    package = client_class.__mro__[1].__module__.partition(".")[0]
    httpx: Any = importlib.import_module(package)

    class Body(httpx.SyncByteStream):  # type: ignore[misc]
        """The body of an answer, decompressed piece by piece."""

        def __init__(self, stream: Any, encoding: str) -> None:
            self._stream, self._decoder = stream, None
            if encoding in ("gzip", "x-gzip", "deflate"):
                self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)

        def __iter__(self) -> Iterator[bytes]:
            available = _MAX_ANSWER_BYTES
            for piece in self._stream:
                try:
                    if self._decoder is not None:
                        piece = self._decoder.decompress(piece, available + 1)
                except zlib.error as error:
                    raise httpx.DecodingError(f"damaged: {error}") from None
                available -= len(piece)
                if available < 0:
                    limit = _MAX_ANSWER_BYTES >> 20
                    raise httpx.DecodingError(f"an answer of more than {limit} MiB")
                yield piece

        def close(self) -> None:
            self._stream.close()

    class Transport(httpx.HTTPTransport):  # type: ignore[misc]
        """Connections whose answers are bounded."""

        def handle_request(self, request: Any) -> Any:
            response = super().handle_request(request)
            encoding = response.headers.get("content-encoding", "").strip().lower()
            if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
                response.close()
                raise httpx.DecodingError(f"an answer in encoding {encoding[:40]!r}")
            hidden = ("content-encoding", "content-length") if encoding else ()
            headers = [h for h in response.headers.multi_items() if h[0] not in hidden]
            return httpx.Response(
                response.status_code,
                headers=headers,
                stream=Body(response.stream, encoding),
                extensions=response.extensions,
            )

    return Transport()


def _before(text: str, stops: Sequence[str]) -> str:
    """Cut a text before the first of the stop strings."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _error_text(error: Any) -> str:
    """Return the text of a server's error, in whatever form."""
    return error.response.text.strip() or error.message


def _retry_after(header: str | None) -> float:
    """Parse the seconds of a Retry-After header, at most a minute; 0 for a date."""
    try:
        return min(_MAX_DELAY, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0
