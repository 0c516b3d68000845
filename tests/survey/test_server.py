"""The survey's pages through a test client: every way, and every refusal."""

import csv
import html
import re
import sqlite3
import time

import pytest

from kdjax.survey import design, export, guard, plan, server
from kdjax.survey.answers import ANSWERS, Answers
from tests.survey import explanations, forms

testclient = pytest.importorskip("starlette.testclient")

HOSTILE = (
    "<script>alert(1)</script> {{7*7}} {% raw %} \u202eevil\u202c </bdi></main>"
    "\x00\x1b[31m"
)


class Survey:
    """A planned study, served to test clients."""

    def __init__(self, workdir, **fields):
        self.workdir = workdir
        self.study = explanations.study(workdir, **fields)
        self.store = Answers(workdir / ANSWERS)
        self.keys = server.read_keys(workdir)
        self.app = self.make_app()

    def make_app(self, **options):
        options = {"request_rate": 1e4} | options
        return server.make_app(self.study, self.store, keys=self.keys, **options)

    def client(self, app=None, **options):
        return testclient.TestClient(app or self.app, **options)

    def rows(self):
        text = export.tables(self.study, self.store)[export.RATINGS]
        return list(csv.DictReader(text.splitlines()))


@pytest.fixture
def survey(tmp_path):
    survey = Survey(tmp_path)
    yield survey
    survey.store.close()


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """One with all kinds of pages, and hostile text."""
    survey = Survey(
        tmp_path_factory.mktemp("rich"),
        rationales={"plain": HOSTILE, "multitask": "long " * 300 + "x" * 100_000},
        controls=("placebo", "no_rationale"),
        participants=40,
        items_per_participant=10,
        simulation=True,
        preferences=2,
        points=7,
        completion_url="https://panel.example/complete?cc=ABC",
        completion_code="ABC",
        max_words=1000,
    )
    yield survey
    survey.store.close()


def test_all_pages_to_the_end(survey):
    client = survey.client()
    welcome = client.get("/")
    assert "voluntary" in welcome.text and "study@example.org" in welcome.text
    response = forms.join(client)
    kinds = [page.kind for page in design.pages(survey.study.layout, 0)]
    headings = []
    while "/page/" in str(response.url):
        heading = re.search("<h1>(.*?)</h1>", response.text)[1]
        headings.append(heading)
        assert f"Page {len(headings)} of {len(kinds)}" in response.text
        response = forms.answer(client, response)
    assert len(headings) == len(kinds)
    code = re.search('class="code">(.*?)<', response.text)[1]
    (person,) = survey.store.participants()
    assert person.code == code and person.finished
    assert client.get("/page/2").url.path == "/thanks"
    rows = survey.rows()
    assert [row["order"] for row in rows] == ["1", "2", "3", "4"]
    assert {row["plausibility"] for row in rows} == {"5"}
    expected = design.schedule(survey.study.layout, 0)
    for row, (question, condition) in zip(rows, expected, strict=True):
        assert row["question"] == survey.study.questions[question].id
        assert row["condition"] == survey.study.conditions[condition]
        assert row["item"] == f"{row['question']}|{row['condition']}"
        rationale = survey.study.questions[question].rationales[condition]
        assert int(row["length"]) == len(rationale.split())
        assert row["right"] == str(int(survey.study.questions[question].right[0]))
        assert row["finished"].endswith("Z") and float(row["seconds"]) >= 0


def test_nobody_sees_conditions_or_students(rich):
    client = rich.client()
    response = forms.join(client)
    while "/page/" in str(response.url):
        seen = f"{response.text} {response.url} {response.headers} {client.cookies}"
        for name in (*explanations.STUDENTS[1:], "placebo", "no_rationale"):
            assert name not in seen.replace("multitask says", "")
        assert not re.search(r"\bq\d+\b", seen)
        response = forms.answer(client, response)


def test_hostile_texts_are_inert(rich):
    client = rich.client()
    response = forms.join(client)
    seen = ""
    while "/page/" in str(response.url):
        page = forms.Page(response.text)
        assert "script" not in page.tags and page.tags.count("main") == 1
        assert len(response.content) < 40_000
        assert not re.search(r"[\x00\x1b]", response.text)
        for text in re.findall(r"[^<>]*\u202e[^<>]*", response.text):
            position = response.text.index(text)
            before = response.text[:position].rstrip()
            assert before.endswith('<bdi class="model" dir="auto">')
        seen += response.text
        response = forms.answer(client, response)
    assert html.escape("<script>alert(1)</script> {{7*7}}") in seen
    assert "only its beginning is shown" in seen
    assert "The program gave no explanation." in seen


