"""A robot takes part in a real browser: 24 people with known tendencies."""

import csv
import pathlib
import random
import re
import statistics

import pytest

from kdjax.survey import export, plan
from kdjax.survey.answers import ANSWERS, Answers
from tests.survey import explanations, processes

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("uvicorn")

CHROMIUM = pathlib.Path("/usr/bin/chromium")
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1100, "height": 900}
# What the robot reads in an explanation -> how far it agrees on average.
TENDENCIES = {
    "multitask": ("therefore", 4.3),
    "counterfactual": ("whereas", 3.5),
    "plain": ("perhaps", 2.8),
    "placebo": ("is the right answer to this question", 1.8),
}
RATIONALES = {
    name: f"Fruit is red, {cue} it fits."
    for name, (cue, _) in TENDENCIES.items()
    if name != "placebo"
}

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


class Person:
    """One robot, with a mood of its own."""

    def __init__(self, browser, url, seed, **habits):
        self.draw = random.Random(seed)
        self.mood = self.draw.gauss(0, 0.4)
        self.url, self.habits = url, habits
        size = PHONE if habits.get("phone") else DESKTOP
        self.context = browser.new_context(
            viewport=size, java_script_enabled=habits.get("script", True)
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))

    def join(self):
        self.page.goto(f"{self.url}/")
        self.page.check("#agree")
        self.page.click("button.main")

    def answer(self):
        """Answer the page that is shown."""
        text = self.page.inner_text("main")
        mean = next((m for cue, m in TENDENCIES.values() if cue in text), 3.0)
        for field in self.page.query_selector_all("fieldset"):
            options = field.query_selector_all("input")
            legend = field.query_selector("legend").inner_text()
            value = round(self.draw.gauss(mean + self.mood, 0.7))
            if instructed := re.search(r'choose "(.+)"', legend):
                labels = [o.inner_text() for o in field.query_selector_all("label")]
                value = 1 if self.careless else 1 + labels.index(instructed[1])
            if "days" in legend:
                value = 1 if self.careless else 2
            options[min(max(value, 1), len(options)) - 1].check()
        with self.page.expect_navigation():
            if self.habits.get("keyboard"):
                self.page.focus("fieldset input:checked, button.main")
                self.page.keyboard.press("Enter")
            else:
                self.page.click("button.main")

    @property
    def careless(self):
        return self.habits.get("careless", False)

    def take_part(self):
        self.join()
        while "/page/" in self.page.url:
            number = int(self.page.url.rsplit("/", 1)[1])
            if number == self.habits.get("stop"):
                break
            if number == self.habits.get("back"):
                with self.page.expect_navigation():
                    self.page.click("button[value=back]")
                assert self.page.locator("input:checked").count() >= 5
                self.answer()
                self.habits["back"] = 0
            if number == self.habits.get("reload"):
                self.page.reload()
            if self.habits.get("phone"):
                wide = self.page.evaluate(
                    "document.documentElement.scrollWidth > innerWidth"
                )
                assert not wide, number
            self.answer()
        self.context.close()
        assert all(request.startswith(self.url) for request in self.requests)


def habits(seed):
    """Of 24 people: 2 drop out, 2 are careless, others go back, reload, use a phone."""
    if seed in (7, 15):
        return {"stop": 4 + seed % 2}
    return {
        "careless": seed in (3, 20),
        "back": 5 if seed % 4 == 1 else 0,
        "reload": 4 if seed % 3 == 1 else 0,
        "phone": seed % 5 == 0,
        "keyboard": seed % 6 == 2,
        "script": seed % 5 == 0,  # it measures the phone's pages
    }


def rated(workdir):
    study = plan.read(workdir)
    with Answers(workdir / ANSWERS) as store:
        text = export.tables(study, store)[export.RATINGS]
        return list(csv.DictReader(text.splitlines())), store.participants()


@pytest.mark.slow
def test_24_people_recover_the_planted_order(browser, tmp_path):
    explanations.study(
        tmp_path,
        rationales=RATIONALES,
        participants=24,
        answers="any",
    )
    with processes.serve(tmp_path) as (url, _):
        for seed in range(24):
            Person(browser, url, seed, **habits(seed)).take_part()
    rows, people = rated(tmp_path)
    assert len(people) == 24
    assert sum(person.finished is not None for person in people) == 22
    failed = {row["participant"] for row in rows if row["attention_failed"] == "1"}
    assert len(failed) == 2
    means = {
        condition: statistics.mean(
            int(row[construct])
            for row in rows
            if row["condition"] == condition and row["participant"] not in failed
            for construct in ("plausibility", "satisfaction")
        )
        for condition in TENDENCIES
    }
    assert sorted(means, key=means.get, reverse=True) == list(TENDENCIES)
    for condition, (_, mean) in TENDENCIES.items():
        assert abs(means[condition] - mean) < 0.5
    assert len(rows) == 22 * 4 + sum(int(row["finished"] == "") for row in rows)


def test_one_person_in_a_browser_without_script(browser, tmp_path):
    explanations.study(tmp_path, rationales=RATIONALES)
    with processes.serve(tmp_path) as (url, _):
        person = Person(browser, url, 1, script=False, back=5, reload=4, keyboard=True)
        person.join()
        # Nothing ticked: the summary has the focus, and leads to the first question.
        person.answer()
        person.page.click("button.main")
        assert person.page.title().startswith("Error")
        link = person.page.locator(".summary a").first
        link.click()
        assert person.page.url.endswith("#s0")
        while "/page/" in person.page.url:
            person.answer()
        assert person.page.inner_text("h1") == "Thank you"
        person.context.close()
    rows, _ = rated(tmp_path)
    assert len(rows) == 4 and all(row["finished"] for row in rows)
