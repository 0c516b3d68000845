"""Many people at once: python -m tests.survey.load --people=200 --think=2.

People join within one think time, then read each page for a random time of that mean;
what they were acknowledged is compared with what is stored.
"""

import argparse
import asyncio
import csv
import pathlib
import random
import statistics
import tempfile
import time

from starlette import testclient

from kdjax.survey import export, plan
from kdjax.survey.answers import ANSWERS, Answers
from tests.survey import explanations, forms, processes

httpx = testclient.httpx  # the client that this version of starlette has


async def take_part(url: str, seconds: list[float], *, think: float, seed: int):
    """Answer all pages; the plausibility sent for each rating, in order."""
    draw = random.Random(seed)
    sent = []
    async with httpx.AsyncClient(base_url=url, timeout=60, verify=False) as client:

        async def request(method, path, **arguments):
            start = time.perf_counter()
            response = await client.request(method, path, **arguments)
            seconds.append(time.perf_counter() - start)
            assert response.status_code in (200, 303), response.text
            return response

        await asyncio.sleep(draw.random() * think)
        form = forms.Page((await request("GET", "/")).text).hidden
        response = await request("POST", "/consent", data=form | {"agree": "1"})
        while response.headers["location"] != "/thanks":
            response = await request("GET", response.headers["location"])
            page = forms.Page(response.text)
            values = {k: draw.choice(v) for k, v in page.options.items()}
            if "s0" in values and "Practice" not in response.text:
                sent.append(values["s0"])
            await asyncio.sleep(draw.expovariate(1 / think) if think else 0)
            data = page.hidden | values | {"go": "next"}
            response = await request("POST", page.action, data=data)
    return sent


async def _crowd(url: str, people: int, think: float):
    seconds: list[float] = []
    runs = [take_part(url, seconds, think=think, seed=seed) for seed in range(people)]
    return await asyncio.gather(*runs), seconds


def run(workdir: pathlib.Path, people: int, think: float) -> list[float]:
    """Serve a study to `people` at once, and check all answers; seconds per request."""
    explanations.study(
        workdir,
        participants=people,
        ratings_per_item=people // 8,
        answers="any",
        exclude_failed=9,
    )
    with processes.serve(workdir) as (url, _):
        sent, seconds = asyncio.run(_crowd(url, people, think))
    study = plan.read(workdir)
    with Answers(workdir / ANSWERS) as store:
        table = export.tables(study, store)[export.RATINGS]
        (rows,) = store._reader().execute("SELECT count(*) FROM answers").fetchone()
        people_stored = store.participants()
    stored: dict[str, list[str]] = {}
    for row in csv.DictReader(table.splitlines()):
        stored.setdefault(row["participant"], []).append(row["plausibility"])
    assert sorted(stored.values()) == sorted(sent)  # none lost, none twice
    assert sorted(p.number for p in people_stored) == list(range(people))
    assert all(p.finished for p in people_stored)
    assert rows == people * (8 if study.layout.known_checks else 7)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--think", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        seconds = run(pathlib.Path(folder), arguments.people, arguments.think)
        wall = time.perf_counter() - start
    cuts = statistics.quantiles(seconds, n=100)
    print(f"{arguments.people} people, {len(seconds)} requests, {wall:.1f} s in all")
    print(
        f"ms: median {1e3 * cuts[49]:.1f}, p95 {1e3 * cuts[94]:.1f}, "
        f"p99 {1e3 * cuts[98]:.1f}, largest {1e3 * max(seconds):.1f}"
    )


if __name__ == "__main__":
    main()