def test_every_response_has_security_headers(rich):
    client = rich.client(follow_redirects=False)
    for response in (
        client.get("/"),
        client.get("/page/1"),
        client.get("/nowhere"),
        client.put("/"),
        client.get("/admin"),
        client.get("/style.css"),
        client.post("/consent", data={"nonce": "x"}),
        client.get("/resume/" + "a" * 43),
    ):
        for name, value in guard.HEADERS.items():
            if name != "cache-control":
                assert response.headers[name] == value, (response.url, name)
        assert "script" not in response.headers["content-security-policy"]
        assert not re.search(r'(src|href)="(https?:)?//', response.text)
    form = forms.Page(client.get("/").text).hidden
    cookie = client.post("/consent", data=form | {"agree": "1"}).headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
    secure = rich.client(rich.make_app(is_https=True), follow_redirects=False)
    form = forms.Page(secure.get("/").text).hidden
    cookie = secure.post("/consent", data=form | {"agree": "1"}).headers["set-cookie"]
    assert "Secure" in cookie


def test_back_reload_and_change(survey):
    client = survey.client()
    response = forms.answer(client, forms.join(client))  # practice
    response = forms.answer(client, response)  # the first rating
    path = response.url.path
    first = forms.answer(client, response, pick=lambda p, v: dict.fromkeys(v, "2"))
    assert client.get(first.url.path).text.count("checked") == 0
    # Half of the second, then back: both are there again.
    back = forms.answer(client, first, "back", pick=lambda p, v: {"s0": "4"})
    assert back.url.path == path
    assert set(forms.Page(back.text).checked.values()) == {"2"}
    again = forms.answer(client, back, pick=lambda p, v: dict.fromkeys(v, "3"))
    assert again.url.path == first.url.path
    assert forms.Page(again.text).checked == {"s0": "4"}
    assert set(forms.Page(client.get(path).text).checked.values()) == {"3"}
    # Every answer is still on disk; the last one counts.
    rows = survey.store._reader().execute("SELECT count(*) FROM answers").fetchone()
    assert rows == (5,)
    assert {row["plausibility"] for row in survey.rows()} == {"3", "4"}


def test_what_is_missing_is_said(survey):
    client = survey.client()
    response = forms.answer(client, forms.answer(client, forms.join(client)))
    path = response.url.path
    page = forms.Page(response.text)
    response = client.post(path, data=page.hidden | {"s1": "2", "go": "next"})
    assert response.status_code == 422
    page = forms.Page(response.text)
    assert 'role="alert"' in response.text and "<title>Error" in response.text
    assert page.checked == {"s1": "2"}
    for name in ("s0", "s2", "s3", "s4"):
        assert f'href="#{name}"' in response.text and f'id="{name}"' in response.text
    assert forms.answer(client, response).status_code == 200
    assert client.post(
        "/consent", data=forms.Page(survey.client().get("/").text).hidden
    ).url.path.startswith("/")


def test_consent_is_needed(survey):
    client = survey.client()
    form = forms.Page(client.get("/").text).hidden
    response = client.post("/consent", data=form)
    assert response.status_code == 422 and "tick the box" in response.text
    assert not survey.store.participants()
    assert client.get("/page/1").status_code == 403
    assert client.post("/page/1", data={}).status_code == 403
    assert client.get("/thanks").status_code == 403


def test_pages_come_in_order(survey):
    client = survey.client()
    forms.join(client)
    assert client.get("/page/4").url.path == "/page/1"
    assert client.get("/page/0").url.path == "/page/1"
    assert client.get("/page/99999999999999999999").url.path == "/page/1"


def test_resuming_by_link(survey):
    client = survey.client()
    response = forms.join(client)
    link = re.search(r'href="(http[^"]*/resume/[^"]*)"', response.text)[1]
    response = forms.answer(client, response)
    place = response.url.path
    other = survey.client()
    assert other.get(link).url.path == place
    finished = forms.finish(other, other.get("/page/2"))
    assert finished.url.path == "/thanks"
    assert client.get("/").status_code == 200 and len(survey.store.participants()) == 1
    # Somebody else's link, in the browser of a person who takes part.
    another = survey.client()
    forms.join(another)
    assert another.get(link).status_code == 403
    for token in ("a" * 43, "x", "' OR 1=1 --", "%00"):
        assert another.get(f"/resume/{token}").status_code == 404


