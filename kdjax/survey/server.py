"""The survey as a web application: plain forms, no script.

Text of models is hostile input: it is escaped, bounded and isolated, and a page may
load nothing but its style sheet. A person is known by a random token in a cookie or a
link, of which a hash is stored; every form carries a signature of person, page and
time.
"""

import hashlib
import hmac
import json
import logging
import os
import pathlib
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import jinja2

from kdjax.analysis import extras
from kdjax.runtime import files, locks
from kdjax.survey import (
    answers,
    content,
    design,
    export,
    forms,
    guard,
    overview,
    plan,
)
from kdjax.survey.answers import Answers, Participant, StorageError
from kdjax.survey.guard import Limiter, Refusal
from kdjax.survey.plan import Study

logger = logging.getLogger(__name__)

KEYS = "server.json"  # the server's secrets
ADMIN_COOKIE = "admin"
COOKIE_SECONDS = 30 * 24 * 3600
KEEP_ALIVE_SECONDS = 75  # an idle connection stays: people read before they answer
FORM_SECONDS = 24 * 3600  # a form is valid for so long
_MAX_PAGE_SECONDS = 3600.0  # a longer visit counts as this
_PANEL_VALUE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


def run(workdir: pathlib.Path, *, host: str, port: int, is_https: bool) -> None:
    """Serve a planned study until the process is ended.

    Args:
      workdir: with design.json; answers are stored there.
      host: address to listen on.
      port: 0 takes a free one.
      is_https: a proxy on this machine adds TLS and says for whom it asks.

    Raises:
      ValueError: no design, or another server of it runs.
    """
    uvicorn = extras.load("uvicorn", extra="study")
    study = plan.read(workdir)
    with (
        locks.hold(workdir, file=".serve.lock"),
        Answers(workdir / answers.ANSWERS) as store,
    ):
        keys = read_keys(workdir)
        app = make_app(study, store, keys=keys, is_https=is_https)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=is_https,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family, backlog=1024) as server:
            address = server.getsockname()
            name = f"[{address[0]}]" if ":" in host else address[0]
            print(f"http://{name}:{address[1]}/")
            print(f"http://{name}:{address[1]}/admin, token in {workdir / KEYS}")
            print("Ctrl-C ends it; what was answered stays", flush=True)
            uvicorn.Server(config).run(sockets=[server])


