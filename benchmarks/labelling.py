"""Labelling by a teacher beside transformers' forward pass, in processes of their own.

    python benchmarks/labelling.py --model=SMOLLM2_FOLDER --data=gsm8k/train.jsonl \
        --rows=512 --out=FILE.json

Both score the same target tokens (GSM8K's answers after its questions) and take the
largest 64 log-probabilities of each. kdjax labels a shard as `kdjax.label` does: rows
packed, records encoded and written beside the teacher. transformers gets batches of
like length, `log_softmax` and `topk` of the target positions, and writes nothing.

of_matmul: FLOPs of the forward pass (attention to whole rows, as is customary; in
of_matmul_computed to the blocks that are computed) and of the head at target tokens,
over the seconds, over the rate of a square product measured in the same process before
and after.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
ROOT = pathlib.Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--peer_rows", type=int, default=0)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--row_length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--part", choices=["ours", "transformers"])
    parser.add_argument("--parts", default="ours,transformers")
    return parser.parse_args()


def max_rss() -> int:
    """Return the process's largest resident memory so far, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def open_data(args: argparse.Namespace, workdir: pathlib.Path):
    """Return the run of the example config on the first rows."""
    sys.path.insert(0, str(ROOT))
    from configs import smollm2_gsm8k
    from kdjax.experiment.run import open_run

    config = smollm2_gsm8k.get_config()
    config.data.path, config.data.eval_path = args.data, ""
    config.data.num_train, config.data.num_eval = args.rows, 1
    config.teacher.path = args.model
    config.train.dtype = args.dtype
    config.cache.k = args.k
    config.cache.batch_size, config.cache.row_length = args.batch_size, args.row_length
    return open_run(config, workdir)


def matmul_rate(dtype: str) -> float:
    """Return the FLOP/s of a square product, the median of several."""
    import jax

    from kdjax.bench import timing

    matmul = timing.matmul(dtype)
    jax.block_until_ready(matmul.call())
    samples = []
    for _ in range(9):
        start = time.perf_counter()
        jax.block_until_ready(matmul.call())
        samples.append(time.perf_counter() - start)
    return matmul.flops / statistics.median(samples)


def ours(args: argparse.Namespace) -> dict:
    """Label by kdjax."""
    with tempfile.TemporaryDirectory() as folder:
        return _ours(args, pathlib.Path(folder))


def _ours(args: argparse.Namespace, workdir: pathlib.Path) -> dict:
    from kdjax.data import loader
    from kdjax.models import attention, flops
    from kdjax.teacher import build, label

    run = open_data(args, workdir)
    segments = run.data.train
    measured = {}

    def keep_totals(*arguments, **keywords):
        measured.update(of_label(*arguments, **keywords))
        return measured

    of_label, label.label = label.label, keep_totals
    rates = [matmul_rate(args.dtype)]
    run.config.cache.num_threads = 2
    start = time.perf_counter()
    build.ensure(_only_train(run))
    seconds = time.perf_counter() - start
    rates.append(matmul_rate(args.dtype))
    plan = loader.BatchPlan(
        segments, batch_size=args.batch_size, shuffle=False, row_length=args.row_length
    )
    positions = plan.steps_per_epoch(0) * args.batch_size * args.row_length
    useful = int(plan.lengths.sum()) / positions
    shape = build.teacher_shape(run.config, run.tokenizer)
    length, head = args.row_length, measured["tokens"]

    def work(num_tokens: float, row_length: int) -> float:
        return flops.forward_flops(
            shape, num_tokens=num_tokens, row_length=row_length, num_head_tokens=head
        )

    blocks = attention.xla_blocks(length)
    share = sum((stop - start) * stop for start, stop in blocks) / length**2
    whole = work(measured["positions"], length)
    without = work(measured["positions"], 0)
    rate = statistics.median(rates) * measured["seconds"]
    return {
        "seconds": seconds,
        "warm_seconds": measured["seconds"],
        "target_tokens": int(measured["tokens"]),
        "tokens_per_second": useful * measured["positions"] / measured["seconds"],
        "target_tokens_per_second": measured["tokens"] / measured["seconds"],
        "padding": 1 - useful,
        "flops_per_second_of_matmul": rates,
        "of_matmul": whole / rate,
        "of_matmul_computed": (without + share * (whole - without)) / rate,
        "max_rss_bytes": max_rss(),
    }


def _only_train(run):
    """Return the run without held-out rows to label."""
    import dataclasses

    data = dataclasses.replace(run.data, evaluation=run.data.train[:1])
    return dataclasses.replace(run, data=data)


def transformers(args: argparse.Namespace) -> dict:
    """Score by transformers, in batches of like length."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        segments = list(open_data(args, pathlib.Path(folder)).data.train)
    segments = segments[: args.peer_rows or len(segments)]
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype)
    ).eval()
    segments.sort(key=lambda s: len(s.prompt_ids) + len(s.target_ids))
    results: dict[int, dict] = {}
    for batch_size in (args.batch_size, 4 * args.batch_size):
        start, num_tokens, num_targets = time.perf_counter(), 0, 0
        with torch.inference_mode():
            for first in range(0, len(segments), batch_size):
                batch = segments[first : first + batch_size]
                rows = [[*s.prompt_ids, *s.target_ids][:-1] for s in batch]
                width = max(map(len, rows))
                ids = torch.zeros((len(rows), width), dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, tokens in enumerate(rows):
                    ids[row, : len(tokens)] = torch.tensor(tokens)
                    mask[row, : len(tokens)] = 1
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False)
                for row, segment in enumerate(batch):
                    stop = len(rows[row])
                    kept = logits.logits[row, stop - len(segment.target_ids) : stop]
                    kept.float().log_softmax(-1).topk(args.k)
                num_tokens += sum(map(len, rows))
                num_targets += sum(len(s.target_ids) for s in batch)
        seconds = time.perf_counter() - start
        results[batch_size] = {
            "seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
            "target_tokens_per_second": num_targets / seconds,
        }
    best = max(results, key=lambda size: results[size]["tokens_per_second"])
    by_batch = {size: r["tokens_per_second"] for size, r in results.items()}
    return {
        **results[best],
        "by_batch_size": by_batch,
        "batch_size": best,
        "max_rss_bytes": max_rss(),
    }


def main() -> None:
    """Run the parts, or one of them, and write what they measured."""
    args = parse()
    if args.part:
        result = {"ours": ours, "transformers": transformers}[args.part](args)
        args.out.write_text(json.dumps(result))
        return
    results = {}
    for part in args.parts.split(","):
        file = args.out.with_suffix(f".{part}.json")
        command = [sys.executable, __file__, *sys.argv[1:], f"--part={part}"]
        subprocess.run([*command, f"--out={file}"], check=True)
        results[part] = json.loads(file.read_text())
        file.unlink()
    if len(results) == 2:
        rates = [results[part]["tokens_per_second"] for part in results]
        results["ratio"] = rates[0] / rates[1]
    args.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