def test_forms_belong_to_a_person_a_page_and_an_answer(survey):
    client, other = survey.client(), survey.client()
    mine = forms.Page(forms.join(client).text)
    forms.join(other)
    assert other.post(mine.action, data=mine.hidden).status_code == 403
    response = forms.answer(client, client.get("/page/1"))
    page = forms.Page(response.text)
    values = {name: "1" for name in page.options}
    wrong = client.post("/page/1", data=page.hidden | values)
    assert wrong.status_code == 403
    for change in ({"shown": "1"}, {"version": "7"}, {"signature": "0" * 64}):
        assert (
            client.post(page.action, data=page.hidden | values | change).status_code
            == 403
        )
    count = "SELECT count(*) FROM answers"
    before = survey.store._reader().execute(count).fetchone()
    first = client.post(page.action, data=page.hidden | values | {"go": "next"})
    # The same form again is the same answer ...
    again = client.post(page.action, data=page.hidden | values | {"go": "next"})
    assert first.url == again.url
    assert survey.store._reader().execute(count).fetchone() == (before[0] + 1,)
    # ... and an old form with another answer overwrites nothing unseen.
    values["s0"] = "5"
    stale = client.post(page.action, data=page.hidden | values | {"go": "next"})
    assert stale.status_code == 409 and "another window" in stale.text
    assert survey.store._reader().execute(count).fetchone() == (before[0] + 1,)
    assert forms.Page(stale.text).checked["s0"] == "5"
    forms.answer(client, stale)
    assert survey.store._reader().execute(count).fetchone() == (before[0] + 2,)


def test_a_finished_person_changes_nothing(survey):
    client = survey.client()
    response = forms.answer(client, forms.join(client))
    old = forms.Page(response.text)
    forms.finish(client, response)
    before = survey.rows()
    values = {name: "1" for name in old.options}
    response = client.post(old.action, data=old.hidden | values | {"go": "next"})
    assert response.url.path == "/thanks" and survey.rows() == before


@pytest.mark.parametrize(
    "change",
    [
        {"s0": "6"},
        {"s0": "0"},
        {"s0": "-1"},
        {"s0": "1e0"},
        {"s0": "1 "},
        {"s0": "\u0661"},
        {"s0": "1); DROP TABLE answers; --"},
        {"s9": "1"},
        {"'; DROP TABLE answers; --": "1"},
        {"s0": "x" * 10_000},
    ],
)
def test_answers_that_no_page_offers_are_refused(survey, change):
    client = survey.client()
    response = forms.answer(client, forms.answer(client, forms.join(client)))
    page = forms.Page(response.text)
    values = {name: "1" for name in page.options} | change
    response = client.post(page.action, data=page.hidden | values)
    assert response.status_code == 400
    assert not survey.rows()


def test_large_and_broken_forms_are_refused(survey):
    client = survey.client()
    response = forms.join(client)
    page = forms.Page(response.text)
    kind = {"content-type": "application/x-www-form-urlencoded"}

    def send(content):
        return client.post("/page/1", content=content, headers=kind).status_code

    assert send(b"a=" + b"x" * 100_000) == 413
    assert send(b"&".join(b"a%d=1" % i for i in range(100))) == 400
    assert send(b"shown=1&shown=2") == 400
    assert send(b"\xff\xfe") == 400
    assert send(b"shown=%ff") == 400
    assert send(b"") == 403
    site = {"sec-fetch-site": "cross-site"}
    assert client.post("/page/1", data=page.hidden, headers=site).status_code == 403
    assert client.get("/page/1").url.path == "/page/1"


def test_the_numbers_of_a_panel(survey):
    client = survey.client()
    query = "?PROLIFIC_PID=p1&STUDY_ID=s&SESSION_ID=t1"
    response = forms.join(client, query)
    response = forms.answer(client, response)
    assert survey.store.panel()[0][:4] == ("p1", "s", "t1", "0")
    # The same session in another browser goes on; another one of the person does not.
    other = survey.client()
    assert other.get(f"/{query}").url.path == response.url.path
    assert client.get("/page/1").status_code == 403  # one browser at a time
    third = survey.client()
    assert forms.join(third, query.replace("t1", "t2")).status_code == 403
    assert len(survey.store.participants()) == 1
    assert (
        third.get("/?PROLIFIC_PID=<script>&STUDY_ID=s&SESSION_ID=t").status_code == 400
    )
    forms.finish(other, other.get("/page/2"))
    tables = export.tables(survey.study, survey.store)
    assert "p1" in tables["panel.csv"] and "p1" not in tables[export.RATINGS]
    (person,) = survey.store.participants()
    assert person.id not in tables["panel.csv"]


