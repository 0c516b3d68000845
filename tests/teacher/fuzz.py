"""Mutated caches and imports: read as they were, or refused in one line.

    python -m tests.teacher.fuzz [--count=10000] [--only=manifest] [--seed=0]

Every format has a sample, mutated by bytes or, where it is JSON, by values. Whoever
reads a mutant must raise ValueError in one line, or give something; where checksums
are on, it must be what the sample gives. Nothing takes 5 seconds or 1 GiB.
"""

import argparse
import contextlib
import copy
import dataclasses
import faulthandler
import hashlib
import json
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from array_record.python import array_record_module

from kdjax.teacher import cache as cache_lib
from kdjax.teacher import codec
from kdjax.teacher import manifest as manifest_lib
from kdjax.teacher.importers import convert, encodings
from tests.teacher import test_cache
from tests.teacher.importers import test_convert

MAX_SECONDS = 5.0
MAX_KIB = 2**20  # 1 GiB
# In place of any value of JSON.
VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**53 + 1,
        2**64,
        -(2**63),
        10**30,
        0.5,
        -0.0,
    ),
    *(1e308, float("inf"), float("nan"), "", "x", "\0", "\n", "\ud800", "7", "../../x"),
    *([], {}, [[]], [0] * 50, {"a": 1}, "9" * 5000, [[[[[[[[1]]]]]]]]),
)


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file: a sample, and a reader of it from its place in a folder."""

    name: str  # of the file
    sample: bytes
    read: Callable[[pathlib.Path], str]  # a digest of what is read
    checked: bool = False  # by checksums: nothing else may be read
    others: dict[str, bytes] = dataclasses.field(default_factory=dict)
    kind: str = "bytes"  # or "json", "jsonl": mutated by values, too
    seal: Callable[[dict], dict] | None = None  # makes a checksum right again


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Change some bytes in one of many ways."""
    mutant = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(len(mutant) + 1))
        match rng.integers(9):
            case 0 if mutant:
                mutant[place % len(mutant)] ^= 1 << int(rng.integers(8))
            case 1 if mutant:
                mutant[place % len(mutant)] = int(rng.integers(256))
            case 2:
                mutant[place:place] = rng.bytes(int(rng.integers(1, 20)))
            case 3:
                del mutant[place : place + int(rng.integers(1, 50))]
            case 4:
                other = int(rng.integers(len(mutant) + 1))
                mutant[place : place + 8] = mutant[other : other + 8]
            case 5:
                mutant[place : place + 8] = b"\xff" * 8
            case 6:
                mutant[place : place + 4] = bytes(4)
            case 7 if rng.random() < 0.2:
                del mutant[place:]
            case 8 if rng.random() < 0.2:
                mutant += mutant[place : place + 200]
    return bytes(mutant)


def mutate_value(value, rng: np.random.Generator):
    """Change one value, name or length somewhere in a value of JSON."""
    value = copy.deepcopy(value)
    parent, places = value, []
    while isinstance(parent, dict | list) and parent:
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = keys[int(rng.integers(len(keys)))]
        places.append((parent, key))
        parent = parent[key]
    if not places:
        return VALUES[rng.integers(len(VALUES))]
    owner, key = places[int(rng.integers(len(places)))]
    match rng.integers(5):
        case 0 if isinstance(owner, dict):
            owner[f"{key}x"] = owner.pop(key)
        case 1:
            del owner[key]
        case 2 if isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        case 3 if isinstance(owner[key], int | float) and owner[key] == owner[key]:
            with contextlib.suppress(OverflowError):
                owner[key] = owner[key] * 2 + 1
        case _:
            owner[key] = VALUES[rng.integers(len(VALUES))]
    return value


def mutants(form: Format, rng: np.random.Generator) -> Iterator[bytes]:
    """Yield changed samples without end."""
    while True:
        if form.kind == "bytes" or rng.random() < 0.3:
            yield mutate(form.sample, rng)
        elif form.kind == "json":
            value = mutate_value(json.loads(form.sample), rng)
            if form.seal and isinstance(value, dict):
                with contextlib.suppress(UnicodeEncodeError):
                    value = form.seal(value)
            yield json.dumps(value).encode()
        else:
            lines = form.sample.splitlines()
            number = int(rng.integers(len(lines)))
            changed = mutate_value(json.loads(lines[number]), rng)
            lines[number] = json.dumps(changed).encode()
            yield b"\n".join(lines)


