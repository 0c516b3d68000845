"""What stands before every page: limits of requests and forms, security headers."""

import hashlib
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

COOKIE = "study"  # holds a person's token
MAX_BODY = 1 << 14  # bytes of a form
_MAX_FIELDS = 64
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Refusal(Exception):
    """A request that is answered by a message.

    Args:
      status: of HTTP.
      message: its name in the texts.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Limiter:
    """A limit of requests per key: `burst` at once, `rate` per second after that."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._levels: dict[str, tuple[float, float]] = {}  # tokens left, when

    def check(self, key: str) -> None:
        """Count a request.

        Raises:
          Refusal: there were too many.
        """
        now = time.monotonic()
        if len(self._levels) > 10_000:  # those that are full again are forgotten
            full = self._burst / self._rate
            self._levels = {k: v for k, v in self._levels.items() if now - v[1] < full}
        level, then = self._levels.get(key, (float(self._burst), now))
        level = min(self._burst, level + (now - then) * self._rate)
        if level < 1:
            raise Refusal(429, "busy")
        self._levels[key] = (level - 1, now)


def guarded(app: Any, refuse: Callable[[Refusal], Any], *, request_rate: float) -> Any:
    """Return an application with limits before it, and headers on every response.

    Args:
      app: of ASGI.
      refuse: makes the response of a refusal.
      request_rate: per second and person; an address may make 50 times as many.
    """
    from starlette.requests import Request

    people = Limiter(rate=request_rate, burst=int(6 * request_rate))
    hosts = Limiter(rate=50 * request_rate, burst=int(100 * request_rate))

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']} is not served")

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] += [
                    (name.encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.encode() not in present
                ]
            await send(message)

        request = Request(scope)
        try:
            hosts.check(host(request))
            if token := request.cookies.get(COOKIE):
                people.check(token_hash(token))
            # Forms of other sites, where the browser says so.
            if request.method == "POST" and request.headers.get(
                "sec-fetch-site", "same-origin"
            ) not in ("same-origin", "none"):
                raise Refusal(403, "forbidden")
        except Refusal as refusal:
            await refuse(refusal)(scope, receive, send_with_headers)
            return
        await app(scope, receive, send_with_headers)

    return application


async def read_form(request: Any) -> dict[str, str]:
    """Read a form of bounded size.

    Raises:
      Refusal: it is too large, or no form.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise Refusal(413, "large")
    try:
        pairs = urllib.parse.parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(body),
            errors="strict",
            max_num_fields=_MAX_FIELDS,
        )
    except ValueError:
        raise Refusal(400, "forbidden") from None
    form = dict(pairs)
    if len(form) < len(pairs):  # a field twice
        raise Refusal(400, "forbidden")
    return form


def token_hash(token: str) -> str:
    """Return what is stored of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def host(request: Any) -> str:
    """Return the address that a request comes from."""
    return request.client.host if request.client else ""
