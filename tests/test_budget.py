"""The plugin that holds test files to their CPU seconds."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests import budget

TESTS = {
    "test_slow.py": """
import time, pytest

def burn(seconds):
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass

@pytest.fixture(scope="session")
def shared():
    burn(0.4)

@pytest.fixture(scope="module", autouse=True)
def own():
    yield burn(0.1)
    burn(0.1)

def test_slow(shared):
    burn(0.2)
""",
    "test_quick.py": "def test_quick(): pass",
}


def test_a_file_may_take_twice_its_budget():
    seconds = {"a": 39.0, "b": 41.0, "new": 19.0, "slow_new": 21.0, "small": 3.0}
    limits = budget.overruns(seconds, {"a": 20.0, "b": 20.0, "small": 1.0})
    assert limits == {"b": 40.0, "slow_new": 20.0}
    assert budget.overruns(seconds, {}) == {}


def test_on_a_slow_machine_limits_grow_with_all_files():
    names = "abcdefgh"
    seconds = {**dict.fromkeys(names, 30.0), "own": 59.0}
    entries = {**dict.fromkeys(names, 20.0), "own": 20.0}
    assert budget.overruns(seconds, entries) == {}
    assert budget.overruns(seconds | {"own": 61.0}, entries) == {"own": 60.0}
    quick = dict.fromkeys(names, 10.0) | {"own": 41.0}
    assert budget.overruns(quick, entries) == {"own": 40.0}


def test_the_budget_names_files():
    for name in budget._read():
        assert name == budget.SESSION or (budget.BUDGET.parents[1] / name).is_file()


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_seconds_are_measured_written_and_checked(tmp_path, workers):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "__init__.py").touch()
    source = pathlib.Path(budget.__file__).read_text()
    small = source.replace("SMALLEST = 10.0", "SMALLEST = 0.05")
    (folder / "budget.py").write_text(small)
    for name, text in TESTS.items():
        (folder / name).write_text(text)

    def run(mode: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.budget", workers]
        return subprocess.run(
            [*command, f"--budget={mode}", "-p", "no:cacheprovider", "tests"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    assert run("check").returncode == 0  # there is no budget yet
    assert run("write").returncode == 0
    written = json.loads((folder / "budget.json").read_text())
    assert written.keys() - {budget.SESSION} == {f"tests/{name}" for name in TESTS}
    assert 0.35 < written["tests/test_slow.py"] < 0.7
    assert 0.35 < written[budget.SESSION] < 0.7
    assert run("check").returncode == 0
    lower = written | {"tests/test_slow.py": 0.1}
    (folder / "budget.json").write_text(json.dumps(lower))
    process = run("check")
    assert process.returncode == 1
    assert "tests/test_slow.py took" in process.stdout
    assert " passed" in process.stdout.splitlines()[-1]
