"""Commands killed, on full disks or without a right, and started again.

    python -m tests.kills [--num=200] [--disk=40] [--permission=20] [--seed=0]
        [--commands=train,label] [--kinds=time,event,disk,permission] [--folder=DIR]

Each command runs undisturbed first. Then it is killed -9 after a random part of the CPU
time that this took, or at a random event: before a file is opened to be written,
renamed, linked, removed or synced, or in the middle of a write. Or its disk is full at
a random size, or a file or folder may not be read or written, by a process without
root's rights. Started again it must end with the undisturbed result. A table of all of
that is printed; what went wrong is kept in `faults/`. It needs root on Linux, for disks
of a given size.

A start is a fork of this process, which has imported everything and computed nothing.
"""

import argparse
import ctypes
import dataclasses
import fcntl
import importlib
import json
import mmap
import multiprocessing
import os
import pathlib
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests import kill_cases, xla_flags
from tests.kill_cases import CASES

KINDS = ("time", "event", "disk", "permission")
_FORK = multiprocessing.get_context("fork")
_CHANGES = ("rename", "mkdir", "rmdir", "remove", "link", "symlink", "truncate")
_EVENTS = {f"os.{name}" for name in _CHANGES}
_PIPE_BYTES = 1 << 20  # of output that is kept while a command runs
_POLL_SECONDS = 0.01
# Of Linux: <linux/capability.h>, <linux/prctl.h>, <linux/securebits.h>
_CAPABILITIES_VERSION, _SET_SECUREBITS, _NO_ROOT = 0x20080522, 28, 1
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass
class End:
    """How a command ended."""

    code: int  # negative: the signal that killed it
    output: str
    cpu: float  # seconds, of its children, too


class Events:
    """Counts changes of files below a folder; kills the process before one of them."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = str(folder)
        self._memory = mmap.mmap(-1, 8)  # shared with forks

    @property
    def count(self) -> int:
        return int.from_bytes(self._memory[:8], "little")

    def watch(self, last: int = 0) -> None:
        """Count from now on, in this process; it dies at number `last` (0: never)."""
        self._memory[:8] = bytes(8)
        main, sync = os.getpid(), os.fsync

        def count() -> None:
            number = self.count + 1
            self._memory[:8] = number.to_bytes(8, "little")
            if number == last:
                os.kill(main, signal.SIGKILL)
                time.sleep(60)  # another process of the command waits for its end

        def hook(name: str, arguments: tuple) -> None:
            is_write = name == "open" and bool(
                arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if (is_write or name in _EVENTS) and self._folder in str(arguments[:2]):
                count()

        def counted(descriptor: int) -> None:
            count()
            sync(descriptor)

        os.fsync = counted
        sys.addaudithook(hook)


def run(argv: list[str], *, before: Callable = lambda: None, limit: float = 0) -> End:
    """Run a command in a fork; `limit` seconds of CPU time kill it."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    _wait_for_quiet()
    process = _FORK.Process(target=_command, args=(argv, writer, before))
    process.start()
    assert process.pid
    used = 0.0
    while process.exitcode is None:
        used = max(used, _cpu_seconds(process.pid))
        if limit and used > limit:
            os.kill(process.pid, signal.SIGKILL)
        process.join(_POLL_SECONDS)
    os.set_blocking(reader, False)
    try:
        output = os.read(reader, _PIPE_BYTES).decode(errors="replace")
    except BlockingIOError:
        output = ""
    os.close(reader), os.close(writer)
    return End(process.exitcode, output, used)


def _command(argv: list[str], writer: int, before: Callable) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(writer, stream)
    os.close(writer)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before()
    module, *sys.argv[1:] = argv
    runpy.run_module(f"kdjax.{module}", run_name="__main__", alter_sys=True)


def _cpu_seconds(session: int) -> float:
    """Return the CPU time of the living processes of a session."""
    ticks = 0
    for folder in os.scandir("/proc"):
        if not folder.name.isdecimal() or int(folder.name) < session:
            continue
        try:
            text = pathlib.Path(folder.path, "stat").read_text()
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def call(function: Callable, *arguments):
    """Return what a function does in a fork."""
    reader, writer = _FORK.Pipe(duplex=False)

    def work() -> None:
        writer.send(function(*arguments))

    process = _FORK.Process(target=work)
    process.start()
    writer.close()
    value = reader.recv()
    process.join()
    return value


