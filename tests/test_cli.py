"""The command line: help without imports, configs by name, errors in one line."""

import errno
import logging
import os
import pathlib
import re
import runpy
import subprocess
import sys
import threading
import types

import pytest
from absl import flags
from ml_collections import config_flags

import kdjax
from kdjax import __main__ as script
from kdjax import cli
from kdjax import config as config_lib
from kdjax.runtime import files, locks

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
        (["--config=quickstart", "--config.train.stepz=3"], "mean train.steps?"),
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


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.stepz=3", "no such field; did you mean train.steps?"),
        ("--config.train.learning_rate=3", "mean .* or optim.learning_rate?"),
        ("--config.optim.lr=3", "optim has .*'learning_rate'"),
        ("--config.train=3", "is a part of a config, no field; .* train.steps"),
        ("--config.base.train.stepz=3", "--config.base.train.stepz: .* train.steps?"),
        ("--noconfig.data.promt_suffix", "did you mean data.prompt_suffix?"),
    ],
)
def test_an_unknown_field_gets_a_suggestion(argument, message):
    text = cli._suggestion(["train", "--config=quickstart", argument])
    assert re.search(message, text), text
    assert "--helpconfig" in text and "\n" not in text
    assert not cli._suggestion(["train", "--config.train.steps=3"])


def test_the_fields_of_a_config_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    cli._print_config()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("--config.train.steps=1000  (1 ") for line in lines)
    assert len(lines) == 2 * len(list(config_lib.leaves(config_lib.Config())))


SYSTEM_ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device", "/d/w"), "/d/w: No space left"),
    (PermissionError(errno.EACCES, "Permission denied", "/d/w"), "ls -l"),
    (OSError(errno.EROFS, "Read-only file system", "/d/w"), "can be written to"),
    (OSError(errno.EIO, "Input/output error", "/d/w"), "dmesg"),
    (OSError(errno.EMFILE, "Too many open files", "/d/w"), "ulimit -n"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "use a shorter"),
    (OSError(errno.ELOOP, "Too many levels of symbolic links", "/d/w"), "in a circle"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/d/w"), "name a folder"),
    (FileExistsError(errno.EEXIST, "File exists", "/d/w"), "or a link to nothing"),
    (FileNotFoundError(errno.ENOENT, "No such file", "/d/w"), "/d/w: no such file or"),
    (RuntimeError("write() failed: No space left on device; writing /d/s.rec"), "/d/s"),
    (
        ValueError(
            'OUT_OF_RANGE: Failed writing: "/d/c/5": Failed to write 4 bytes to file '
            "30: File too large [os_error_code='27']"
        ),
        "/d/c/5: File too large: raise the limit",
    ),
    (RuntimeError("[OS error 28: ENOSPC No space left on device]"), "--workdir="),
]


@pytest.mark.parametrize(("error", "expected"), SYSTEM_ERRORS)
def test_an_error_of_the_system_is_a_line_with_path_and_remedy(error, expected):
    text = cli._explain(error)
    assert expected in text and "\n" not in text and len(text) < 400
    for outer in (KeyError("k"), RuntimeError("orbax")):
        outer.__cause__ = error
        wrapped = cli._explain(outer)
        if not isinstance(error, FileNotFoundError):
            assert wrapped == text


@pytest.mark.parametrize("name", ["out", "workdir"])
def test_an_error_without_a_path_names_the_folder_that_is_written(monkeypatch, name):
    given = flags.FlagValues()
    for other in ("out", "workdir"):
        flags.DEFINE_string(other, None, "A folder.", flag_values=given)
    given(["kdjax.cache", f"--{name}=/d/w"])
    monkeypatch.setattr(flags, "FLAGS", given)
    text = cli._explain(OSError(errno.ENOSPC, "No space left on device"))
    assert text.startswith(f"a file of --{name}=/d/w: No space left on device: free")


def test_a_bug_keeps_its_traceback():
    for error in (KeyError("k"), TypeError("t"), RuntimeError("r"), AssertionError()):
        assert cli._explain(error) == ""


@pytest.mark.parametrize("kind", ["file", "dangling", "loop", "long", "below a file"])
def test_a_folder_that_cannot_be_is_a_line(tmp_path, kind):
    path = tmp_path / "w"
    if kind == "file":
        path.write_text("")
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long":
        path = tmp_path / ("w" * 300)
    else:
        path.write_text("")
        path /= "run"
    with pytest.raises(OSError) as raised, locks.hold(path):
        pass
    text = cli._explain(raised.value)
    assert text.startswith(str(path)[:60]) and text.count(": ") >= 2, text


def test_noise_of_libraries_is_kept_from_the_terminal(monkeypatch):
    for name in ("absl", "transformers", "orbax"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "filters", list(logger.filters))
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.delenv("KDJAX_TRACEBACK", raising=False)
    cli._quieten()
    logger = logging.getLogger("absl")

    def shown(text, path="x.py", exc_info=None):
        record = logging.LogRecord("absl", 30, path, 1, text, (), exc_info)
        return bool(logger.filter(record))

    assert shown("a shard is missing")
    assert not shown("None of PyTorch, TensorFlow was found")
    assert not shown("`save_pytree` is deprecated, use `save`")
    failure = (OSError, OSError(28, "full"), None)
    assert not shown("raised", "/site-packages/orbax/future.py", failure)


def test_a_result_clears_what_a_killed_process_left_of_it(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    name = files.temporary(file).name.replace(f"-{os.getpid()}", "-4194305")
    (tmp_path / name).write_text("{")
    monkeypatch.setattr(cli, "_JSON", types.SimpleNamespace(value=str(file)))
    cli.write_json({"nll": 1.0})
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["nothing", "file", "folder"])
def test_a_workdir_that_is_no_run_says_why(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        ValueError, match=rf"--workdir='.*{name}' (does not|is a|has no)"
    ):
        cli._config_of_run(tmp_path / name)
    (tmp_path / "folder" / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config.json is empty: give --config="):
        cli._config_of_run(tmp_path / "folder")


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_a_config_that_cannot_be_read_says_why(tmp_path):
    """A folder in place of a file; the system's reason is the same for a lost right."""
    parser = config_flags.config_flags.ConfigFileFlagParser("config")
    with pytest.raises(OSError) as raised:
        cli.check_type(parser.parse(str(tmp_path)), config_lib.Config)
    assert cli._explain(raised.value).startswith(f"{tmp_path}: Is a directory: ")


def test_output_that_nobody_reads_on_ends_quietly():
    """As of `kdjax.cache info ... | head -1`."""
    program = (
        "from kdjax import cli\n"
        "cli.run_actions(lambda _: [print('x' * 1000) for _ in range(1000)])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
