"""Backends that complete requests: a model of this process, or a server."""

import json
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.annotation import prompts
from kdjax.annotation.prompts import Messages
from kdjax.annotation.requests import CONTRASTIVE_METHODS, Completion, Request
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
_TRANSIENT_STATUSES = (408, 409, 429)  # worth a retry, as are all from 500


class Local:
    """A Hugging Face folder run by this process on its own devices.

    What is sampled for a request follows from its seed alone. Prompts go through the
    tokenizer's chat template where `data.chat_template` is set.

    Args:
      config: of the annotation.
      path: the folder, with its own tokenizer.

    Raises:
      ValueError: nothing to load there.
    """

    def __init__(self, config: Config, path: str) -> None:
        self._annotate, self._data = config.annotate, config.data
        self._tokenizer = tokenizers.load(hf.resolve(path))
        self._chat = None
        if config.data.chat_template:
            self._chat = ChatEncoder(self._tokenizer, config.data)
        self._eos_ids = stop_ids(config, self._tokenizer, (path,))
        mesh = sharding.make_mesh(config.mesh, devices=jax.local_devices())
        num_slices = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-self._annotate.batch_size // num_slices) * num_slices
        self._model, self._params = load_model(path, mesh, dtype=config.train.dtype)
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        self._place = lambda array: jax.device_put(array, rows)
        self._generators: dict[int, Generator] = {}  # by the limit of new tokens

    def _generator(self, max_new_tokens: int) -> Generator:
        """Return the generator of texts of at most so many tokens."""
        if max_new_tokens not in self._generators:
            self._generators[max_new_tokens] = Generator(
                self._model.shape,
                self._model.graphdef,
                self._decoding(max_new_tokens),
                batch_size=self.batch_size,
                place=self._place,
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

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer requests of one step together, at most `batch_size`.

        All or none have a contrast.

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
        continuations = self._generator(max_new_tokens)(
            self._params,
            prompt_ids,
            contrasts=contrasts or None,
            seeds=[request.seed for request in requests],
        )
        return [
            self._completion(prompt, new, max_new_tokens)
            for prompt, new in zip(prompt_ids, continuations, strict=True)
        ]

    def _tokens(self, request: Request, messages: Messages) -> list[int]:
        """Tokenise a prompt as the model reads it."""
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
        if len(ids) > limit:
            raise ValueError(
                f"example {request.id!r}: its {request.step} prompt has {len(ids)} "
                f"tokens, {limit} fit before {request.max_new_tokens} new ones: lower "
                f"annotate.max_new_tokens={self._annotate.max_new_tokens} (or the "
                "limit of the step) or annotate.num_demonstrations="
                f"{self._annotate.num_demonstrations}"
            )
        return ids

    def _completion(
        self, prompt: list[int], new: list[int], max_new_tokens: int
    ) -> Completion:
        text = str(
            self._tokenizer.decode(
                new, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        if self._chat is not None and self._chat.asks_for_reasoning:
            text = f"{think.OPEN}\n{text}"  # which the prompt has
        ended = len(new) < max_new_tokens
        cut = _before(text, self._annotate.stop)
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
    answers are retried with growing delays. The key comes from the environment and is
    written nowhere.

    Args:
      annotate: url, model, key_variable, num_retries, timeout, token_budget, sampling.
      spent: tokens that count against the budget already.

    Raises:
      ValueError: the client is not installed, or the variable is not set.
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
        # The client's own log of a request would have the prompt, and its headers.
        logging.getLogger("openai").setLevel(logging.WARNING)
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=annotate.url,
            timeout=float(annotate.timeout),
            max_retries=0,  # it does not see malformed answers, nor `stop`
        )
        self._stopped = threading.Event()
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

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _attempt(self, request: Request) -> Completion:
        """Make one request within the budget; a failure that may pass is transient."""
        if self._stopped.is_set():
            raise Stopped
        self._reserve(request.max_new_tokens)
        try:
            return self._read(self._send(request))
        finally:
            with self._lock:
                self._pending -= request.max_new_tokens

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
        except (ValueError, LookupError, TypeError, AttributeError):
            text = f"an answer that is no chat completion: {body[:100]!r}"
            raise _Transient(self._safe(text)) from None
        with self._lock:
            self._spent += sum(n for n in counts if isinstance(n, int))
        if isinstance(reasoning, str) and reasoning.strip():
            text = think.join_think(reasoning, text or "")
        if not isinstance(text, str | None) or not isinstance(reason, str):
            raise _Transient(
                f"an answer with content {text!r}, finish_reason {reason!r}"
            )
        if not all(isinstance(n, int) for n in counts):
            if self._annotate.token_budget:
                raise ValueError(
                    f"annotate.token_budget={self._annotate.token_budget}: the server "
                    "does not say how many tokens it used: use 0"
                )
            counts = [None, None]
        return Completion(
            text=_before(text or "", self._annotate.stop),  # some leave it in
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

    def _safe(self, text: str) -> str:
        """Return one line without the key, which servers may repeat."""
        if self._annotate.key_variable:
            text = text.replace(self._key, "[key]")
        return " ".join(text.split())[:500]


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