def read_keys(workdir: pathlib.Path) -> dict[str, str]:
    """Read the server's secrets; the first time they are drawn."""
    file = workdir / KEYS
    if not file.exists():
        keys = {
            "secret": secrets.token_urlsafe(32),
            "admin_token": secrets.token_urlsafe(32),
        }
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as stream:
            json.dump(keys, stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(descriptor)
    keys = files.read_json(file, remedy="remove it; links of people become invalid")
    if not all(isinstance(keys.get(n), str) for n in ("secret", "admin_token")):
        raise ValueError(f"{file} has no secret and admin_token: remove it")
    return keys


def make_app(
    study: Study,
    store: Answers,
    *,
    keys: Mapping[str, str],
    is_https: bool = False,
    request_rate: float = 10.0,
) -> Any:
    """Return the application, for uvicorn or a test client.

    Args:
      study: a planned one.
      store: of its answers.
      keys: secret and admin_token.
      is_https: cookies are sent over TLS alone.
      request_rate: per second and person; all people of an address may make 50 times
        as many.
    """
    survey = _Survey(study, store, keys, is_https)
    return guard.guarded(survey.app(), survey.refuse, request_rate=request_rate)


class _Survey:
    """The pages."""

    def __init__(
        self, study: Study, store: Answers, keys: Mapping[str, str], is_https: bool
    ) -> None:
        self._study, self._store, self._is_https = study, store, is_https
        self._secret = keys["secret"].encode()
        self._admin_token = keys["admin_token"]
        self._texts = study.texts
        folder = pathlib.Path(__file__).parent / "pages"
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._style = (folder / "style.css").read_text()
        # Guesses of tokens and links, new people: far fewer than pages.
        self._guesses = Limiter(rate=0.2, burst=20)
        self._pages: dict[int, list[design.Page]] = {}

    def app(self) -> Any:
        """Return the routes as an application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = (
            ("/", "GET", self.welcome),
            ("/consent", "POST", self.consent),
            ("/page/{number:int}", "GET", self.page),
            ("/page/{number:int}", "POST", self.answer),
            ("/thanks", "GET", self.thanks),
            ("/withdraw", "GET", self.ask_withdraw),
            ("/withdraw", "POST", self.withdraw),
            ("/resume/{token}", "GET", self.resume),
            ("/admin", "GET", self.admin),
            ("/admin", "POST", self.admit),
            ("/admin/{file}", "GET", self.table),
            ("/style.css", "GET", self.style),
        )
        return Starlette(
            routes=[
                Route(path, self._endpoint(handler), methods=[method])
                for path, method, handler in routes
            ],
            exception_handlers={
                404: self._not_found,
                405: self._not_found,
                500: self._failed,
            },
        )

    # Pages of people.

    def welcome(self, request: Any, form: dict[str, str]) -> Any:
        """Show the consent form, or the way back to those who have agreed."""
        person = self._person(request)
        if person is not None:
            return self._render(
                "message.html.jinja",
                heading=self._texts["resume"]["heading"],
                text=self._texts["resume"]["text"],
                link=(self._place(person), self._texts["resume"]["link"]),
            )
        panel = _panel(request.query_params)
        if panel and (known := self._store.find_panel(panel)):
            # The session is known to the panel and to this person alone.
            return self._enter(known)
        return self._consent_page(panel)

    def consent(self, request: Any, form: dict[str, str]) -> Any:
        """Let a person take part who has agreed."""
        if self._person(request) is not None:
            return _redirect("/")
        nonce, shown = form.get("nonce", ""), form.get("shown", "")
        panel = _panel(form)
        if not _TOKEN.fullmatch(nonce):
            raise Refusal(403, "forbidden")
        self._check_form(form, "consent", nonce, *panel)
        if form.get("agree") != "1":
            return self._consent_page(panel, is_missing=True)
        # The same form sent twice is the same person.
        identity = self._sign("participant", nonce, shown)[:16]
        token = self._token("token", nonce, shown)
        try:
            person = self._store.join(
                identity,
                guard.token_hash(token),
                self._sign("code", identity)[:8].upper(),
                num_places=self._study.layout.participants,
                idle_seconds=3600 * self._study.config.idle_hours,
                exclude_failed=self._study.config.exclude_failed,
                panel=panel,
            )
        except answers.PanelError:
            raise Refusal(403, "forbidden") from None
        if person is None:
            raise Refusal(503, "full")
        return self._set_cookie(_redirect("/page/1"), token)

    def page(self, request: Any, form: dict[str, str]) -> Any:
        """Show a page; one that is not reached yet leads to the next open one."""
        person = self._known(request)
        index = request.path_params["number"] - 1
        pages, latest = self._pages_of(person), self._store.latest(person.id)
        first = forms.first_open(pages, latest)
        if person.finished is not None:
            return _redirect("/thanks")
        if not 0 <= index <= first or forms.is_locked(pages, latest, index):
            return _redirect(f"/page/{min(first, len(pages) - 1) + 1}")
        known = latest.get(index)
        return self._show(
            request,
            person,
            index,
            values=known.fields if known else {},
            version=known.version if known else 0,
        )

    def answer(self, request: Any, form: dict[str, str]) -> Any:
        """Store what a page was answered, and lead on or back."""
        person = self._known(request)
        index = request.path_params["number"] - 1
        pages, latest = self._pages_of(person), self._store.latest(person.id)
        self._check_form(form, "page", person.id, str(index), form.get("version", ""))
        if person.finished is not None:
            return _redirect("/thanks")
        first = forms.first_open(pages, latest)
        if not 0 <= index <= first or forms.is_locked(pages, latest, index):
            return _redirect(f"/page/{min(first, len(pages) - 1) + 1}")
        page_fields = forms.fields(self._study, pages[index])
        sent = {k: v for k, v in form.items() if k not in _FORM}
        try:
            values = forms.parse(page_fields, sent)
        except ValueError:
            raise Refusal(400, "forbidden") from None
        is_back = form.get("go") == "back"
        missing = forms.missing(page_fields, values)
        known = latest.get(index)
        version, seconds = int(form["version"]), _seconds(form["shown"])
        if missing and not is_back:
            return self._show(
                request,
                person,
                index,
                values=values,
                version=known.version if known else 0,
                missing=missing,
                shown=form["shown"],
                status=422,
            )
        error = ""
        # Going back from a page without an answer leaves none.
        if not (is_back and not values and page_fields):
            try:
                is_stored = self._store.append(
                    person.id,
                    index,
                    values,
                    version=version,
                    complete=not missing,
                    seconds=seconds,
                )
                if not is_stored:
                    error = "changed"
                    known = self._store.latest(person.id).get(index)
                elif not is_back and index == len(pages) - 1:
                    failed = forms.num_failed(
                        self._study, pages, self._store.latest(person.id)
                    )
                    self._store.finish(person.id, failed=failed)
                    return _redirect("/thanks")
            except StorageError as storage:
                logger.error("an answer was not stored: %s", storage)
                error = "full_disk" if storage.is_full else "not_stored"
        if error:
            return self._show(
                request,
                person,
                index,
                values=values,
                version=known.version if known else 0,
                message=self._texts["errors"][error],
                shown=form["shown"],
                status=409 if error == "changed" else 507,
            )
        target = index - 1 if is_back else index + 1
        while is_back and target > 0 and pages[target].kind == design.SIMULATION:
            target -= 1  # what was predicted stays
        return _redirect(f"/page/{max(target, 0) + 1}")

    def thanks(self, request: Any, form: dict[str, str]) -> Any:
        """Show the completion code."""
        person = self._known(request)
        if person.finished is None:
            return _redirect(self._place(person))
        config = self._study.config
        return self._render(
            "thanks.html.jinja",
            code=config.completion_code or person.code,
            url=config.completion_url,
            resume=self._resume_link(request),
        )

    def ask_withdraw(self, request: Any, form: dict[str, str]) -> Any:
        """Ask whether all answers are to be deleted."""
        person = self._known(request)
        return self._render(
            "withdraw.html.jinja",
            hidden=self._hidden("withdraw", person.id),
            back=self._place(person),
        )

    def withdraw(self, request: Any, form: dict[str, str]) -> Any:
        """Delete all answers of a person."""
        person = self._known(request)
        self._check_form(form, "withdraw", person.id)
        self._store.withdraw(person.id)
        words = self._texts["withdraw"]
        response = self._render(
            "message.html.jinja", heading=words["done_heading"], text=words["done"]
        )
        response.delete_cookie(guard.COOKIE, path="/")
        return response

    def resume(self, request: Any, form: dict[str, str]) -> Any:
        """Let a person go on who has the link."""
        token = request.path_params["token"]
        person = (
            self._store.find(guard.token_hash(token))
            if _TOKEN.fullmatch(token)
            else None
        )
        if person is None:
            self._guesses.check(guard.host(request))
            raise Refusal(404, "unknown")
        present = self._person(request)
        if present is not None and present.id != person.id:
            raise Refusal(403, "other")
        return self._set_cookie(_redirect(self._place(person)), token)

    def style(self, request: Any, form: dict[str, str]) -> Any:
        """Return the style sheet."""
        from starlette.responses import Response

        response = Response(self._style, media_type="text/css")
        response.headers["cache-control"] = "public, max-age=3600"
        return response

    # Pages of the administrator.

    def admin(self, request: Any, form: dict[str, str]) -> Any:
        """Show how the study goes, or ask for the token."""
        if not self._is_admin(request):
            return self._render(
                "admin_token.html.jinja", hidden=self._hidden("admin"), failed=False
            )
        return self._render(
            "admin.html.jinja", **overview.summarize(self._study, self._store)
        )

    def admit(self, request: Any, form: dict[str, str]) -> Any:
        """Check the administrator's token."""
        self._guesses.check(guard.host(request))
        self._check_form(form, "admin")
        token = form.get("token", "").strip()
        if not hmac.compare_digest(token.encode(), self._admin_token.encode()):
            return self._render(
                "admin_token.html.jinja",
                status=403,
                hidden=self._hidden("admin"),
                failed=True,
            )
        response = _redirect("/admin")
        response.set_cookie(
            ADMIN_COOKIE,
            self._sign("administrator", self._admin_token),
            path="/admin",
            httponly=True,
            samesite="strict",
            secure=self._is_https,
        )
        return response

    def table(self, request: Any, form: dict[str, str]) -> Any:
        """Return a table of the answers as csv."""
        from starlette.responses import Response

        if not self._is_admin(request):
            self._guesses.check(guard.host(request))
            raise Refusal(403, "forbidden")
        name = request.path_params["file"]
        tables = export.tables(self._study, self._store)
        if name not in tables:
            raise Refusal(404, "unknown")
        disposition = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(tables[name], media_type="text/csv", headers=disposition)

    # What all handlers share.

    def _endpoint(self, handler: Callable[[Any, dict[str, str]], Any]) -> Any:
        """Return a handler as a coroutine: the form is read, then a thread works."""
        from starlette.concurrency import run_in_threadpool

        def work(request: Any, form: dict[str, str]) -> Any:
            try:
                return handler(request, form)
            except Refusal as refusal:
                return self.refuse(refusal)
            except StorageError as error:
                logger.error("not stored: %s", error)
                name = "full_disk" if error.is_full else "not_stored"
                errors = self._texts["errors"]
                return self._render(
                    "message.html.jinja",
                    status=507,
                    heading=errors["title"],
                    text=errors[name],
                )

        async def endpoint(request: Any) -> Any:
            form: dict[str, str] = {}
            if request.method == "POST":
                try:
                    form = await guard.read_form(request)
                except Refusal as refusal:
                    return self.refuse(refusal)
            return await run_in_threadpool(work, request, form)

        return endpoint

    def refuse(self, refusal: Refusal) -> Any:
        """Return a message's page."""
        words = self._texts["messages"]
        response = self._render(
            "message.html.jinja",
            status=refusal.status,
            heading=words[f"heading_{refusal.message}"],
            text=words[refusal.message],
        )
        if refusal.status == 429:
            response.headers["retry-after"] = "5"
        return response

    def _not_found(self, request: Any, error: Exception) -> Any:
        return self.refuse(Refusal(404, "unknown"))

    def _failed(self, request: Any, error: Exception) -> Any:
        errors = self._texts["errors"]
        return self._render(
            "message.html.jinja",
            status=500,
            heading=errors["title"],
            text=errors["not_stored"],
        )

    def _render(self, template: str, *, status: int = 200, **values: Any) -> Any:
        from starlette.responses import HTMLResponse

        page = self._templates.get_template(template)
        text = page.render(t=self._texts, **({"person": False} | values))
        return HTMLResponse(text, status_code=status)

    def _show(
        self,
        request: Any,
        person: Participant,
        index: int,
        *,
        values: Mapping[str, int],
        version: int,
        missing: list[forms.Field] | None = None,
        message: str = "",
        shown: str = "",
        status: int = 200,
    ) -> Any:
        """Render a page with what was answered."""
        pages = self._pages_of(person)
        page = pages[index]
        return self._render(
            "page.html.jinja",
            status=status,
            person=True,
            kind=page.kind,
            number=index + 1,
            count=len(pages),
            fields=forms.fields(self._study, page),
            values=values,
            missing=missing or [],
            message=message,
            item=content.item(self._study, page),
            resume=self._resume_link(request) if index == 0 else "",
            hidden={
                **self._hidden("page", person.id, str(index), str(version), at=shown),
                "version": str(version),
            },
        )

    def _consent_page(self, panel: tuple[str, ...], *, is_missing: bool = False) -> Any:
        nonce = secrets.token_urlsafe(32)
        return self._render(
            "consent.html.jinja",
            status=422 if is_missing else 200,
            is_missing=is_missing,
            hidden={
                **self._hidden("consent", nonce, *panel),
                "nonce": nonce,
                **dict(zip(answers.PANEL, panel, strict=False)),
            },
        )

    def _person(self, request: Any) -> Participant | None:
        token = request.cookies.get(guard.COOKIE, "")
        return (
            self._store.find(guard.token_hash(token))
            if _TOKEN.fullmatch(token)
            else None
        )

    def _known(self, request: Any) -> Participant:
        person = self._person(request)
        if person is None:
            raise Refusal(403, "start")
        return person

    def _place(self, person: Participant) -> str:
        """Return where a person goes on."""
        if person.finished is not None:
            return "/thanks"
        pages, latest = self._pages_of(person), self._store.latest(person.id)
        return f"/page/{min(forms.first_open(pages, latest), len(pages) - 1) + 1}"

    def _pages_of(self, person: Participant) -> list[design.Page]:
        return self._pages_for(person.number)

    def _pages_for(self, number: int) -> list[design.Page]:
        if number not in self._pages:
            self._pages[number] = design.pages(self._study.layout, number)
        return self._pages[number]

    def _enter(self, person: Participant) -> Any:
        """Return a person of the panel to its place, in this browser from now on."""
        token = secrets.token_urlsafe(32)
        self._store.replace_token(person.id, guard.token_hash(token))
        return self._set_cookie(_redirect(self._place(person)), token)

    def _set_cookie(self, response: Any, token: str) -> Any:
        response.set_cookie(
            guard.COOKIE,
            token,
            max_age=COOKIE_SECONDS,
            path="/",
            httponly=True,
            samesite="lax",
            secure=self._is_https,
        )
        return response

    def _resume_link(self, request: Any) -> str:
        base = request.base_url
        scheme = "https" if self._is_https else base.scheme
        return f"{scheme}://{base.netloc}/resume/{request.cookies[guard.COOKIE]}"

    def _hidden(self, *purpose: str, at: str = "") -> dict[str, str]:
        """Return the signed fields of a form."""
        shown = at or str(int(1000 * time.time()))
        return {"shown": shown, "signature": self._sign("form", *purpose, shown)}

    def _check_form(self, form: Mapping[str, str], *purpose: str) -> None:
        """Check that this server made a form, for this person, not long ago.

        Raises:
          Refusal: it did not.
        """
        shown = form.get("shown", "")
        signature = self._sign("form", *purpose, shown)
        given = form.get("signature", "")
        if not hmac.compare_digest(signature.encode(), given.encode()):
            raise Refusal(403, "forbidden")
        if not 0 <= time.time() - int(shown) / 1000 <= FORM_SECONDS:
            raise Refusal(403, "forbidden")

    def _sign(self, *values: str) -> str:
        text = json.dumps(values).encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    def _token(self, *values: str) -> str:
        return self._sign(*values)[:43]

    def _is_admin(self, request: Any) -> bool:
        cookie = request.cookies.get(ADMIN_COOKIE, "")
        expected = self._sign("administrator", self._admin_token)
        if hmac.compare_digest(cookie.encode(), expected.encode()):
            return True
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self._admin_token.encode())


_FORM = ("shown", "signature", "version", "go")  # fields of every page's form


def _panel(values: Mapping[str, str]) -> tuple[str, ...]:
    """Return the panel's three numbers; () unless all are there and plain.

    Raises:
      Refusal: one is not plain.
    """
    panel = tuple(values.get(name, "") for name in answers.PANEL)
    if not any(panel):
        return ()
    if not all(_PANEL_VALUE.fullmatch(value) for value in panel):
        raise Refusal(400, "forbidden")
    return panel


def _seconds(shown: str) -> float:
    """Return the seconds since a page was shown."""
    return min(max(time.time() - int(shown) / 1000, 0.0), _MAX_PAGE_SECONDS)


def _redirect(path: str) -> Any:
    from starlette.responses import RedirectResponse

    return RedirectResponse(path, status_code=303)