def test_the_end_leads_back_to_the_panel(rich):
    client = rich.client()
    response = forms.finish(client, forms.join(client))
    assert 'href="https://panel.example/complete?cc=ABC"' in response.text
    assert ">ABC<" in response.text


def test_withdrawing_deletes(survey):
    client = survey.client()
    response = forms.join(client, "?PROLIFIC_PID=withdrawn1&STUDY_ID=s&SESSION_ID=t")
    for _ in range(3):
        response = forms.answer(client, response)
    (person,) = survey.store.participants()
    other = survey.client()
    forms.answer(other, forms.join(other))
    page = forms.Page(client.get("/withdraw").text)
    assert client.post("/withdraw", data={}).status_code == 403
    assert "deleted" in client.post("/withdraw", data=page.hidden).text
    assert client.get("/page/1").status_code == 403
    assert len(survey.store.participants()) == 1 and survey.store.num_withdrawn() == 1
    for file in survey.workdir.glob(f"{ANSWERS}*"):
        content = file.read_bytes()
        assert person.id.encode() not in content, file
        assert b"withdrawn1" not in content, file
    # The place is free again.
    third = survey.client()
    forms.join(third)
    assert {p.number for p in survey.store.participants()} == {0, 1}


def test_answers_are_only_appended(survey):
    client = survey.client()
    forms.answer(client, forms.join(client))
    with sqlite3.connect(survey.workdir / ANSWERS) as connection:
        with pytest.raises(sqlite3.DatabaseError, match="only appended"):
            connection.execute("UPDATE answers SET fields = '{}'")
        with pytest.raises(sqlite3.DatabaseError, match="withdrawal alone"):
            connection.execute("DELETE FROM answers")
    connection.close()


def test_places(survey):
    people = []
    for _ in range(16):
        client = survey.client()
        assert forms.join(client).status_code == 200
        people.append(client)
    full = forms.join(survey.client())
    assert full.status_code == 503 and "all its participants" in full.text

    # Who fails the checks makes a place free.
    def pick(page, values):
        return {n: "1" for n in values}

    forms.finish(people[5], people[5].get("/page/1"), pick=pick)
    failed = [p for p in survey.store.participants() if p.failed]
    assert [p.failed for p in failed] == [2]
    assert forms.join(survey.client()).status_code == 200
    numbers = sorted(p.number for p in survey.store.participants())
    assert numbers == sorted([*range(16), failed[0].number])
    # So does who stopped long ago.
    assert forms.join(survey.client()).status_code == 503
    with survey.store._transaction() as connection:
        connection.execute("UPDATE participants SET seen = 0 WHERE number = 3")
    client = survey.client()
    assert forms.join(client).status_code == 200
    assert {row["attention_failed"] for row in survey.rows()} == {"1"}


def test_a_consent_form_sent_twice_is_one_person(survey):
    client = survey.client(follow_redirects=False)
    form = forms.Page(client.get("/").text).hidden | {"agree": "1"}
    for _ in range(2):
        client.cookies.clear()
        assert client.post("/consent", data=form).status_code == 303
    assert len(survey.store.participants()) == 1
    form["nonce"] = "b" * 43
    client.cookies.clear()
    assert client.post("/consent", data=form).status_code == 403


def test_old_forms_are_refused(survey, monkeypatch):
    client = survey.client()
    page = forms.Page(forms.join(client).text)
    now = time.time()
    monkeypatch.setattr(server.time, "time", lambda: now + server.FORM_SECONDS + 1)
    assert client.post(page.action, data=page.hidden).status_code == 403


def test_the_administrator_needs_the_token(rich):
    client = rich.client()
    forms.finish(client, forms.join(client))
    admin = rich.client()
    assert 'type="password"' in admin.get("/admin").text
    for name in (export.RATINGS, "participants.csv", "server.json", "..%2fserver.json"):
        assert admin.get(f"/admin/{name}").status_code in (403, 404)
    page = forms.Page(admin.get("/admin").text)
    wrong = admin.post("/admin", data=page.hidden | {"token": "guess"})
    assert wrong.status_code == 403 and "not the token" in wrong.text
    token = rich.keys["admin_token"]
    assert admin.post("/admin", data={"token": token}).status_code == 403  # no form
    overview = admin.post("/admin", data=page.hidden | {"token": token})
    assert overview.url.path == "/admin"
    for name in rich.study.conditions:
        assert name in overview.text
    assert "median seconds" in overview.text
    table = admin.get("/admin/ratings.csv")
    assert table.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(table.text.splitlines()))
    assert "predicted" in rows[0] and {row["predicted"] for row in rows} <= {"0", "1"}
    assert admin.get("/admin/server.json").status_code == 404
    bearer = {"authorization": f"Bearer {token}"}
    for name in ("preferences.csv", "participants.csv"):
        response = rich.client().get(f"/admin/{name}", headers=bearer)
        assert len(response.text.splitlines()) > 1
    bearer["authorization"] = "Bearer guess"
    app = rich.make_app()
    codes = [
        rich.client(app).get("/admin/ratings.csv", headers=bearer).status_code
        for _ in range(25)
    ]
    assert codes[0] == 403 and codes[-1] == 429


