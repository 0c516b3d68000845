"""results.csv and the page, from what runs left in their directories."""

import csv
import json
import pathlib

import pytest

from kdjax.comparison import results, runner
from tests.comparison.test_grid import comparison
from tests.comparison.test_grid import tasks as by_name

SUMMARY = {
    "student": {
        "accuracy": 0.6,
        "nll": 1.25,
        "exact_match/label": 0.6,
        "exact_match_strict/label": 0.5,
    },
    "teacher": {"accuracy": 0.8, "nll": 1.0},
    "parameters": {"student": 1000, "teacher": 5000},
    "tokens_per_second": 123.0,
}


def finish(folder: pathlib.Path, summary: dict, commands: tuple) -> None:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    done = {" ".join(command): 1.0 for command in commands}
    (folder / runner.FINISHED).write_text(json.dumps(done))


def fill(workdir: pathlib.Path, found: dict) -> None:
    """Runs of which one failed and one never started."""
    for number, (name, task) in enumerate(found.items()):
        if not task.is_run or name.endswith("multitask-soft-s7"):
            continue
        folder = workdir / name
        if name.endswith("finetune-hard-s7"):
            folder.mkdir(parents=True)
            (folder / runner.FAILED).write_text('{"error": "train: it, \\"broke\\""}')
            continue
        student = SUMMARY["student"] | {"exact_match_strict/label": 0.5 + number / 100}
        bins = {"counts": [1, 2], "confidences": [0.2, 1.5], "corrects": [0, 2]}
        summary = SUMMARY | {"student": student, "reliability": bins}
        finish(folder, summary, task.commands)


def test_numbers_of_a_run(tmp_path):
    finish(tmp_path / "run", SUMMARY, ())
    (tmp_path / "run" / "faithfulness.json").write_text('{"las": 0.5}')
    found = results.numbers(tmp_path / "run")
    assert found["answer_accuracy"] == 0.5
    assert found["answer_accuracy_lenient"] == 0.6
    assert found["retention"] == 0.6 / 0.8
    assert found["teacher_accuracy"] == 0.8
    assert found["parameters"] == 1000
    assert found["las"] == 0.5
    assert "tokens_per_second" not in found  # it differs from start to start


@pytest.mark.parametrize("view", ["factual", "rationale_then_label"])
def test_the_answer_is_that_of_the_explaining_view_if_there_is_no_other(tmp_path, view):
    student = {"nll": 1.0, f"answer_match_strict/{view}": 0.25}
    student |= {f"exact_match_strict/{view}": 0.0, f"answer_match/{view}": 0.3}
    finish(tmp_path / "run", SUMMARY | {"student": student}, ())
    found = results.numbers(tmp_path / "run")
    assert found["answer_accuracy"] == 0.25
    assert "retention" not in found


def test_a_row_a_run_whatever_became_of_it(tmp_path):
    found = by_name(comparison())
    fill(tmp_path, found)
    results.write(comparison(), list(found.values()), tmp_path)
    text = (tmp_path / results.RESULTS).read_text()
    rows = {row["run"]: row for row in csv.DictReader(text.splitlines())}
    assert len(rows) == 8
    assert rows["finetune-hard-s7"]["status"] == "failed"
    assert rows["finetune-hard-s7"]["error"] == 'train: it, "broke"'
    assert rows["finetune-hard-s7"]["answer_accuracy"] == ""
    assert rows["multitask-soft-s7"]["status"] == "not run"
    done = rows["finetune-soft-s0"]
    assert done["status"] == "done" and float(done["retention"]) == 0.6 / 0.8
    page = (tmp_path / results.REPORT).read_text()
    assert "finetune-hard-s7" in page and "it, &#34;broke&#34;" in page
    assert "Calibration" in page
    # The same runs give the same bytes.
    before = (text, page)
    results.write(comparison(), list(found.values()), tmp_path)
    names = (results.RESULTS, results.REPORT)
    assert tuple((tmp_path / name).read_text() for name in names) == before


def test_what_decoding_costs_is_that_of_the_runs_student(tmp_path):
    found = by_name(comparison(latency=True))
    fill(tmp_path, found)
    (name,) = (n for n in found if n.startswith("shared/latency"))
    (tmp_path / name / "latency.json").parent.mkdir(parents=True)
    (tmp_path / name / "latency.json").write_text('{"latency/1": 0.25}')
    rows = results.rows(list(found.values()), tmp_path)
    assert {row.get("latency/1") for row in rows if row["status"] == "done"} == {0.25}
    assert all("latency/1" not in row for row in rows if row["status"] != "done")


def test_means_over_seeds(tmp_path):
    found = by_name(comparison())
    fill(tmp_path, found)
    rows = results.rows(list(found.values()), tmp_path)
    lines = results.means(comparison(), rows)
    values = [
        r["answer_accuracy"] for r in rows if r["run"].startswith("finetune-soft")
    ]
    mean = sum(values) / 2
    deviation = abs(values[0] - values[1]) / 2**0.5
    assert lines[1] == {
        "method": "finetune",
        "labels": "soft",
        "answer_accuracy": f"{mean:.4g} ± {deviation:.2g}",
        "runs": "2/2",
    }
    assert lines[0]["runs"] == "1/2" and lines[3]["runs"] == "1/2"


def test_a_metric_that_no_run_has_is_refused_when_all_are_done(tmp_path):
    wanted = comparison(metrics=("magic",))
    found = by_name(wanted)
    fill(tmp_path, found)
    # A run that is not there yet may have it.
    results.write(wanted, list(found.values()), tmp_path)
    done = {
        name: task
        for name, task in found.items()
        if runner.finished(task, tmp_path) or not task.is_run
    }
    with pytest.raises(ValueError, match=r"metrics=\['magic'\].*answer_accuracy"):
        results.write(wanted, list(done.values()), tmp_path)


def test_nothing_has_run_yet(tmp_path):
    found = by_name(comparison())
    results.write(comparison(), list(found.values()), tmp_path)
    assert "not run" in (tmp_path / results.REPORT).read_text()


def test_ratings_by_people_beside_the_metrics(tmp_path):
    found = by_name(comparison())
    fill(tmp_path, found)
    study = tmp_path / "a study"
    study.mkdir()
    header = "table,outcome,condition,model,mean,low,high"
    lines = [
        "linear_mixed_means,quality,multitask-hard,condition,3.5,3.25,3.75",
        "linear_mixed_means,quality,placebo,condition,2.5,2.25,2.75",
        "linear_mixed_means,plausibility,multitask-hard,condition,1.5,1.25,1.75",
        "linear_mixed_means,quality,placebo,condition + length,9,9,9",
        "descriptives,quality,placebo,,9,9,9",
    ]
    wanted = comparison()
    wanted.study = str(study)
    with pytest.raises(ValueError, match=r"kdjax\.study analyse first"):
        results.write(wanted, list(found.values()), tmp_path)
    (study / "statistics.csv").write_text("\n".join([header, *lines]) + "\n")
    results.write(wanted, list(found.values()), tmp_path)
    page = (tmp_path / "report.html").read_text()
    section = page.partition('id="study"')[2].partition("<h2")[0]
    assert "a study/report.html" in section
    assert "3.50" in section and "3.25 to 3.75" in section
    assert "placebo" in section and "9.00" not in section