def run(form: Format, folder: pathlib.Path, *, count: int, seconds: float, seed: int):
    """Read mutants of a format; returns how many were refused and how many read.

    Args:
      form: the format.
      folder: to write in.
      count: of mutants, at most.
      seconds: to spend, at most.
      seed: of the mutations.
    """
    for name, content in (form.others | {form.name: form.sample}).items():
        (folder / name).write_bytes(content)
    path = folder / form.name
    expected = form.read(path)
    rng, start = np.random.default_rng(seed), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    numbers, slowest = {"refused": 0, "read": 0, "same": 0}, 0.0
    for mutant, number in zip(mutants(form, rng), range(count), strict=False):
        if mutant == form.sample:
            continue
        path.write_bytes(mutant)
        began = time.perf_counter()
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            actual = form.read(path)
        except ValueError as error:
            text = str(error)
            if "\n" in text or len(text) > 2000:
                raise AssertionError(f"{form.name} {number}: {text[:300]!r}") from None
            numbers["refused"] += 1
        except Exception as error:
            raise AssertionError(
                f"{form.name}, mutant {number} of seed {seed}: {mutant[:300]!r}"
            ) from error
        else:
            numbers["same" if actual == expected else "read"] += 1
            if form.checked and actual != expected:
                raise AssertionError(f"{form.name}, mutant {number}: other numbers")
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.perf_counter() - began)
        for name, content in form.others.items():  # what a reader may have made again
            if (folder / name).read_bytes() != content:
                (folder / name).write_bytes(content)
        if time.perf_counter() - start > seconds:
            break
    assert slowest < MAX_SECONDS, f"{form.name}: {slowest:.1f} s"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MAX_KIB, f"{form.name}: {grown} KiB"
    return numbers | {"slowest": round(slowest, 3)}


def _digest(*arrays) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read_cache(path: pathlib.Path) -> str:
    cache = cache_lib.load_cache(path.parent)
    records = [cache.read(key) for key in cache]
    cache_lib.verify(cache)
    return _digest(*(array for record in records for array in record[:7]))


def _find(path: pathlib.Path) -> str:
    keys = [key for key, _ in test_cache._pairs(0)]
    cache = cache_lib.load_cache(path.parent)
    return _digest(*(cache.read(key).log_probs for key in keys))


def _importer(name: str, k: int = 3) -> Callable[[pathlib.Path], str]:
    def read(path: pathlib.Path) -> str:
        sequences = convert.FORMATS[name].read(path, k=k, vocab_size=100)
        return _digest(*(array for sequence in sequences for array in sequence))

    return read


def _parquet(folder: pathlib.Path, columns: dict, types: dict | None = None) -> bytes:
    schema = pa.schema(list(types.items())) if types else None
    pq.write_table(pa.table(columns, schema), folder / "sample.parquet")
    return (folder / "sample.parquet").read_bytes()


def _seal(fields: dict) -> dict:
    fields = {name: value for name, value in fields.items() if name != "checksum"}
    return fields | {"checksum": manifest_lib._checksum(fields)}