def test_a_prediction_stays(rich):
    client = rich.client()
    response = forms.answer(client, forms.join(client))
    response = forms.answer(client, response)  # practice
    assert "What will the program answer?" in response.text
    path = response.url.path
    assert "The program&#39;s answer<" not in response.text
    old = forms.Page(response.text)
    response = forms.answer(client, response)
    assert "The program&#39;s answer<" in response.text
    assert client.get(path).url.path == response.url.path
    sent = client.post(path, data=old.hidden | {"p": "1", "go": "next"})
    assert sent.url.path == response.url.path
    back = forms.answer(client, response, "back", pick=lambda p, v: {})
    assert "Practice" in back.text


def test_requests_are_limited(survey):
    client = survey.client(survey.make_app(request_rate=1.0))
    forms.join(client)
    codes = [client.get("/page/1").status_code for _ in range(12)]
    assert codes[0] == 200 and codes[-1] == 429
    slow = client.get("/page/1")
    assert slow.headers["retry-after"] and "wait" in slow.text


def test_a_full_disk_is_said_and_loses_nothing(survey):
    client = survey.client()
    response = forms.answer(client, forms.join(client))
    writer = survey.store._writer
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    (before,) = writer.execute("SELECT count(*) FROM answers").fetchone()
    acknowledged = before
    for _ in range(400):
        response = forms.answer(
            client, response, "back" if acknowledged % 2 else "next"
        )
        if response.status_code == 507:
            break
        acknowledged += 1
        response = client.get("/page/2")
        pick = str(1 + acknowledged % 4)
        response = forms.answer(
            client, response, pick=lambda p, v, pick=pick: dict.fromkeys(v, pick)
        )
        if response.status_code == 507:
            break
    assert response.status_code == 507
    assert "no space left" in response.text and "safe" in response.text
    page = forms.Page(response.text)
    assert page.checked  # what was ticked is still there
    joined = forms.join(survey.client())
    assert joined.status_code in (200, 507)
    assert writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    writer.execute("PRAGMA max_page_count = 1000000")
    # The same form once more, with space again.
    assert forms.answer(client, response).status_code == 200


def test_a_changed_design_or_a_second_server_is_refused(tmp_path):
    from kdjax.runtime import locks

    with pytest.raises(ValueError, match="plan the study first"):
        server.run(tmp_path, host="127.0.0.1", port=0, is_https=False)
    explanations.study(tmp_path)
    with (
        locks.hold(tmp_path, file=".serve.lock"),
        pytest.raises(ValueError, match="is being written by"),
    ):
        server.run(tmp_path, host="127.0.0.1", port=0, is_https=False)
    file = tmp_path / plan.DESIGN
    file.write_text(file.read_text().replace('"participants": 16', '"participants": 8'))
    with pytest.raises(ValueError, match="changed after it was frozen"):
        server.run(tmp_path, host="127.0.0.1", port=0, is_https=False)


def test_secrets_are_private(survey):
    assert (survey.workdir / server.KEYS).stat().st_mode & 0o077 == 0
    assert server.read_keys(survey.workdir) == survey.keys
    content = (survey.workdir / ANSWERS).read_bytes()
    client = survey.client()
    forms.join(client)
    token = client.cookies[guard.COOKIE]
    for file in survey.workdir.glob(f"{ANSWERS}*"):
        assert token.encode() not in file.read_bytes()
    assert content


def luminance(colour):
    digits = colour * 2 if len(colour) == 3 else colour
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast(survey):
    """WCAG 2.2 AA: 4.5 for text, 3 for borders of controls; light and dark."""
    style = survey.client().get("/style.css").text
    schemes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): #(\w+);", scheme))
        for text, ground, least in (
            ("ink", "paper", 4.5),
            ("ink", "soft", 4.5),
            ("accent", "paper", 4.5),
            ("on-accent", "accent", 4.5),
            ("error", "paper", 4.5),
            ("line", "paper", 3.0),
        ):
            lights = sorted(luminance(colours[name]) for name in (text, ground))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= least, (text, ground)
