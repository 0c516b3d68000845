"""Runs other libraries and kdjax in turn on the same problems: ratios, losses, memory.

    python benchmarks/peers/run.py --peers=tunix,torch --rounds=3 --out=FILE.json \
        --python=tunix=PATH/bin/python

Every number comes from a process of its own that prints one line of JSON; a round runs
each once, so that all meet the same machine. --python names the interpreter of a
library that needs its own environment (repeat it); the others run with this one. What
cannot run is reported with the reason and left out of the ratios.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from cases import CASES

from kdjax.runtime import malloc
from kdjax.runtime.console import print_table, progress

HERE = pathlib.Path(__file__).parent
# What runs in a case: name -> script and its flags. "loop, cache" reads the top k from
# disk in training's own loop; "top k" and "whole rows" have them in memory.
OURS = {
    "kdjax: loop, cache": ("ours.py", "--mode=loop"),
    "kdjax: top k": ("ours.py", "--mode=step"),
    "kdjax: online teacher": ("ours.py", "--mode=online"),
    "kdjax: whole rows": ("ours.py", "--mode=dense"),
}
# library -> its cases and what runs in them.
PEERS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "tunix": (
        ("b4_t128", "b8_t256"),
        {"tunix: online teacher": ("tunix_peer.py",)},
    ),
    "torch": (
        ("60m_b8_t256",),
        {
            "torch: whole rows": ("torch_peer.py", "--mode=dense"),
            "torch: online teacher": ("torch_peer.py", "--mode=online"),
        },
    ),
    "trl": (("soft_b4_t128",), {"trl: online teacher": ("trl_peer.py",)}),
}
_TOLERANCE = 1e-4  # of losses of the same problem, relative


def call(python: str, script: str, *arguments: str, timeout: int) -> dict[str, Any]:
    """Return the JSON that a script prints last, or {"skipped": why}."""
    # Peers' environments have no kdjax, and need none; ours may be a checkout.
    path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    # Ours runs as our commands do. In the environment, GLIBC_TUNABLES is for all.
    own = malloc.huge_page_environment() if script == "ours.py" else {}
    try:
        done = subprocess.run(
            [python, str(HERE / script), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"PYTHONPATH": path} | own,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return {"skipped": str(error)}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0:
        return json.loads(lines[-1]) if lines else {}
    reason = (done.stderr.strip() or "no message").splitlines()[-1]
    return {"skipped": f"exit {done.returncode}: {reason}"}


def run_case(
    case: str,
    runs: dict[str, tuple[str, ...]],
    folder: str,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """All runs of one case in turn; see `summarise`."""
    pythons = interpreters(arguments.python)
    limit = arguments.timeout
    where = (f"--case={case}", f"--out={folder}")
    prepared = call(sys.executable, "prepare.py", *where, timeout=limit)
    if "skipped" in prepared:
        raise SystemExit(f"case {case} could not be prepared: {prepared['skipped']}")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    with progress(arguments.rounds * len(runs), case) as advance:
        for index in range(arguments.rounds):
            names = list(runs) if index % 2 == 0 else list(reversed(runs))
            for name in names:
                advance(note=name)
                if found[name] and "skipped" in found[name][-1]:
                    continue  # it will not run the next time either
                script, *mode = runs[name]
                python = pythons.get(script.removesuffix("_peer.py"), sys.executable)
                what = (f"--folder={folder}", f"--steps={arguments.steps}", *mode)
                found[name].append(call(python, script, *what, timeout=limit))
    return summarise(case, found)


def summarise(case: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, and ratios to training's own loop with its cache.

    Returns:
      "case", its "problem", "skipped" (why), "same_problem", and for each of "runs":
      seconds per step, also of every round; tokens per second; peak resident memory of
      the process, and what it grew by after its imports; temporary memory of the
      compiled step; parameters; the first loss; and "times_ours", how many times the
      seconds of "kdjax: loop, cache" it takes.
    """
    runs: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, lines in found.items():
        good = [line for line in lines if "skipped" not in line]
        if len(good) < len(lines):
            skipped[name] = lines[-1]["skipped"]
        if good:
            rounds = [line["median_seconds"] for line in good]
            names = ("tokens_per_step", "parameters", "loss", "temporary_bytes")
            runs[name] = {key: good[0].get(key) for key in (*names, "versions")} | {
                "seconds": statistics.median(rounds),
                "round_seconds": rounds,
                "max_rss_bytes": max(line["max_rss_bytes"] for line in good),
                # Without what the imports alone take.
                "work_rss_bytes": max(
                    line["max_rss_bytes"] - line["rss_before_bytes"] for line in good
                ),
            }
    ours = runs.get("kdjax: loop, cache")
    for run in runs.values():
        run["tokens_per_second"] = run["tokens_per_step"] / run["seconds"]
        if ours:
            pairs = zip(run["round_seconds"], ours["round_seconds"], strict=False)
            ratios = [mine / its for mine, its in pairs]
            run["times_ours"] = run["seconds"] / ours["seconds"]
            run["times_ours_lowest"], run["times_ours_highest"] = (
                min(ratios),
                max(ratios),
            )
    return {
        "case": case,
        "problem": CASES[case],
        "runs": runs,
        "skipped": skipped,
        "same_problem": same_problem(runs),
    }


