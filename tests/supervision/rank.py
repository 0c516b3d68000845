"""A rank of a pretended run: python rank.py --workdir=DIR [--steps=N] [--fault=...].

Rank 0 writes metrics and checkpoints, the others wait for it. A fault KIND:RANK:STEP
happens once, or in every attempt with KIND*.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

SAVE_EVERY = 4


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
    parser.add_argument("--child", action="store_true")
    flags = parser.parse_args()
    rank = int(os.environ.get("KDJAX_PROCESS_ID", "0"))
    workdir, checkpoints = flags.workdir, flags.workdir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    saved = max((int(p.name) for p in checkpoints.iterdir()), default=0)
    if flags.child and rank == 0:
        child = subprocess.Popen(["sleep", "1000"])
        (workdir / "child").write_text(str(child.pid))
    state = {"stop": False}
    signal.signal(signal.SIGTERM, lambda *_: state.update(stop=True))
    kind, _, where = flags.fault.partition(":")
    at = tuple(map(int, where.split(":"))) if where else (-1, -1)
    step = saved
    while step < flags.steps:
        if state["stop"]:
            if rank == 0:
                (checkpoints / str(step)).mkdir(exist_ok=True)
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
        if rank == 0:
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            if step % SAVE_EVERY == 0:
                (checkpoints / str(step)).mkdir()
    while rank and not (checkpoints / str(flags.steps)).exists():
        time.sleep(0.01)


if __name__ == "__main__":
    main()
