"""Tables and progress on a terminal and in a log."""

import sys

from kdjax.runtime import console


def test_progress_in_a_log_is_plain_lines_with_the_last_one(capsys):
    with console.progress(1000, "label", start=10) as advance:
        for _ in range(990):
            advance(1, note="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 3
    assert lines[0].startswith("label 11/1000")
    assert lines[-1] == "label 1000/1000  0 s left  loss 1.5"


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.progress(2, "label") as advance:
        advance(2, note="kl 0.1")
    shown = capsys.readouterr().err
    assert "label" in shown and "2/2" in shown and "kl 0.1" in shown


def test_other_processes_show_no_progress(capsys):
    with console.progress(2, "label", is_main=False) as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_table_shows_every_column(capsys):
    console.print_table("results", [{"model": "a", "nll": 1.23456}, {"kl": 0.5}])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("results", "model", "nll", "kl", "1.235"))


def test_brackets_in_names_are_no_markup(capsys, monkeypatch):
    console.print_table("run[/x] [bold]", [{"[a]": "b[/c]", "[red]n": 1.0}])
    shown = capsys.readouterr().out
    for text in ("run[/x] [bold]", "[a]", "b[/c]", "[red]n"):
        assert text in shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.progress(1, "label [/x]") as advance:
        advance(1, note="[/y] done")
    shown = capsys.readouterr().err
    assert "label [/x]" in shown and "[/y] done" in shown


def test_news_come_at_once_in_a_log(capsys):
    with console.progress(9, "train") as advance:
        advance(1)
        advance(0, "compiling the step ...")
        advance(0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["train: compiling the step ..."]
