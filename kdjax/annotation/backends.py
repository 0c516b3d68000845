"""Who answers the prompts of an annotation: a model of this process, or a server."""

import json
import logging
import os
import random
import threading
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.annotation import prompts
from kdjax.annotation.prompts import Messages
from kdjax.annotation.requests import Completion, Request
from kdjax.config import AnnotateConfig, Config, T5Config
from kdjax.data import loader, views
from kdjax.data import tokenizer as tokenizers
from kdjax.experiment.models import load_model
from kdjax.models import hf, lm
from kdjax.models.generate import Decoding, Generator
from kdjax.parallel import sharding

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 60.0  # seconds before a request is repeated
_PASSING = (408, 409, 429)  # statuses that may be gone next time, as all from 500


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
        self._annotate, self._chat = config.annotate, config.data.chat_template
        self._tokenizer = tokenizers.load(hf.resolve(path))
        mesh = sharding.make_mesh(config.mesh, devices=jax.local_devices())
        num_slices = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-self._annotate.batch_size // num_slices) * num_slices
        self._model, self._params = load_model(path, mesh, dtype=config.train.dtype)
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        self._generate = Generator(
            self._model.shape,
            self._model.graphdef,
            self._decoding(),
            batch_size=self.batch_size,
            place=lambda array: jax.device_put(array, rows),
        )

    def _decoding(self) -> Decoding:
        """Return the decoding method of the config."""
        annotate, tokenizer = self._annotate, self._tokenizer
        eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        return Decoding(
            max_new_tokens=annotate.max_new_tokens,
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            temperature=annotate.temperature,
            top_p=annotate.top_p,
            seed=annotate.seed,
            contrast_weight=annotate.contrast_weight
            if annotate.method == "contrastive"
            else None,
        )

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer requests together, at most `batch_size`; all or none have a contrast.

        Raises:
          ValueError: a prompt too long for the model.
        """
        prompt_ids = [self._tokens(request, request.messages) for request in requests]
        contrasts = [
            self._tokens(request, request.contrast)
            for request in requests
            if request.contrast is not None
        ]
        continuations = self._generate(
            self._params,
            prompt_ids,
            contrasts=contrasts or None,
            seeds=[request.seed for request in requests],
        )
        return [
            self._completion(prompt, new)
            for prompt, new in zip(prompt_ids, continuations, strict=True)
        ]

    def _tokens(self, request: Request, messages: Messages) -> list[int]:
        """The prompt as the model reads it."""
        if self._chat:
            if self._tokenizer.chat_template is None:
                raise ValueError(
                    "data.chat_template=True: the model's tokenizer has no chat "
                    "template: use data.chat_template=False"
                )
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        else:
            [ids] = views.prompt_ids([prompts.plain(messages)], self._tokenizer)
        shape = self._model.shape
        if isinstance(shape, T5Config):
            return loader.with_end(ids, shape.eos_id)
        limit = lm.max_prompt_length(shape, self._annotate.max_new_tokens)
        if len(ids) > limit:
            raise ValueError(
                f"example {request.id!r}: its {request.step} prompt has {len(ids)} "
                f"tokens, {limit} fit: lower annotate.max_new_tokens="
                f"{self._annotate.max_new_tokens} or annotate.num_demonstrations="
                f"{self._annotate.num_demonstrations}"
            )
        return ids

    def _completion(self, prompt: list[int], new: list[int]) -> Completion:
        text = str(
            self._tokenizer.decode(
                new, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        ended = len(new) < self._annotate.max_new_tokens
        cut = _before(text, self._annotate.stop)
        return Completion(
            text=cut,
            finish_reason="stop" if ended or cut != text else "length",
            prompt_tokens=len(prompt),
            new_tokens=len(new) + ended,
        )


class Stopped(Exception):
    """A request that was not made, because another one ended the run."""


class Server:
    """An OpenAI-compatible server, asked by the official client from many threads.

    Too many requests, errors of the server, timeouts, lost connections and answers
    that make no sense are tried again, later each time. The key comes from the
    environment and is written nowhere.

    Args:
      annotate: url, model, key_variable, num_retries, timeout, token_budget, sampling.
      spent: tokens that count against the budget already.

    Raises:
      ValueError: the client is not installed, or the variable is not set.
    """

    def __init__(self, annotate: AnnotateConfig, *, spent: int = 0) -> None:
        try:
            import openai
        except ImportError as error:
            raise ValueError(
                "annotate.backend='server' needs the package openai: pip install "
                "'kdjax[annotate]'"
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
        # What the client logs of a request would have the prompt, and its headers.
        logging.getLogger("openai").setLevel(logging.WARNING)
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=annotate.url,
            timeout=float(annotate.timeout),
            max_retries=0,  # ours see malformed answers too
        )
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._spent, self._pending = spent, 0

    def __call__(self, request: Request) -> Completion:
        """Answers one request; called from many threads.

        Raises:
          ValueError: the server refuses key, model or request, no try succeeded, or the
            budget is spent.
          Stopped: `stop` was called.
        """
        for attempt in range(self._annotate.num_retries + 1):
            if self._stopped.is_set():
                raise Stopped
            self._reserve()
            try:
                completion, wait = self._try(request)
            finally:
                with self._lock:
                    self._pending -= 1
            if isinstance(completion, Completion):
                return completion
            delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**attempt)
            delay *= random.uniform(0.5, 1.0)  # waiting threads do not come together
            if attempt < self._annotate.num_retries:
                self._stopped.wait(max(wait, delay))
        raise ValueError(
            f"the server at {self._annotate.url} failed {attempt + 1} times for "
            f"example {request.id!r} ({completion}): start again when it is well, or "
            f"raise annotate.num_retries={self._annotate.num_retries}; what is done "
            "is kept"
        )

    def stop(self) -> None:
        """No request is made any more; those under way are answered."""
        self._stopped.set()

    def close(self) -> None:
        """Closes connections."""
        self._client.close()

    def _try(self, request: Request) -> tuple[Completion | str, float]:
        """The completion, or what went wrong in passing and the seconds to wait."""
        annotate, openai = self._annotate, self._openai
        messages: Any = request.messages  # as plain dicts
        try:
            answer = self._client.chat.completions.with_raw_response.create(
                model=annotate.model,
                messages=messages,
                max_tokens=annotate.max_new_tokens,
                temperature=float(annotate.temperature),
                top_p=float(annotate.top_p),
                stop=list(annotate.stop) or openai.omit,
                seed=request.seed,
            )
        except openai.APITimeoutError:
            return f"no answer within annotate.timeout={annotate.timeout} s", 0.0
        except openai.APIConnectionError as error:
            return self._safe(f"no connection: {error.__cause__ or error}"), 0.0
        except openai.APIStatusError as error:
            if error.status_code in _PASSING or error.status_code >= 500:
                wait = _seconds(error.response.headers.get("retry-after"))
                return self._safe(f"status {error.status_code}: {_said(error)}"), wait
            raise ValueError(self._refused(error, request)) from None
        return self._read(answer.http_response.text), 0.0

    def _read(self, body: str) -> Completion | str:
        """The completion in an answer's body, or what is wrong with it."""
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
            usage = answer.get("usage") or {}
            counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError):
            return self._safe(f"an answer that is no chat completion: {body[:100]!r}")
        with self._lock:
            self._spent += sum(n for n in counts if isinstance(n, int))
        if not isinstance(text, str | None) or not isinstance(reason, str):
            return f"an answer with content {text!r}, finish_reason {reason!r}"
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

    def _reserve(self) -> None:
        """Counts a request as under way, if the budget has room for its new tokens."""
        budget, each = self._annotate.token_budget, self._annotate.max_new_tokens
        with self._lock:
            if budget and self._spent + (self._pending + 1) * each > budget:
                raise ValueError(
                    f"annotate.token_budget={budget} is spent ({self._spent} tokens "
                    "used): raise it and start again; what is done is kept"
                )
            self._pending += 1

    def _refused(self, error: Any, request: Request) -> str:
        annotate, status = self._annotate, error.status_code
        if status in (401, 403):
            which = "its key" if annotate.key_variable else "requests without one"
            return (
                f"annotate.key_variable={annotate.key_variable!r}: the server at "
                f"{annotate.url} refuses {which} (status {status}): put a valid key "
                "into an environment variable and name that"
            )
        if status == 404:
            return self._safe(
                f"annotate.model={annotate.model!r}: unknown to the server at "
                f"{annotate.url}, or that is not the url of its API (status 404: "
                f"{_said(error)}): give the name it is served by"
            )
        return self._safe(
            f"annotate.model={annotate.model!r}: the server at {annotate.url} refuses "
            f"the {request.step} prompt of example {request.id!r} (status {status}: "
            f"{_said(error)})"
        )

    def _safe(self, text: str) -> str:
        """One line without the key, which servers may repeat."""
        if self._annotate.key_variable:
            text = text.replace(self._key, "[key]")
        return " ".join(text.split())[:500]


def _before(text: str, stops: Sequence[str]) -> str:
    """What comes before the first of the stop strings."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _said(error: Any) -> str:
    """What a server says about an error, in whatever form."""
    return error.response.text.strip() or error.message


def _seconds(header: str | None) -> float:
    """What a Retry-After header says, at most a minute; 0 for a date or nothing."""
    try:
        return min(_LONGEST_DELAY, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0
