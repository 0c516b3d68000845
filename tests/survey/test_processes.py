"""Real servers: killed at any moment, and many people at once."""

import json
import random
import threading
import time

import pytest

pytest.importorskip("starlette.testclient")

from kdjax.survey import guard
from kdjax.survey.answers import ANSWERS, Answers
from tests.survey import explanations, forms, load, processes

PEOPLE = 4


class Person(threading.Thread):
    """Answers one page after another, back and forth, until the server is gone."""

    def __init__(self, seed):
        super().__init__()
        self.draw = random.Random(seed)
        self.url, self.token = "", ""
        self.sent: dict[int, list[str]] = {}  # page -> what was acknowledged
        self.trying: tuple[int, str] | None = None

    def run(self):
        cookies = {guard.COOKIE: self.token} if self.token else {}
        self.trying = None
        try:
            with load.httpx.Client(
                base_url=self.url,
                cookies=cookies,
                follow_redirects=True,
                verify=False,
            ) as client:
                response = (
                    request(client, "GET", "/page/1")
                    if self.token
                    else forms.join(client)
                )
                self.token = self.token or client.cookies[guard.COOKIE]
                while True:
                    response = self._answer(client, response)
        except load.httpx.TransportError:
            pass

    def _answer(self, client, response):
        page = forms.Page(response.text)
        number = int(page.action.split("/")[-1])
        is_back = number == 5 or (number > 1 and self.draw.random() < 0.3)
        values = {name: self.draw.choice(v) for name, v in page.options.items()}
        text = " ".join(f"{k}={v}" for k, v in sorted(values.items()))
        self.trying = (number, text)
        data = page.hidden | values | {"go": "back" if is_back else "next"}
        response = request(
            client, "POST", page.action, data=data, follow_redirects=False
        )
        assert response.status_code == 303, response.text
        before = self.sent.setdefault(number, [])
        if not before or before[-1] != text:
            before.append(text)
        self.trying = None
        return request(client, "GET", response.headers["location"])


def request(client, method, path, **arguments):
    """Ask, again and again while there are too many requests."""
    while True:
        response = client.request(method, path, **arguments)
        if response.status_code != 429:
            return response
        time.sleep(0.1)


def stored(store, token):
    person = store.find(guard.token_hash(token))
    rows = store._reader().execute(
        "SELECT page, fields FROM answers WHERE participant = ? ORDER BY id",
        (person.id,),
    )
    pages: dict[int, list[str]] = {}
    for page, fields in rows:
        values = json.loads(fields)
        text = " ".join(f"{k}={v}" for k, v in sorted(values.items()))
        pages.setdefault(page + 1, []).append(text)
    return pages


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_server_loses_nothing_acknowledged(tmp_path, num_kills):
    explanations.study(tmp_path, exclude_failed=9)
    draw = random.Random(num_kills)
    people = [Person(seed) for seed in range(PEOPLE)]
    num_answers = 0
    for kill in range(num_kills):
        with processes.serve(tmp_path) as (url, process):
            for person in people:
                person.url = url
                person.start()
            time.sleep(draw.uniform(0.2, 1.0))
            process.kill()
            for person in people:
                person.join()
        successors = []
        with Answers(tmp_path / ANSWERS) as store:
            check = store._reader().execute("PRAGMA integrity_check").fetchone()
            assert check == ("ok",)
            for person in people:
                successor = Person(100 * kill + len(successors))
                successors.append(successor)
                if not person.token:
                    continue
                pages = stored(store, person.token)
                for page, sent in person.sent.items():
                    of_page = pages[page]
                    # Beyond what was acknowledged the one that was under way, at most.
                    assert of_page in (sent, [*sent, (person.trying or (0, ""))[1]])
                successor.token, successor.sent = person.token, pages
                num_answers += sum(map(len, pages.values()))
        people = successors
    assert num_answers > num_kills * PEOPLE


def test_many_people_at_once(tmp_path):
    assert load.run(tmp_path, people=24, think=0.05)
