"""A rank of a pretended run: python rank.py --workdir=DIR [--steps=N] [--fault=...].

Rank 0 writes metrics and checkpoints with a hash of all steps; the others wait for it.
A fault KIND:RANK:STEP happens once, or in every attempt with KIND*.
"""

import argparse
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

SAVE_EVERY = 4


def save(checkpoints: pathlib.Path, step: int, state: str) -> None:
    hidden = checkpoints / f".{step}"
    hidden.mkdir(exist_ok=True)
    (hidden / "state").write_text(state)
    if not (checkpoints / str(step)).exists():
        hidden.rename(checkpoints / str(step))


def resume(workdir: pathlib.Path) -> tuple[int, str]:
    """Return step and state of the newest checkpoint; later metrics are dropped."""
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    step = max((int(name) for name in names if name.isdecimal()), default=0)
    metrics = workdir / "metrics.jsonl"
    if os.environ.get("KDJAX_PROCESS_ID", "0") == "0" and metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        os.truncate(metrics, sum(map(len, lines[:step])))
    file = workdir / "checkpoints" / str(step) / "state"
    return step, file.read_text() if step else ""


def fault(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        time.sleep(1000)
    elif kind == "child":  # leaves one that holds its output
        subprocess.Popen(["sleep", "1000"])
        sys.exit(3)
    elif kind == "refuse":
        sys.exit("train: error: batch_size=12 does not divide over 8: use 8 or 16")
    elif kind == "differ":
        sys.exit(78)
    elif kind == "full":
        sys.exit("train: error: /d/c: No space left on device: free some space")
    elif kind == "bug":
        raise KeyError("k")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.01)
    parser.add_argument("--fault", default="")
    parser.add_argument("--save_seconds", type=float, default=0.0)
    parser.add_argument("--child", action="store_true")
    flags = parser.parse_args()
    rank = int(os.environ.get("KDJAX_PROCESS_ID", "0"))
    workdir, checkpoints = flags.workdir, flags.workdir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    step, state = resume(workdir)
    if flags.child and rank == 0:
        child = subprocess.Popen(["sleep", "1000"])
        (workdir / "child").write_text(str(child.pid))
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    kind, _, where = flags.fault.partition(":")
    at = tuple(map(int, where.split(":"))) if where else (-1, -1)
    while step < flags.steps:
        if stops:
            if rank == 0:
                time.sleep(flags.save_seconds)
                save(checkpoints, step, state)
            sys.exit(143)
        time.sleep(flags.seconds)
        step += 1
        happened = workdir / f"happened-{kind.strip('*')}"
        if step == at[1] and (kind.endswith("*") or not happened.exists()):
            if rank != at[0]:
                time.sleep(1000 if kind == "hang" else 1)  # in a collective
                sys.exit(75)
            time.sleep(0.5)  # for the others to come as far
            happened.touch()
            fault(kind.strip("*"))
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        if rank == 0:
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": state}) + "\n")
            if step % SAVE_EVERY == 0:
                save(checkpoints, step, state)
    while rank and not (checkpoints / str(flags.steps)).exists():
        time.sleep(0.01)


if __name__ == "__main__":
    main()
