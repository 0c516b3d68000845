"""How a study goes: people, pages and conditions in numbers."""

import statistics
import time
from typing import Any

from kdjax.survey import design, export, forms
from kdjax.survey.answers import Answers
from kdjax.survey.plan import Study


def summarize(study: Study, store: Answers) -> dict[str, Any]:
    """Return the counts of the administrator's page."""
    people = store.participants()
    counts = {"finished": 0, "failed": 0, "taking part": 0, "stopped": 0}
    pages = design.pages(study.layout, 0)
    rows: list[dict[str, Any]] = [
        {
            "number": n,
            "kinds": {page.kind: None},
            "answered": 0,
            "stopped": 0,
            "seconds": [],
        }
        for n, page in enumerate(pages, start=1)
    ]
    conditions = dict.fromkeys(study.conditions, 0)
    idle = time.time() - 3600 * study.config.idle_hours
    for person in people:
        own, latest = design.pages(study.layout, person.number), store.latest(person.id)
        state = "taking part"
        if person.finished is not None:
            is_failed = (person.failed or 0) >= study.config.exclude_failed
            state = "failed" if is_failed else "finished"
        elif store.seen(person.id) < idle:
            state = "stopped"
            rows[min(forms.first_open(own, latest), len(own) - 1)]["stopped"] += 1
        counts[state] += 1
        for row, page in zip(rows, own, strict=True):
            row["kinds"].setdefault(page.kind)
        for index, answer in latest.items():
            if answer.complete:
                rows[index]["answered"] += 1
                rows[index]["seconds"].append(answer.seconds)
                if own[index].kind == design.RATING:
                    conditions[study.conditions[own[index].condition]] += 1
    for row in rows:
        seconds = row["seconds"]
        row["median"] = f"{statistics.median(seconds):.1f}" if seconds else "-"
    counts["withdrawn"] = store.num_withdrawn()
    spans = [p.finished - p.started for p in people if p.finished is not None]
    names = list(export.tables(study, store))
    return {
        "counts": counts,
        "places": study.layout.participants,
        "rows": rows,
        "conditions": conditions,
        "minutes": f"{statistics.median(spans) / 60:.1f}" if spans else "-",
        "tables": names,
        "study": study,
    }
