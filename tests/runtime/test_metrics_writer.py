"""Metrics of a run: jsonl, TensorBoard events and curves."""

import json
import math
import re
import sys

import pytest

from kdjax.runtime import metrics_writer
from kdjax.runtime.metrics_writer import MetricsWriter


def _lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_metrics_events_and_curves(tmp_path):
    with MetricsWriter(tmp_path, total_steps=3) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0 / step, "loss/hard": 2.0, "kl": 0.5})
        writer.write(3, {"eval/nll": 1.5})
        writer.write_curves()
    assert _lines(tmp_path)[1] == {"step": 2, "loss": 0.5, "loss/hard": 2.0, "kl": 0.5}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (events,) = tmp_path.glob("events.*")
    assert b"loss/hard" in events.read_bytes()
    assert not list(tmp_path.glob("*.tmp*"))
    assert "tensorflow" not in sys.modules


def test_resume_drops_later_lines_and_one_cut_short(tmp_path):
    with MetricsWriter(tmp_path, total_steps=9) as writer:
        for step in (2, 4, 6):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    with MetricsWriter(tmp_path, total_steps=9, resume_step=4) as writer:
        writer.write(6, {"loss": 60.0})
    assert [(row["step"], row["loss"]) for row in _lines(tmp_path)] == [
        (2, 2.0),
        (4, 4.0),
        (6, 60.0),
    ]


def test_a_fresh_start_forgets_an_earlier_run(tmp_path):
    for value in (1.0, 2.0):
        with MetricsWriter(tmp_path, total_steps=1) as writer:
            writer.write(1, {"loss": value})
    assert _lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_every_line_is_valid_json_and_reads_back(tmp_path):
    with MetricsWriter(tmp_path, total_steps=1) as writer:
        writer.write(1, {"loss": float("inf")})
    assert _lines(tmp_path)[0]["loss"] == "inf"
    (row,) = metrics_writer.read_metrics(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "loss": float("inf")}


def test_other_processes_write_nothing(tmp_path):
    workdir = tmp_path / "run"
    with MetricsWriter(workdir, total_steps=1, is_main=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_curves()
    assert not workdir.exists()


def test_a_curve_of_one_point_is_visible_and_one_without_points_has_no_panel():
    rows = [
        {"step": 1, "loss": 2.0, "loss/hard": 1.0, "kl": math.nan},
        {"step": 2, "loss": 1.0, "loss/hard": 0.5, "kl": math.inf, "other": 1.0},
        {"step": 2, "eval/nll": 1.5},
    ]
    loss, held_out = metrics_writer.curves(rows).axes
    assert loss.get_ylabel() == "loss (nats)"
    assert [line.get_label() for line in loss.lines] == ["loss", "loss/hard"]
    assert held_out.get_ylabel() == "held-out NLL (nats)"
    (line,) = held_out.lines
    assert line.get_xydata().tolist() == [[2.0, 1.5]]
    assert line.get_marker() not in ("", "None", None)


def test_curves_without_any_metric():
    assert metrics_writer.curves([]).axes == []


def test_the_config_is_shown_as_a_text(tmp_path):
    with MetricsWriter(tmp_path, total_steps=1, config_json='{\n  "seed": 3\n}'):
        pass
    (events,) = tmp_path.glob("events.*")
    assert b'"seed": 3' in events.read_bytes()


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(
        ValueError, match=r"metrics.jsonl:2 is damaged: remove the line"
    ):
        MetricsWriter(tmp_path, total_steps=9, resume_step=4)
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is damaged"):
        metrics_writer.read_metrics(file)


def test_compiling_is_announced_with_its_time(tmp_path, capsys):
    with MetricsWriter(tmp_path, total_steps=2) as writer:
        for first in (True, False):
            with writer.compiling("the step", first):
                pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: compiling the step ..."
    assert re.fullmatch(r"train: compiled the step in \d+\.\d s", lines[1])
    assert len(lines) == 2
