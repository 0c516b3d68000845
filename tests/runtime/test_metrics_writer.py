"""What a run leaves in its workdir."""

import builtins
import json
import sys

import pytest

from kdjax.runtime import metrics_writer


def _lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_metrics_events_summary_and_curves(tmp_path):
    with metrics_writer.Writer(tmp_path, total_steps=3) as run:
        for step in (1, 2, 3):
            run.write(step, {"loss": 1.0 / step, "loss/hard": 2.0, "kl": 0.5})
        run.write(3, {"eval/nll": 1.5})
        run.summary({"accuracy": 0.5, "student": {"nll": float("nan")}})
        run.curves()
    assert _lines(tmp_path)[1] == {"step": 2, "loss": 0.5, "loss/hard": 2.0, "kl": 0.5}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"accuracy": 0.5, "student": {"nll": "nan"}}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (events,) = tmp_path.glob("events.*")
    assert b"loss/hard" in events.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))
    assert "tensorflow" not in sys.modules


def test_resume_drops_later_lines_and_one_cut_short(tmp_path):
    with metrics_writer.Writer(tmp_path, total_steps=9) as run:
        for step in (2, 4, 6):
            run.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    with metrics_writer.Writer(tmp_path, total_steps=9, resume_step=4) as run:
        run.write(6, {"loss": 60.0})
    assert [(row["step"], row["loss"]) for row in _lines(tmp_path)] == [
        (2, 2.0),
        (4, 4.0),
        (6, 60.0),
    ]


def test_a_fresh_start_forgets_an_earlier_run(tmp_path):
    for value in (1.0, 2.0):
        with metrics_writer.Writer(tmp_path, total_steps=1) as run:
            run.write(1, {"loss": value})
    assert _lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_every_line_is_valid_json_and_reads_back(tmp_path):
    with metrics_writer.Writer(tmp_path, total_steps=1) as run:
        run.write(1, {"loss": float("inf")})
    assert _lines(tmp_path)[0]["loss"] == "inf"
    (row,) = metrics_writer.read_metrics(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "loss": float("inf")}


def test_other_processes_write_nothing(tmp_path, capsys):
    workdir = tmp_path / "run"
    with metrics_writer.Writer(workdir, total_steps=1, is_main=False) as run:
        run.write(1, {"loss": 1.0})
        run.summary({})
        run.curves()
        run.table("t", [{"a": 1}])
    with metrics_writer.progress(2, "label", is_main=False) as advance:
        advance()
    assert not workdir.exists()
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_log_is_plain_lines_with_the_last_one(capsys):
    with metrics_writer.progress(1000, "label", start=10) as advance:
        for _ in range(990):
            advance(1, note="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 3
    assert lines[0].startswith("label 11/1000")
    assert lines[-1] == "label 1000/1000  0 s left  loss 1.5"


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with metrics_writer.progress(2, "label") as advance:
        advance(2, note="kl 0.1")
    shown = capsys.readouterr().err
    assert "label" in shown and "2/2" in shown and "kl 0.1" in shown


def test_table_shows_every_column(capsys):
    metrics_writer.print_table("results", [{"model": "a", "nll": 1.23456}, {"kl": 0.5}])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("results", "model", "nll", "kl", "1.235"))


def test_curves_without_any_metric(tmp_path):
    metrics_writer.draw_curves([], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_missing_wandb_is_a_clear_error(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_wandb)
    with pytest.raises(ValueError, match="pip install wandb"):
        metrics_writer.Writer(tmp_path, total_steps=1, wandb_project="p")