def same_problem(runs: dict[str, Any]) -> dict[str, Any]:
    """Compare parameters, tokens and the dense loss with ours on whole rows."""
    dense = runs.get("kdjax: whole rows")
    others = {name: r for name, r in runs.items() if not name.startswith("kdjax")}
    if not dense or not others:
        return {}
    names = ("parameters", "tokens_per_step")
    return {
        name: {key: run[key] == dense[key] for key in names}
        | {
            "loss_difference": run["loss"] - dense["loss"],
            "loss": abs(run["loss"] - dense["loss"]) <= _TOLERANCE * dense["loss"],
        }
        for name, run in others.items()
    }


def print_case(found: dict[str, Any]) -> None:
    """One case as a table."""
    problem = found["problem"]
    print_table(
        f"{found['case']}: B {problem['batch_size']}, T {problem['length']}, "
        f"V {problem['vocab_size']}, k {problem['k']}",
        [
            {
                "run": name,
                "ms a step": f"{1e3 * run['seconds']:.1f}",
                "x ours": f"{run['times_ours']:.2f}" if "times_ours" in run else "",
                "tokens/s": f"{run['tokens_per_second']:,.0f}",
                "RSS MiB": f"{run['work_rss_bytes'] / 2**20:,.0f}",
                "temp MiB": f"{run['temporary_bytes'] / 2**20:,.0f}"
                if run["temporary_bytes"] is not None
                else "",
                "first loss": f"{run['loss']:.5f}",
            }
            for name, run in found["runs"].items()
        ],
    )
    for name, reason in found["skipped"].items():
        print(f"skipped: {name}: {reason}")
    for name, agrees in found["same_problem"].items():
        print(f"same problem as ours on whole rows: {name}: {agrees}")


def interpreters(entries: list[str]) -> dict[str, str]:
    """Return the interpreters of --python, by library."""
    found = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if name not in PEERS or not path:
            raise SystemExit(f"--python={entry}: give LIBRARY=PATH, of {sorted(PEERS)}")
        found[name] = path
    return found


def main(arguments: argparse.Namespace) -> None:
    """Run, print and write after every case."""
    results = []
    with tempfile.TemporaryDirectory(prefix="kdjax-peers-") as scratch:
        for peer in names_of("peers", arguments.peers, PEERS):
            cases, runs = PEERS[peer]
            for case in names_of("cases", arguments.cases, CASES) or cases:
                folder = pathlib.Path(arguments.folder or scratch) / case
                found = run_case(case, OURS | runs, str(folder), arguments)
                print_case(found)
                results.append({"peer": peer} | found)
                if arguments.out:
                    machine = {"machine": platform.platform(), "cores": os.cpu_count()}
                    text = json.dumps(machine | {"results": results}, indent=2)
                    pathlib.Path(arguments.out).write_text(text + "\n")


def names_of(flag: str, text: str, known: dict[str, Any]) -> list[str]:
    """Return the names in a flag, which are joined by commas."""
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(known):
        raise SystemExit(f"--{flag}={sorted(unknown)}: use some of {sorted(known)}")
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default="tunix,torch", help=f"of {sorted(PEERS)}")
    parser.add_argument(
        "--cases", default="", help=f"instead of the peers' own: {sorted(CASES)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per process")
    parser.add_argument("--out", help="also write everything to this file")
    parser.add_argument("--folder", help="keep the prepared cases here")
    parser.add_argument(
        "--python", action="append", default=[], help="LIBRARY=PATH of its interpreter"
    )
    parser.add_argument(
        "--timeout", type=int, default=1800, help="seconds for one process"
    )
    main(parser.parse_args())
