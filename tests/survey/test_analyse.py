"""The analysis of a constructed study: planted effects, gaps and hostile names."""

import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from kdjax.survey import analyse, ratings
from tests.analysis import ratings as constructed

NAMES = ("bad", "<b>good</b>", "plain")


def write_study(file, *, effects=(-1.0, 0.5, 0.0), people=18, replace=()):
    """Write a study of three conditions and two constructs; return the file."""
    columns = [
        constructed.study(seed, people=people, items=12, rounds=2, effects=effects)
        for seed in (0, 0)
    ]
    _, what, who, seen = columns[0]
    rng = np.random.default_rng(1)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        names = ("participant", "item", "condition", "plausibility", "completeness")
        writer.writerow([*names, "length", "las"])
        for row in range(len(what)):
            values = [
                int(np.clip(np.round(3 + column[0][row] + 0.3 * rng.normal()), 1, 5))
                for column in columns
            ]
            if row in replace:
                values = ["", ""]
            length = 20 + 5 * what[row] + int(rng.integers(20))
            name = NAMES[what[row]]
            writer.writerow([who[row], seen[row], name, *values, length, rng.normal()])
    return file


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = write_study(tmp_path_factory.mktemp("study") / "r.csv", replace=(3, 40))
    table = ratings.read(file)
    tables = analyse.analyse(table, permutations=299, bootstraps=50)
    return {one.name: one for one in tables}


def test_the_planted_order_is_recovered(results):
    rows = {row["outcome"]: row for row in results["permutation"].rows}
    assert rows["all constructs together"]["p"] < 0.01
    assert rows["plausibility"]["p, Holm"] < 0.02
    for name in ("permutation_pairs", "linear_mixed_pairs"):
        signs = {
            row["pair"]: np.sign(row["difference"])
            for row in results[name].rows
            if row["outcome"] == "quality"
        }
        assert signs["<b>good</b> - bad"] == 1
        assert signs["bad - plain"] == -1
    odds = {
        row["pair"]: row["odds ratio"]
        for row in results["ordinal_mixed_pairs"].rows
        if row["outcome"] == "plausibility"
    }
    assert odds["<b>good</b> - bad"] > 1 > odds["bad - plain"]


def test_models_converge_and_say_so(results):
    assert {row["converged"] for row in results["variances"].rows} == {"yes"}
    effects = [row for row in results["linear_mixed"].rows if row["effect"] != "x"]
    assert {row["model"] for row in effects} == {
        "condition",
        "condition + length",
        "condition, maximal",
    }


def test_the_maximal_model_has_wider_intervals(results):
    widths: dict[str, list[float]] = {}
    for row in results["linear_mixed_pairs"].rows:
        widths.setdefault(row["model"], []).append(row["high"] - row["low"])
    plain, maximal = widths["condition"], widths["condition, maximal"]
    pairs = zip(maximal, plain, strict=True)
    assert all(wide > 0.999 * narrow for wide, narrow in pairs)
    known = {
        row["model"]: row.get("sd of participant x condition")
        for row in results["variances"].rows
    }
    assert known["condition"] is None and known["condition, maximal"] is not None


def test_missing_ratings_are_counted(results):
    shares = [row["share missing"] for row in results["descriptives"].rows]
    assert sum(share > 0 for share in shares) >= 3
    assert {row["ratings"] for row in results["permutation"].rows} == {106}


def test_the_page_is_complete_and_inert(results):
    page = analyse.render(list(results.values()), title="<script>")
    assert "<script" not in page and "<b>good" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3", "")
    for table in results.values():
        assert f'id="{table.name}"' in page
    assert "conditions differ" in page


def test_the_csv_has_every_row(results):
    lines = list(csv.DictReader(analyse.as_csv(list(results.values())).splitlines()))
    assert len(lines) == sum(len(table.rows) for table in results.values())
    assert {line["table"] for line in lines} == set(results)


def test_files_of_a_study(tmp_path, monkeypatch, capsys):
    write_study(tmp_path / "ratings.csv")
    (tmp_path / "design.json").write_text(
        json.dumps({"config": {"points": 5, "exclude_seconds": 3.0, "name": "mine"}})
    )
    small = {"permutations": 99, "bootstraps": 20}
    full = analyse.analyse
    monkeypatch.setattr(analyse, "analyse", lambda t, **k: full(t, **k, **small))
    analyse.run(tmp_path, reference="plain")
    assert "<h1>mine</h1>" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "statistics.csv").read_text().startswith("table,")
    assert "quality" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        "p1,q1,a,5,5\np1,q2,b,4,3\n",  # two ratings
        "p1,q1,a,5,5\np2,q2,b,4,3\np3,q1,a,4,4\np4,q2,b,3,3\n",  # between people
        "p1,q1,a,5,5\np1,q2,a,4,3\np2,q1,a,4,4\n",  # one condition
        "p1,q1,a,5,5\np1,q2,b,5,5\np2,q1,a,5,5\np2,q2,b,5,5\n",  # no variance
        "p1,q1,a,,\np1,q2,b,,\n",  # nothing rated
        "p1,q1,a,5,\np1,q2,b,4,\np2,q1,b,4,\np2,q2,a,3,\n",  # one construct rated
    ],
)
def test_what_cannot_be_estimated_is_said(tmp_path, rows):
    file = tmp_path / "r.csv"
    file.write_text(f"participant,item,condition,plausibility,completeness\n{rows}")
    tables = analyse.analyse(ratings.read(file), permutations=19, bootstraps=10)
    page = analyse.render(tables, title="small")
    assert "not estimable" in page or "not computable" in page
    assert "nan" not in page.lower().replace("nonantialiased", "")


def test_the_command_takes_another_group_s_table(tmp_path):
    file = tmp_path / "theirs.csv"
    file.write_text("Rater;Model;Good\na;x;4\na;y;5\nb;x;2\nb;y;3\n")
    command = [sys.executable, "-m", "kdjax.study", "analyse", f"--ratings={file}"]
    done = subprocess.run(
        [*command, "--columns=constructs=Good"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "permutation" in done.stdout
    folder = tmp_path / "theirs_analysis"
    assert {one.name for one in folder.iterdir()} == {"report.html", "statistics.csv"}
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "name its columns, --columns=constructs=a+b" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_an_unknown_reference_is_refused(tmp_path):
    table = ratings.read(write_study(tmp_path / "r.csv"))
    with pytest.raises(ValueError, match="reference='x' is no condition"):
        analyse.analyse(table, reference="x")


def test_a_study_of_which_nothing_is_left_says_why(tmp_path):
    table = ratings.read(write_study(tmp_path / "r.csv"))
    seconds = {"seconds": np.ones(len(table))}
    table = dataclasses.replace(table, numbers={**table.numbers, **seconds})
    with pytest.raises(ValueError, match=r"all 108 ratings .*\(108 too fast\)"):
        analyse.analyse(table, min_seconds=3.0)
