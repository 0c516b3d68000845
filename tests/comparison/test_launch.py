"""launch/compare_slurm.sh, with an sbatch that notes what it is given."""

import os
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path("launch/compare_slurm.sh")
SBATCH = """#!/usr/bin/env bash
echo "$@" >> "$NOTES"
wc -l < "$NOTES"
"""


def test_prepare_then_an_array_then_the_report(tmp_path):
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    folder = pathlib.Path(sys.executable).parent
    notes = tmp_path / "notes"
    workdir = tmp_path / "a folder"
    done = subprocess.run(
        [
            "bash",
            str(SCRIPT),
            "--config=tests/comparison/tiny.py:sound",
            f"--workdir={workdir}",
        ],
        env=os.environ
        | {
            "PATH": f"{tmp_path}:{folder}:{os.environ['PATH']}",
            "NOTES": str(notes),
            "KDJAX_SBATCH": "--gpus=1 --time=1:00",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    prepare, array, report = notes.read_text().splitlines()
    quoted = str(workdir).replace(" ", "\\ ")
    command = (
        "python -m kdjax.compare --config=tests/comparison/tiny.py:sound "
        f"--workdir={quoted}  --stage="
    )
    common = "--parsable --gpus=1 --time=1:00"
    assert prepare == f"{common} --wrap {command}prepare"
    assert array == (
        f"{common} --dependency=afterok:1 --array=0-3 --wrap {command}run "
        "--index=$SLURM_ARRAY_TASK_ID"
    )
    assert report == f"{common} --dependency=afterany:2 --wrap {command}report"
    assert (workdir / "results.csv").read_text().count("not run") == 4


def test_a_workdir_is_needed():
    done = subprocess.run(
        ["bash", str(SCRIPT), "--config=x.py", "--jobs=1"], capture_output=True
    )
    assert done.returncode == 2 and b"--workdir" in done.stderr
