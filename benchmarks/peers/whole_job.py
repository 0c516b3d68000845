"""The whole job beside what people run: one task, one machine, one table.

    python benchmarks/peers/whole_job.py --model=SMOLLM2_FOLDER --data=GSM8K_FOLDER \
        --rows=2000 --epochs=3 --out=FILE.json --python=trl=trl/bin/python

SmolLM2 teaches its 6-layer cut GSM8K's answers: soft labels at T = 1 (forward KL)
alone, AdamW at a constant rate after a warm-up, some five examples a step. kdjax runs
its commands, `kdjax.label` and `kdjax.train`, with the top 64 in a cache; "stored" is a
plain PyTorch loop with the teacher's top 64 in files; "trl" is TRL's GKD trainer,
off-policy. All start from the same weights and the same tokens. Seconds are from the
start of the process, imports and compiling included. One process then measures all
students on the same held-out rows: NLL, and KL from the teacher. `to_equal_kl` is when
a student reached the KL that the worst of them ended with, linear between epochs in
log KL.
"""

import argparse
import json
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

from kdjax.data import loader
from kdjax.experiment.run import open_run
from kdjax.runtime.console import print_table

HERE = pathlib.Path(__file__).parent

BATCH_ROWS, WARMUP, LEARNING_RATE = 5, 10, 5e-4
NAMES = {
    "kdjax": "kdjax, top 64 in a cache",
    "stored": "PyTorch by hand, top 64 in files",
    "trl": "TRL, teacher in every step",
}


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--eval_rows", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--peers", default="kdjax,stored,trl")
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    return parser.parse_args()


def config_flags(args: argparse.Namespace) -> dict[str, object]:
    """Return what differs from the example config."""
    return {
        "data.path": args.data / "train.jsonl",
        "data.eval_path": args.data / "test.jsonl",
        "data.num_train": args.rows,
        "data.num_eval": args.eval_rows,
        "teacher.path": args.model,
        "method.hard_weight": 0.0,
        "method.soft_weight": 1.0,
        "optim.learning_rate": LEARNING_RATE,
        "optim.schedule": "constant",
        "optim.warmup_steps": WARMUP,
        "train.eval_every": 0,
        "train.keep_best": False,
    }


def prepare(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, object]:
    """Write the tokens and the job; return the flags of kdjax's commands."""
    sys.path.insert(0, str(HERE.parent.parent))
    from configs import smollm2_gsm8k

    config, wanted = smollm2_gsm8k.get_config(), config_flags(args)
    for name, value in wanted.items():
        part, field = name.split(".")
        setattr(
            getattr(config, part),
            field,
            str(value) if isinstance(value, pathlib.Path) else value,
        )
    run = open_run(config, folder / "prepared")
    for split, segments in (("train", run.data.train), ("eval", run.data.evaluation)):
        rows = [
            {"prompt": s.prompt_ids.tolist(), "target": s.target_ids.tolist()}
            for s in segments
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    job = {
        "model": args.model,
        "layers": list(config.student.keep_layers),
        "epochs": args.epochs,
        "batch_rows": BATCH_ROWS,
        "warmup": WARMUP,
        "learning_rate": LEARNING_RATE,
    }
    (folder / "job.json").write_text(json.dumps(job))
    plan = loader.BatchPlan(
        run.data.train,
        batch_size=config.train.batch_size,
        row_length=config.train.row_length,
        seed=config.seed,
    )
    per_epoch = plan.steps_per_epoch(0)
    return wanted | {
        "train.steps": args.epochs * per_epoch,
        "train.save_every": per_epoch,
        "train.keep_last": args.epochs,
    }


def run_kdjax(wanted: dict[str, object], folder: pathlib.Path) -> dict:
    """Run the commands; the students of the checkpoints are exported afterwards."""
    workdir = folder / "kdjax"
    config = HERE.parent.parent / "configs" / "smollm2_gsm8k.py"
    flags = [f"--config={config}", f"--workdir={workdir}"]
    flags += [f"--config.{name}={value}" for name, value in wanted.items()]

    def command(name: str, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", f"kdjax.{name}", *arguments],
            check=True,
            cwd=HERE.parent.parent,
        )

    began = time.time()
    command("label", *flags)
    labelled = time.time() - began
    command("train", *flags)
    seconds = time.time() - began
    rss = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    epochs = []
    steps = (int(p.name) for p in (workdir / "checkpoints").iterdir() if p.is_dir())
    for step in sorted(steps):
        when = (workdir / "checkpoints" / str(step)).stat().st_mtime
        out = folder / f"kdjax-{step}"
        command("export", f"--workdir={workdir}", f"--out={out}", f"--step={step}")
        epochs.append({"folder": str(out), "seconds": when - began})
    cache = workdir / "cache" / "train"
    return {
        "seconds": seconds,
        "label_seconds": labelled,
        "epochs": epochs,
        "max_rss_bytes": rss,
        "disk_bytes": sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()),
    }


def run_peer(python: str, folder: pathlib.Path, *arguments: str) -> dict:
    """Run the peer's script in its own environment."""
    done = subprocess.run(
        [python, str(HERE / "whole_job_peer.py"), f"--folder={folder}", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"WHOLE_JOB_BEGAN": repr(time.time())},
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def seconds_to(kl: float, epochs: list[dict]) -> float | None:
    """Return when a student had a KL: linear between epochs in log KL."""
    before = None
    for epoch in epochs:
        if epoch["kl"] <= kl * (1 + 1e-9):
            if before is None:
                return epoch["seconds"]
            whole = math.log(before["kl"] / epoch["kl"])
            share = math.log(before["kl"] / kl) / whole if whole else 1.0
            return before["seconds"] + share * (epoch["seconds"] - before["seconds"])
        before = epoch
    return None


def main() -> None:
    """Run everybody, measure the students, write the json and print the table."""
    args = parse()
    pythons = dict(given.split("=", 1) for given in args.python)
    results: dict[str, dict] = {}
    folder = pathlib.Path(tempfile.mkdtemp(prefix="whole-job-"))
    try:
        wanted = prepare(args, folder)
        for name in args.peers.split(","):
            if name == "kdjax":
                results[name] = run_kdjax(wanted, folder)
            else:
                python = pythons.get(name, sys.executable)
                results[name] = run_peer(python, folder, f"--mode={name}")
        students = [e["folder"] for r in results.values() for e in r["epochs"]]
        measured = run_peer(
            sys.executable, folder, "--mode=evaluate", "--students", *students
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for result in results.values():
        for epoch in result["epochs"]:
            epoch["nll"], epoch["kl"] = measured[epoch.pop("folder")]
    worst = max(result["epochs"][-1]["kl"] for result in results.values())
    table = []
    for name, result in results.items():
        result["to_equal_kl"] = seconds_to(worst, result["epochs"])
        last = result["epochs"][-1]
        table.append(
            {
                "what": NAMES[name],
                "seconds": result["seconds"],
                "to_equal_kl": result["to_equal_kl"],
                "MiB": result["max_rss_bytes"] / 2**20,
                "disk MiB": result["disk_bytes"] / 2**20,
                "kl": last["kl"],
                "nll": last["nll"],
            }
        )
    done = {"rows": args.rows, "epochs": args.epochs, "results": results}
    args.out.write_text(json.dumps(done, indent=1))
    print_table(f"{args.rows} rows, {args.epochs} epochs", table)


if __name__ == "__main__":
    main()
