"""Seeded mutations of files, and what may come of reading one: a result or one line.

    python -m tests.fuzz [FORMAT ...] [--num=10000]

reads so many mutated files of each format and prints what came of them; the tests read
a few hundred.
"""

import argparse
import collections
import json
import pathlib
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable

import numpy as np

SECONDS = 5.0  # that reading a mutated file may take
GROWTH = 2**30  # bytes that it may take
_NUMBERS = (
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"99999999999999999999",
    b"1" * 5000,
    b"2147483648",
    b"0.5",
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b'"../../x"',
    b"[" * 2000,
    b'"\\ud800"',
)


def mutate(data: bytes, draws: np.random.Generator) -> bytes:
    """Change a file in one to three places."""
    changed = bytearray(data)
    for _ in range(draws.integers(1, 4)):
        at = int(draws.integers(0, max(1, len(changed))))
        size = int(draws.integers(1, 65))
        kind = draws.integers(0, 7)
        if kind == 0 and changed:  # a bit flips
            changed[at] ^= 1 << int(draws.integers(0, 8))
        elif kind == 1:  # the end is lost
            del changed[at:]
        elif kind == 2:  # a piece is lost
            del changed[at : at + size]
        elif kind == 3:  # a piece comes twice
            changed[at:at] = changed[at : at + size]
        elif kind == 4:  # noise comes in
            changed[at:at] = draws.bytes(size)
        elif kind == 5:  # a piece becomes noise
            changed[at : at + size] = draws.bytes(len(changed[at : at + size]))
        else:  # a number becomes another value
            places = [m.span() for m in re.finditer(rb"-?\d[\d.e+-]*", changed)]
            if places:
                start, stop = places[int(draws.integers(0, len(places)))]
                changed[start:stop] = _NUMBERS[int(draws.integers(0, len(_NUMBERS)))]
    return bytes(changed)


def fuzz(
    read: Callable[[pathlib.Path], object],
    original: pathlib.Path,
    files: list[str],
    num: int,
    scratch: pathlib.Path,
    *,
    seed: int = 0,
) -> collections.Counter:
    """Read mutated copies of a folder; anything but a result or one line is an error.

    Args:
      read: reads a folder, and raises ValueError with one line for what it refuses.
      original: a folder that can be read.
      files: in it; one is mutated at a time.
      num: mutated copies that are read.
      scratch: an empty folder.
      seed: of the mutations.

    Returns:
      The number of copies by what came of them, "read" or the start of the refusal.
    """
    read(original)
    outcomes: collections.Counter = collections.Counter()
    folder = scratch / "copy"
    shutil.copytree(original, folder)
    before = _peak()
    for number in range(num):
        draws = np.random.default_rng([seed, number])
        name = files[number % len(files)]
        content = (original / name).read_bytes()
        mutated = mutate(content, draws)
        (folder / name).write_bytes(mutated)
        where = f"seed {seed}, copy {number} of {name}"
        started = time.monotonic()
        try:
            read(folder)
            outcomes["read"] += 1
        except ValueError as error:
            message = str(error)
            assert "\n" not in message.strip(), (where, message)
            assert len(message) < 2000, (where, message[:2000])
            outcomes[re.sub(r"\d+", "#", message.split("copy/")[-1])[:60]] += 1
        except BaseException as error:
            keep = pathlib.Path(tempfile.mkdtemp()) / name
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_bytes(mutated)
            text = f"{where} ({keep}): {type(error).__name__}: {error}"
            raise AssertionError(text) from error
        seconds = time.monotonic() - started
        assert seconds < SECONDS, f"{where}: {seconds:.1f} s"
        grown = _peak() - before
        assert grown < GROWTH, f"{where}: {grown / 2**20:.0f} MiB"
        (folder / name).write_bytes(content)
    return outcomes


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def config_json(folder: pathlib.Path):
    """Write config.json files of the families; return how a folder is read."""
    from kdjax.models import hf
    from tests.models.hf.published import PUBLISHED

    for name, (raw, _) in PUBLISHED.items():
        (folder / name.replace("/", "_")).mkdir()
        file = folder / name.replace("/", "_") / "config.json"
        file.write_text(json.dumps(raw, indent=1))

    def read(root):
        for part in sorted(root.iterdir()):
            hf.read_config(part)

    return read, [str(f.relative_to(folder)) for f in folder.glob("*/config.json")]


