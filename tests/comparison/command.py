"""Stands in for a command: notes that it ran, waits for a file, fails or dies."""

import argparse
import json
import os
import pathlib
import signal
import sys
import time

parser = argparse.ArgumentParser()
for name in ("workdir", "wait", "seconds", "fail", "die"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
folder = pathlib.Path(given.workdir)
begin = time.monotonic()
if given.seconds:
    time.sleep(float(given.seconds))
note = {
    "span": (begin, time.monotonic()),
    "name": folder.name,
    "cores": sorted(os.sched_getaffinity(0)),
    "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "pid": os.getpid(),
}
with (folder.parent / "ran.jsonl").open("a") as file:
    file.write(json.dumps(note) + "\n")
(folder.parent / f"{folder.name}.started").touch()
while given.wait and not pathlib.Path(given.wait).exists():
    time.sleep(0.02)
if given.fail and not (folder.parent / "mended").exists():
    print("some warning", file=sys.stderr)
    sys.exit(f"command: error: {given.fail}")
if given.die:
    os.kill(os.getpid(), signal.SIGKILL)