class Bench:
    """The undisturbed runs of commands, and a place where they are disturbed."""

    def __init__(self, base: pathlib.Path, seed: int) -> None:
        self.base, self.place = base, base / "case"
        self.draws = random.Random(seed)
        self.seed = seed
        self.cpu: dict[str, float] = {}
        self.events: dict[str, int] = {}
        self.wanted: dict[str, dict[str, str]] = {}
        self.sizes: dict[str, list[int]] = {}  # of the files that the command wrote
        self.faults: list[str] = []

    def reset(self, start: pathlib.Path | None = None) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        if start:
            shutil.copytree(start, self.place, symlinks=True)
        else:
            self.place.mkdir()

    def argv(self, name: str) -> list[str]:
        return CASES[name].argv.format(case=self.place).split()

    def start_of(self, name: str) -> pathlib.Path:
        return self.base / "start" / name

    def prepare(self, name: str) -> None:
        """Run a command undisturbed: its result, CPU time and number of events."""
        case = CASES[name]
        if name in self.wanted:
            return
        if case.after:
            self.prepare(case.after)
        self.reset(self.base / "end" / case.after if case.after else None)
        call(case.make, self.place)
        shutil.copytree(self.place, self.start_of(name))
        for attempt in range(2):  # the first one compiles
            self.reset(self.start_of(name))
            before = _sizes(self.place)
            events = Events(self.place)
            ended = run(self.argv(name), before=events.watch)
            assert ended.code == 0, (name, ended.output)
            found = call(kill_cases.content, self.place)
            if attempt and found != self.wanted[name]:
                differ = _difference(found, self.wanted[name])
                raise AssertionError(f"{name}: two undisturbed runs differ in {differ}")
            self.wanted[name] = found
        self.cpu[name], self.events[name] = ended.cpu, events.count
        after = _sizes(self.place)
        self.sizes[name] = [s for path, s in after.items() if path not in before]
        shutil.copytree(self.place, self.base / "end" / name)
        print(
            f"{name}: undisturbed in {ended.cpu:.1f} s of CPU, {events.count} events, "
            f"{len(self.sizes[name])} new files, {sum(self.sizes[name]):,} bytes",
            flush=True,
        )

    def finish(self, name: str, what: str, ends: list[End], **options) -> bool:
        """Start the command again; it must end with the undisturbed result."""
        last = run(self.argv(name), **options)
        found = call(kill_cases.content, self.place)
        problems = []
        whole = not CASES[name].goes_on and "not empty" in last.output
        if last.code != 0 and not whole:
            problems.append(f"exit code {last.code}")
        if found != self.wanted[name]:
            problems.append(f"differs in {_difference(found, self.wanted[name])}")
        if any("Traceback" in end.output for end in (*ends, last)):
            problems.append("a traceback")
        if problems:
            self.fault(name, what, problems, [*ends, last])
        return not problems

    def fault(self, name: str, what: str, problems: list[str], ends: list[End]) -> None:
        line = f"{name}, {what}: {'; '.join(problems)}"
        self.faults.append(line)
        keep = self.base / "faults" / f"{len(self.faults)}"
        shutil.copytree(self.place, keep / "case", symlinks=True)
        output = "".join(f"== exit code {e.code}\n{e.output}\n" for e in ends)
        (keep / "output.txt").write_text(f"{line}\n{output}")
        print(f"FAULT {line} (see {keep})\n{output[-3000:]}", flush=True)

    def kill(self, name: str, kind: str, most: int) -> tuple[int, bool]:
        """Kill a command up to three times in a row; return how often, and if well."""
        self.reset(self.start_of(name))
        ends: list[End] = []
        points = []
        for _ in range(min(most, self.draws.randint(1, 3))):
            options: dict = {}
            if kind == "time":
                options["limit"] = self.draws.uniform(0.02, 1) * self.cpu[name]
                point = f"{options['limit']:.2f} s"
            elif self.draws.random() < 0.25 and self.sizes[name]:
                size = self.draws.randint(
                    1, max(1, self.draws.choice(self.sizes[name]))
                )
                options["before"] = lambda size=size: _tear(size)
                point = f"byte {size} of a file"
            else:
                number = self.draws.randint(1, self.events[name])
                events = Events(self.place)
                options["before"] = lambda e=events, n=number: e.watch(n)
                point = f"event {number}"
            ended = run(self.argv(name), **options)
            if ended.code not in (-signal.SIGKILL, -signal.SIGXFSZ):
                if ended.code and not (
                    not CASES[name].goes_on and "not empty" in ended.output
                ):
                    self.fault(name, f"killed at {points}", ["fails"], [*ends, ended])
                    return len(points), False
                break  # less was left to do than was drawn
            ends.append(ended)
            points.append(point)
        if not points:
            return 0, True
        good = self.finish(name, f"killed at {' and '.join(points)}", ends)
        return len(points), good

    def fill_disk(self, name: str) -> tuple[int, bool]:
        """Run a command on a disk of random size, then make the disk larger."""
        need = sum(-(-size // 4096) * 4096 for size in self.sizes[name])
        self.reset()
        with _Disk(self.place) as disk:
            shutil.copytree(self.start_of(name), self.place, dirs_exist_ok=True)
            size = disk.used() + self.draws.randrange(0, need)
            disk.resize(size)
            what = f"a disk with {size - disk.used():,} bytes left"
            ended = run(self.argv(name))
            fits = ended.code == 0
            if fits and call(kill_cases.content, self.place) == self.wanted[name]:
                return 0, True
            problems = complaints(ended, "No space left on device", self.place, "free")
            if problems:
                self.fault(name, what, problems, [ended])
            disk.resize(1 << 30)
            good = self.finish(name, what, [ended])
            return 1, good and not problems

    def forbid(self, name: str, number: int) -> tuple[int, bool]:
        """Take a right away from a command of another user, then give it back."""
        case = CASES[name]
        self.reset(self.start_of(name))
        if number % 4 == 0:
            self.reset()
            with _Disk(self.place) as disk:
                shutil.copytree(self.start_of(name), self.place, dirs_exist_ok=True)
                disk.option("ro")
                ended = run(self.argv(name))
                disk.option("rw")
                return self._forbidden(name, "a read-only disk", ended)
        if number % 4 == 1:
            target, mode = self.place, 0o555
            what = "a folder without the right to write"
        else:
            target = self.place / self.draws.choice(case.inputs)
            inside = sorted(p for p in target.rglob("*") if p.is_file())
            if number % 4 == 2 and inside:
                target = self.draws.choice(inside)
            mode = 0
            kind = "folder" if target.is_dir() else "file"
            name_of = target.relative_to(self.place)
            what = f"a {kind} without the right to read, {name_of}"
        before = target.stat().st_mode
        target.chmod(mode)
        ended = run(self.argv(name), before=_drop_rights)
        target.chmod(before)
        return self._forbidden(name, what, ended, before=_drop_rights)

    def _forbidden(self, name: str, what: str, ended: End, **options):
        problems = []
        if ended.code != 0:  # else it did not need that right
            reason = "Permission denied|Read-only file system"
            problems = complaints(ended, reason, self.place, "")
        if problems:
            self.fault(name, what, problems, [ended])
        good = self.finish(name, what, [ended], **options)
        return 1, good and not problems


def complaints(ended: End, reason: str, place: pathlib.Path, remedy: str) -> list[str]:
    """Return what is wrong with the error of a command: one line, path and remedy."""
    found = []
    lines = [
        line
        for line in ended.output.splitlines()
        if re.search(r"error|exception|warning|errno|denied|no space", line, re.I)
        if not re.match(r"compare \d+/\d+ ", line)  # progress names what failed
    ]
    if ended.code != 1:
        found.append(f"exit code {ended.code}")
    if "Traceback" in ended.output:
        found.append("a traceback")
    if len(lines) != 1:
        found.append(f"{len(lines)} lines of errors")
    elif not re.search(reason, lines[0]):
        found.append(f"the line does not say {reason}")
    elif str(place) not in lines[0] or remedy not in lines[0]:
        found.append("no path, or no remedy")
    return found


class _Disk:
    """A file system of a given size; a context manager."""

    def __init__(self, place: pathlib.Path) -> None:
        self._place = place

    def __enter__(self) -> "_Disk":
        _call("mount", "-t", "tmpfs", "-o", "size=1g,mode=755", "tmpfs", self._place)
        return self

    def __exit__(self, *exception: object) -> None:
        _call("umount", "--lazy", self._place)

    def option(self, text: str) -> None:
        _call("mount", "-o", f"remount,{text}", self._place)

    def resize(self, size: int) -> None:
        self.option(f"size={size // 4096 * 4096}")

    def used(self) -> int:
        return shutil.disk_usage(self._place).used


def _call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def _tear(size: int) -> None:
    """Have this process killed by the kernel within the write that reaches a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _drop_rights() -> None:
    """Give up what root may do more than other users, also for programs it starts."""
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    library.prctl(_SET_SECUREBITS, _NO_ROOT)
    if library.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    return {str(p): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def _difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    lines = [f"{name} (missing)" for name in wanted.keys() - found.keys()]
    lines += [f"{name} (too much)" for name in found.keys() - wanted.keys()]
    lines += [n for n in wanted.keys() & found.keys() if found[n] != wanted[n]]
    return ", ".join(sorted(lines)[:8])


def _wait_for_quiet() -> None:
    """Wait while the file that KDJAX_PAUSE names exists: others measure."""
    while os.path.exists(os.environ.get("KDJAX_PAUSE", "")):
        time.sleep(1)


def shares(num: int, names: list[str]) -> dict[str, int]:
    """Divide a number of cases among commands by their shares, one at least."""
    total = sum(CASES[name].share for name in names)
    return {name: max(1, round(num * CASES[name].share / total)) for name in names}


def table(rows: dict[tuple[str, str], list[int]]) -> str:
    """Return a Markdown table: tried, and ended with the undisturbed result."""
    kinds = [kind for kind in KINDS if any(key[1] == kind for key in rows)]
    lines = [" | ".join(("| command", *kinds)) + " |", "|---" * (len(kinds) + 1) + "|"]

    def cell(names: list[str], kind: str) -> str:
        found = [rows[name, kind] for name in names if (name, kind) in rows]
        tried, good, cases = (sum(part) for part in zip(*found, strict=True))
        return f"{tried} in {cases}, {good} well" if found else ""

    names = list(dict.fromkeys(name for name, _ in rows))
    for name in names:
        lines.append(
            " | ".join((f"| {name}", *(cell([name], k) for k in kinds))) + " |"
        )
    lines.append(" | ".join(("| all", *(cell(names, k) for k in kinds))) + " |")
    return "\n".join(lines)


def measure(bench: Bench, kinds: list[str], wanted: dict[str, dict[str, int]]):
    """Disturb every command in every way; return tried, well and cases of each."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name in wanted:
        bench.prepare(name)
        for kind in kinds:
            bench.draws = random.Random(f"{bench.seed} {name} {kind}")
            row = rows[name, kind] = [0, 0, 0]
            attempts = 0
            while row[0] < wanted[name][kind] and attempts < 4 * wanted[name][kind]:
                if kind == "disk":
                    tried, good = bench.fill_disk(name)
                elif kind == "permission":
                    tried, good = bench.forbid(name, attempts)
                else:
                    tried, good = bench.kill(name, kind, wanted[name][kind] - row[0])
                attempts += 1
                row[0] += tried
                row[1] += good and tried > 0
                row[2] += tried > 0
            if row[2]:
                print(
                    f"{name}, {kind}: {row[0]} in {row[2]}, {row[1]} well", flush=True
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kills")
    parser.add_argument("--num", type=int, default=200, help="kills, of both kinds")
    parser.add_argument("--disk", type=int, default=40)
    parser.add_argument("--permission", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(CASES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--folder", type=pathlib.Path)
    given = parser.parse_args()
    names, kinds = given.commands.split(","), given.kinds.split(",")
    base = given.folder or pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
    base.mkdir(parents=True, exist_ok=True)
    preload(base, names)
    numbers = {
        "time": shares((given.num + 1) // 2, names),
        "event": shares(given.num // 2, names),
        "disk": shares(given.disk, names),
        "permission": shares(given.permission, names),
    }
    wanted = {name: {kind: numbers[kind][name] for kind in kinds} for name in names}
    bench = Bench(base, given.seed)
    started = time.monotonic()
    rows = measure(bench, kinds, wanted)
    print(table(rows))
    print(f"{len(bench.faults)} faults, {(time.monotonic() - started) / 60:.0f} min")
    (base / "rows.json").write_text(json.dumps([[*k, *v] for k, v in rows.items()]))
    sys.exit(bool(bench.faults))


def preload(base: pathlib.Path, names: list[str]) -> None:
    """Import what commands need, once; what libraries keep goes to a folder."""
    for variable, name in (
        ("JAX_COMPILATION_CACHE_DIR", "compiled"),
        ("MPLCONFIGDIR", "matplotlib"),
        ("HF_HOME", "hub"),
        ("HOME", "home"),
    ):
        folder = base / name
        folder.mkdir(exist_ok=True)
        os.environ[variable] = str(folder)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "KDJAX_HUGE_PAGES": "0",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": xla_flags.FAST_COMPILE,
    }
    for name in names:
        for module in CASES[name].imports:
            importlib.import_module(module)
    if "jax" in sys.modules:
        from kdjax.runtime import chips

        chips.measure_cpu_flops = lambda: 1e11  # seconds of each start


if __name__ == "__main__":
    main()