def weights(folder: pathlib.Path):
    """Write the weights of a small model in two shards with an index."""
    import jax

    from kdjax.config import DecoderConfig
    from kdjax.models import hf, lm

    shape = DecoderConfig(
        vocab_size=32, width=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=16
    )
    params = lm.init_params(shape, jax.random.key(0))
    hf.save(folder / "model", shape, params, max_shard_bytes=6_000)

    def read(root):
        config = hf.read_config(root / "model")
        hf.load_params(root / "model", config)

    names = sorted(f.name for f in (folder / "model").iterdir())
    shards = [name for name in names if "safetensors" in name]
    assert len(shards) > 2
    return read, [f"model/{name}" for name in shards]


def tokenizer(folder: pathlib.Path):
    """Write a small tokenizer."""
    from kdjax.data import tokenizer as tokenizers

    tokenizers.make_word_tokenizer().save_pretrained(folder)
    names = ["tokenizer.json", "tokenizer_config.json"]

    def read(root):
        loaded = tokenizers.load(root)
        loaded("Who is the mother ?", add_special_tokens=False)

    return read, [name for name in names if (folder / name).is_file()]


def _examples(file: pathlib.Path, **fields):
    from kdjax.config import DataConfig
    from kdjax.data import sources

    config = DataConfig(path=str(file), num_eval=1, **fields)
    for example in sources.iter_examples(config, "train", seed=0):
        # No text may hold what a tokenizer cannot take.
        for text in (example.question, example.answer, *example.choices):
            text.encode()
        if example.choices:
            assert example.answer in example.choices


def _rows() -> list[dict]:
    return [
        {
            "id": number,
            "question": f"What is {number}?",
            "choices": ["one", "two", "three"],
            "answer": "two",
        }
        for number in range(8)
    ]


def jsonl(folder: pathlib.Path):
    """Write questions with choices, a row a line."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in _rows()))
    return lambda root: _examples(root / "rows.jsonl"), ["rows.jsonl"]


def json_array(folder: pathlib.Path):
    """Write the same as one array."""
    (folder / "rows.json").write_text(json.dumps(_rows(), indent=1))
    return lambda root: _examples(root / "rows.json"), ["rows.json"]


def csv(folder: pathlib.Path):
    """Write questions with free answers."""
    lines = ["id,question,answer", *(f'{n},"What, {n}?",{n + 1}' for n in range(8))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return lambda root: _examples(root / "rows.csv"), ["rows.csv"]


def parquet(folder: pathlib.Path):
    """Write questions with choices as columns."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(_rows())
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return lambda root: _examples(root / "rows.parquet"), ["rows.parquet"]


def gzip(folder: pathlib.Path):
    """Write rows compressed."""
    import gzip as library

    text = "".join(json.dumps(row) + "\n" for row in _rows())
    (folder / "rows.jsonl.gz").write_bytes(library.compress(text.encode(), mtime=0))
    return lambda root: _examples(root / "rows.jsonl.gz"), ["rows.jsonl.gz"]


FORMATS = {
    f.__name__: f
    for f in (config_json, weights, tokenizer, jsonl, json_array, csv, parquet, gzip)
}


def run(name: str, num: int, scratch: pathlib.Path, *, seed: int = 0):
    """Fuzz one format."""
    original = scratch / "original"
    original.mkdir(parents=True)
    read, files = FORMATS[name](original)
    return fuzz(read, original, files, num, scratch, seed=seed)


def main() -> None:
    """Fuzz the formats that the command names, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.formats:
        with tempfile.TemporaryDirectory() as scratch:
            started = time.monotonic()
            folder = pathlib.Path(scratch)
            outcomes = run(name, arguments.num, folder, seed=arguments.seed)
        seconds = time.monotonic() - started
        print(f"{name}: {sum(outcomes.values())} copies in {seconds:.0f} s", flush=True)
        for outcome, count in outcomes.most_common(8):
            print(f"  {count:6d}  {outcome}", flush=True)


if __name__ == "__main__":
    main()