def make_formats(folder: pathlib.Path) -> dict[str, Format]:
    """Make a sample of every format."""
    folder.mkdir(exist_ok=True)
    test_cache._write_cache(folder / "cache", num_shards=2)
    files = {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}
    shard = cache_lib.shard_name(1, 2)

    def of_cache(name: str, **options) -> Format:
        others = {key: value for key, value in files.items() if key != name}
        return Format(name=name, sample=files[name], others=others, **options)

    without_index = {k: v for k, v in files.items() if k != cache_lib.INDEX}
    record = test_cache._pairs(0)[0][1]
    coder = test_cache.IdCoder(np.arange(3), test_cache.VOCAB_SIZE)
    temperatures = test_cache.TEMPERATURES

    def decode(path: pathlib.Path) -> str:
        data = path.read_bytes()
        decoded = codec.decode(data, coder, kind="top_k", temperatures=temperatures)
        return _digest(*decoded[:7])

    vllm = json.dumps(test_convert.VLLM).encode()
    sglang = {
        "meta_info": {
            "input_token_logprobs": [
                [None, 7, None],
                [-0.5, 9, None],
                [-6.0, 42, None],
            ],
            "input_top_logprobs": [
                None,
                [[-0.5, 9, None], [-1.0, 8, None]],
                [[-0.25, 1, None], [-2.5, 2, None]],
            ],
        }
    }
    axolotl = {
        "logprobs": [[-0.1, -3.0], [-0.5, -2.0], []],
        "target_token_ids": [[1, 2], [3, 4], []],
    }
    older = {"logprobs": [[{"token": "token_id:7", "logprob": -0.5}], None]}
    raw = {
        "input_ids": [[7, 9, 42]],
        "token_ids": [[[9, 8, 3], [1, 2, 3]]],
        "top_values": [[[-0.5, -1.0, -2.0], [-0.25, -2.5, -4.0]]],
    }
    compression = {
        "d": 100,
        "k": 3,
        "exact_k": 3,
        "exact_dtype": "float32",
        "polynomial_terms": [],
        "residual_bins": [],
        "delta_encoding": False,
    }
    packed = {
        "input_ids": [[7, 9]],
        "bytepacked_indices": [[[0x12, 0x10, 0x18]]],
        "compressed_logprobs": [[list(np.float32([-0.5, -1, -2]).tobytes())]],
    }
    types = {
        "input_ids": pa.list_(pa.int64()),
        "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
        "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
    }
    example = test_convert.serialise(
        {
            "inputs": [5, 6, 7],
            "top_k_indices": [6, 1, 7, 2, 8, 3],
            "top_k_logits": [2.0, 1.0, 3.0, 0.5, 1.0, 0.0],
        }
    )
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "sample"), "group_size:2"
    )
    for _ in range(5):
        writer.write(example)
    writer.close()
    maxtext = (folder / "sample").read_bytes()
    settings = yaml.safe_dump(compression).encode()

    def settings_of(path: pathlib.Path) -> str:
        return str(encodings.read_compression(path))

    def features(path: pathlib.Path) -> str:
        parsed = encodings.parse_example(path.read_bytes())
        return str(
            {name: np.asarray(value).tobytes() for name, value in parsed.items()}
        )

    return {
        "manifest": of_cache(
            "manifest.json", read=_read_cache, kind="json", checked=True
        ),
        "manifest, sealed": of_cache(
            "manifest.json", read=_read_cache, kind="json", seal=_seal
        ),
        "shard": of_cache(shard, read=_read_cache, checked=True),
        "shard, no index": Format(
            name=shard,
            sample=files[shard],
            others={k: v for k, v in without_index.items() if k != shard},
            read=_read_cache,
            checked=True,
        ),
        "index": of_cache(cache_lib.INDEX, read=_find, checked=True),
        "record": Format(
            name="record",
            sample=codec.encode(record, coder, temperatures=temperatures),
            read=decode,
        ),
        "vllm": Format("a.jsonl", vllm, _importer("vllm"), kind="jsonl"),
        "sglang": Format(
            "a.jsonl", json.dumps(sglang).encode(), _importer("sglang"), kind="jsonl"
        ),
        "axolotl": Format(
            "a.jsonl",
            b"\n".join(json.dumps(each).encode() for each in (axolotl, older)),
            _importer("axolotl"),
            kind="jsonl",
        ),
        "axolotl, parquet": Format(
            "a.parquet",
            _parquet(folder, {name: [value] for name, value in axolotl.items()}),
            _importer("axolotl"),
        ),
        "distillkit": Format(
            "a.parquet", _parquet(folder, raw), _importer("distillkit")
        ),
        "distillkit, compressed": Format(
            "a.parquet",
            _parquet(folder, packed, types),
            _importer("distillkit"),
            others={"compression_config.yaml": settings},
        ),
        "compression_config.yaml": Format("c.yaml", settings, settings_of),
        "tf.Example": Format("example", example, features),
        "maxtext": Format(
            "a.array_record", maxtext, _importer("maxtext"), checked=True
        ),
    }


def main() -> None:
    """Fuzz every format and print how many mutants were refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for number, (name, form) in enumerate(make_formats(folder / "samples").items()):
            if arguments.only not in name:
                continue
            place = folder / str(number)
            place.mkdir()
            numbers = run(
                form, place, count=arguments.count, seconds=1e9, seed=arguments.seed
            )
            print(f"{name}: {numbers}", flush=True)


if __name__ == "__main__":
    main()
