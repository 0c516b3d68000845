"""A pytest plugin: CPU seconds per test file, held to twice those of tests/budget.json.

    python -m pytest -p tests.budget --budget=check     # fail if a file has doubled
    python -m pytest -p tests.budget --budget=write     # keep the measured seconds

On a slower machine, as the median of the files tells, the limits grow with it.
CPU seconds are those of the process that runs a test and of the processes it started
and waited for: unlike wall-clock time they hardly depend on what else the machine does.
Fixtures of a file count as the file's; those of the session, which any file may be the
first to ask for, are an entry of their own.
"""

import json
import os
import pathlib
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

BUDGET = pathlib.Path(__file__).with_name("budget.json")
SESSION = "session fixtures"
FACTOR = 2.0  # a file may take so many times its budget
MANY = 8  # files that tell how fast the machine is
SMALLEST = 10.0  # seconds; a smaller budget, or a file without, counts as this one


def overruns(
    seconds: Mapping[str, float], budget: Mapping[str, float]
) -> dict[str, float]:
    """Return the limits of the files that are above theirs; {} without a budget.

    Where most files take longer than their budget the machine is slower, by the median.
    """
    if not budget:
        return {}
    ratios = [s / budget[n] for n, s in seconds.items() if budget.get(n, 0) >= SMALLEST]
    slower = statistics.median(ratios) if len(ratios) >= MANY else 1.0
    factor = FACTOR * max(1.0, slower)
    limits = {name: factor * max(budget.get(name, 0.0), SMALLEST) for name in seconds}
    return {name: limit for name, limit in limits.items() if seconds[name] > limit}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --budget."""
    parser.addoption(
        "--budget",
        choices=("print", "check", "write"),
        default="print",
        help="CPU seconds per test file: print, check against the budget, or write it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start to count."""
    config.pluginmanager.register(_Meter(config.getoption("budget")))


class _Meter:
    """CPU seconds per test file, of this process or gathered from xdist's workers."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._seconds: Counter[str] = Counter()
        self._session_seconds = 0.0  # within the test that runs

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        start, self._session_seconds = _cpu_seconds(), 0.0
        result = yield
        spent = _cpu_seconds() - start
        self._seconds[item.nodeid.split("::")[0]] += spent - self._session_seconds
        if self._session_seconds:
            self._seconds[SESSION] += self._session_seconds
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[None]:
        start, inner = _cpu_seconds(), self._session_seconds
        try:
            return (yield)
        finally:
            if fixturedef.scope == "session":
                # Those it asked for are within its time.
                self._session_seconds = inner + _cpu_seconds() - start

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self._seconds.update(getattr(node, "workeroutput", {}).get("budget", {}))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["budget"] = dict(self._seconds)
        elif self._mode == "check" and not session.exitstatus and self._overruns():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        budget = _read()
        terminalreporter.section("CPU seconds per test file")
        for name, spent in self._seconds.most_common():
            line = f"{spent:8.1f} of {budget.get(name, 0.0):6.1f}  {name}"
            terminalreporter.write_line(line)
        if self._mode == "write":
            rounded = {n: round(s, 1) for n, s in sorted(self._seconds.items())}
            BUDGET.write_text(json.dumps(budget | rounded, indent=2) + "\n")
        for name, limit in self._overruns().items() if self._mode == "check" else ():
            terminalreporter.write_line(
                f"budget: {name} took {self._seconds[name]:.1f} CPU s, the limit is "
                f"{limit:.1f}: make it faster, or raise its entry of {BUDGET.name}",
                red=True,
            )

    def _overruns(self) -> dict[str, float]:
        return overruns(self._seconds, _read())


def _read() -> dict[str, float]:
    return json.loads(BUDGET.read_text()) if BUDGET.is_file() else {}


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those it has waited for."""
    return sum(os.times()[:4])
