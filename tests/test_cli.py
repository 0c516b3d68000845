"""The command line: help without imports, configs by name, errors in one line."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

import kdjax
from kdjax import __main__ as script
from kdjax import cli

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("command", script.COMMANDS)
def test_help_comes_before_jax_is_imported(command):
    process = run("-X", "importtime", "-m", f"kdjax.{command}", "--helpshort")
    assert f"python -m kdjax.{command}" in process.stdout
    assert "--config" in process.stdout and "--workdir" in process.stdout
    imported = re.findall(r"\| +([\w.]+)$", process.stderr, re.MULTILINE)
    assert "kdjax.config" in imported
    assert {"jax", "numpy", "torch", "transformers"}.isdisjoint(imported)
    assert "PyTorch" not in process.stderr


def test_the_console_script_is_python_m(monkeypatch):
    calls = []
    monkeypatch.setattr(runpy, "run_module", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(sys, "argv", ["kdjax", "train", "--config=quickstart"])
    script.main()
    assert calls == [("kdjax.train",)] and sys.argv == ["kdjax", "--config=quickstart"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_console_script_lists_the_commands(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["kdjax", *arguments])
    script.main()
    printed = capsys.readouterr().out
    assert kdjax.__version__ in printed
    for command in script.COMMANDS:
        assert re.search(rf"^  {command} +\w.+$", printed, re.MULTILINE)


def test_an_unknown_command_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kdjax", "teach"])
    with pytest.raises(SystemExit, match=r"^kdjax: error: command='teach' .*'train'"):
        script.main()


def test_every_module_beside_the_shared_ones_is_a_command():
    modules = {file.stem for file in (ROOT / "kdjax").glob("*.py")}
    assert modules - set(script.COMMANDS) == {"__init__", "__main__", "cli", "config"}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config=quickstart", "--config={configs}/quickstart.py"),
        ("-config=quickstart:smoke,hard", "-config={configs}/quickstart.py:smoke,hard"),
        ("--config=compare/kinship", "--config={configs}/compare/kinship.py"),
        ("--config=configs/quickstart.py", "--config=configs/quickstart.py"),
        ("--config=nowhere.py:smoke", "--config=nowhere.py:smoke"),
        ("--config.train.steps=3", "--config.train.steps=3"),
        ("--workdir=quickstart", "--workdir=quickstart"),
    ],
)
def test_configs_have_names(argument, expected):
    given = cli._config_argument(argument)
    assert given == expected.format(configs=ROOT / "configs")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=nowhere.py"], "no such file"),
        (["--config=nowhere"], "'compare/kinship'"),
        (["--config=quickstart", "--config.train.stepz=3"], "stepz"),
        (["--config=quickstart", "--config.train.steps=x"], "steps"),
        (["--config=configs/quickstart.py:nonsense"], "nonsense"),
        (["--config=quickstart", "--config.train.steps=-1"], "steps=-1"),
        (["--config=compare/kinship"], "must return a kdjax.config.Config"),
        ([], "--config is missing"),
    ],
)
def test_the_command_line_fails_in_one_line(flags, message, tmp_path):
    process = run("-m", "kdjax.train", f"--workdir={tmp_path}/w", *flags)
    assert process.returncode != 0
    lines = [line for line in process.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], process.stderr
    assert "Traceback" not in process.stderr
