"""Seconds from the command to the first training step, split into what they are for.

    python benchmarks/startup.py --out=FILE.json --workdir=DIR -- \
        --config=configs/quickstart.py

What follows `--` are flags of `kdjax.train`. The command runs to its first step and
ends there: once to make what is kept (teacher, caches, compiled programs), then
`--starts` times with all of it, and as often with nothing compiled. Medians of

    imports       to the call of the command's function: Python, JAX, flags, config
    data          tokenizer, examples, the caches' manifests
    weights       the teacher's where it is needed, the student's, the optimizer's state
    compile       tracing the step and compiling it, or reading it from JAX's cache
    first_step    the first batch and the step, until its loss is there
"""

import argparse
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

_BEGAN = "KDJAX_STARTUP_BEGAN"
PARTS = ("imports", "data", "weights", "compile", "first_step")


def child(arguments: list[str]) -> None:
    """Run the command in this process; print the seconds of its parts and end."""
    import jax

    from kdjax import cli, train
    from kdjax.pipeline import distill
    from kdjax.training.program import Program

    marks = [float(os.environ[_BEGAN])]
    ensure, init, run = distill.build.ensure, Program.init, Program.run

    def begin(*args, **kwargs):
        marks.append(time.time())
        train.run(*args, **kwargs)

    def ensured(*args, **kwargs):
        caches = ensure(*args, **kwargs)
        marks.append(time.time())
        Program.init, Program.run = first_init, first_run  # a teacher's are past
        return caches

    def first_init(*args, **kwargs):
        state = jax.block_until_ready(init(*args, **kwargs))
        marks.append(time.time())
        return state

    def first_run(program, state, index, batch, *teacher):
        step = program.step_at(program.temperature(index))
        if hasattr(step, "lower"):
            step.lower(state, program.place(batch), *teacher).compile()
        marks.append(time.time())
        jax.block_until_ready(run(program, state, index, batch, *teacher))
        marks.append(time.time())
        seconds = [after - before for before, after in itertools.pairwise(marks)]
        print("\n" + json.dumps(dict(zip(PARTS, seconds, strict=True))), flush=True)
        os._exit(0)

    distill.build.ensure = ensured
    sys.argv = ["train", *arguments]
    cli.run(begin, resumes=True, store="write")


def start(arguments: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Run the command in a process of its own and return its seconds."""
    command = [sys.executable, __file__, "--child", "--", *arguments]
    began = {_BEGAN: repr(time.time())}
    done = subprocess.run(
        command,
        env=os.environ | began | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Start the command again and again and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    if args.child:
        child(args.arguments)
    arguments = [*args.arguments, f"--workdir={args.workdir}"]
    start(arguments, {})
    results = {}
    for name, variables in {
        "cached": {},
        "nothing_compiled": {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    }.items():
        starts = []
        for _ in range(args.starts):
            shutil.rmtree(args.workdir / "checkpoints", ignore_errors=True)
            starts.append(start(arguments, variables))
        medians = {p: statistics.median(s[p] for s in starts) for p in PARTS}
        results[name] = medians | {
            "all": statistics.median(sum(s.values()) for s in starts)
        }
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
