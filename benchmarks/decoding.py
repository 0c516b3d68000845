"""Decoding by continuous batching beside transformers, in processes of their own.

    python benchmarks/decoding.py --model=SMOLLM2_FOLDER --data=gsm8k/test.jsonl \
        --prompts=256 --new_tokens=256 --slots=32 --out=FILE.json

Greedy. The rows of both are compared: tokens until they first differ, which is at a tie
up to rounding. transformers decodes batches of `--slots` prompts of like length, each
until its slowest row ends. `--peer_prompts` gives it the first of the prompts alone.

bound_seconds: the larger of the products, 2 P FLOPs per token read or decoded (the head
for decoded ones alone) over the rate of a square product, and the weights' bytes per
step over the bandwidth of a sum, both measured in the same process.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--peer_prompts", type=int, default=0)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache_dtype", default="compute")
    parser.add_argument("--cache_tokens", type=int, default=0)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--part", choices=["ours", "transformers"])
    parser.add_argument("--parts", default="ours,transformers")
    return parser.parse_args()


def prompts_of(args: argparse.Namespace, number: int):
    """Return the tokenizer and the first questions as chats of one turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.data) as file:
        rows = [json.loads(line)["question"] for line in file][:number]
    chats = [[{"role": "user", "content": question}] for question in rows]
    ids = [
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for chat in chats
    ]
    return tokenizer, ids


def max_rss() -> int:
    """Return the process's largest resident memory so far, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ours(args: argparse.Namespace) -> dict:
    """Decode by kdjax."""
    import jax
    import jax.numpy as jnp

    from kdjax.config import MeshConfig
    from kdjax.experiment.models import load_model
    from kdjax.models import flops
    from kdjax.models.continuous import Batching, Engine, Request
    from kdjax.parallel import sharding

    tokenizer, prompts = prompts_of(args, args.prompts)
    mesh = sharding.make_mesh(MeshConfig())
    model, params = load_model(args.model, mesh, dtype=args.dtype)
    engine = Engine(
        model.shape,
        model.graphdef,
        eos_ids=(tokenizer.eos_token_id,),
        batching=Batching(
            num_slots=args.slots,
            cache_dtype=args.cache_dtype,
            cache_tokens=args.cache_tokens,
        ),
        mesh=mesh,
    )
    requests = [Request(prompt=ids, max_new_tokens=args.new_tokens) for ids in prompts]
    seconds = []
    for _ in range(1 + args.warm):
        start, cpu = time.perf_counter(), time.process_time()
        found = engine(params, requests)
        seconds.append(time.perf_counter() - start)
        cpu_seconds = time.process_time() - cpu
    done = engine.statistics
    [compiled] = engine.compiled.values()
    memory = compiled.memory_analysis()
    loop = engine.loop(params, requests)
    count = flops.params_count(model.shape)
    head = model.shape.vocab_size * model.shape.width
    body = count - head * (1 if model.shape.tie_embeddings else 2)
    work = 2 * (body * (done.read + done.tokens) + head * done.tokens)
    dtype = jnp.dtype(args.dtype)

    def rate(function, *arrays) -> float:
        call = jax.jit(function)
        jax.block_until_ready(call(*arrays))
        samples = []
        for _ in range(9):
            start = time.perf_counter()
            jax.block_until_ready(call(*arrays))
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    square = jnp.ones((2048, 2048), dtype)
    wide = {"preferred_element_type": jnp.float32}
    flops_per_second = 2 * 2048**3 / rate(lambda x: jnp.matmul(x, x, **wide), square)
    long = jnp.ones((2**27,), jnp.float32)
    bytes_per_second = long.nbytes / rate(jnp.sum, long)
    weights = (body + head) * dtype.itemsize * done.steps
    bounds = {
        "products": work / flops_per_second,
        "weights": weights / bytes_per_second,
    }
    warm = seconds[-1]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": done.tokens,
        "tokens_per_second": done.tokens / warm,
        "useful_share": done.useful_share,
        "steps": done.steps,
        "mixed_steps": done.mixed,
        "prompt_tokens": done.read,
        "copied_tokens": done.copied,
        "preempted": done.preempted,
        "flops_per_second": flops_per_second,
        "bytes_per_second": bytes_per_second,
        "bound_seconds": bounds,
        "bound_share": max(bounds.values()) / warm,
        "cache_bytes": engine.cache_bytes(loop),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "max_rss_bytes": max_rss(),
        "rows": [row.tokens for row in found],
    }


def transformers(args: argparse.Namespace) -> dict:
    """Decode by transformers' generate, in batches of like length."""
    import torch
    from transformers import AutoModelForCausalLM

    number = args.peer_prompts or args.prompts
    tokenizer, prompts = prompts_of(args, number)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype)
    ).eval()
    order = sorted(range(number), key=lambda i: len(prompts[i]))
    rows: list = [None] * number
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, number, args.slots):
            batch = order[first : first + args.slots]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=args.new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=pad,
            )[:, width:].tolist()
            for row, i in enumerate(batch):
                new = found[row]
                rows[i] = new[: new.index(end) + 1] if end in new else new
    seconds = time.perf_counter() - start
    tokens = sum(map(len, rows))
    return {
        "seconds": [seconds],
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "max_rss_bytes": max_rss(),
        "rows": rows,
    }


def agreement(first: list, second: list) -> dict:
    """Compare rows of tokens: equal ones, and tokens before the first difference."""
    pairs = list(zip(first, second, strict=False))
    alike = [
        next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
        for a, b in pairs
    ]
    return {
        "rows": len(pairs),
        "equal_rows": sum(a == b for a, b in pairs),
        "tokens": sum(len(a) for a, _ in pairs),
        "tokens_before_differing": sum(alike),
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
    rows = {part: result.pop("rows") for part, result in results.items()}
    if len(rows) == 2:
        results["agreement"] = agreement(*rows.values())
        results["ratio"] = (
            results["ours"]["tokens_per_second"]
            / results["transformers"]["tokens_per_second"]
        )
    args.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
