"""Preparing data, and starting from prepared data, at a million rows.

    python benchmarks/prepare.py rows GSM8K/train.jsonl 1000000 ROWS.jsonl
    python benchmarks/prepare.py tokenize ROWS.jsonl TOKENIZER
    python benchmarks/prepare.py prepare ROWS.jsonl TOKENIZER FOLDER
    python benchmarks/prepare.py start ROWS.jsonl TOKENIZER FOLDER
    python benchmarks/prepare.py formats ROWS.jsonl TOKENIZER FOLDER

`rows` repeats the rows of GSM8K with suffixes that make them distinct. `tokenize` is
the bound: the tokenizer alone, on all cores, on the texts of 20,000 rows. `prepare` is
all of it: reading, templates, tokens, shards. `start` opens what was prepared and makes
batches; times and resident memory are those beyond the imports. `formats` writes
segments of it as an Arrow file and as ArrayRecord, and reads all three in a random
order. One line of JSON each.
"""

import itertools
import json
import pathlib
import resource
import sys
import time

from kdjax.config import Config, DataConfig, MethodConfig, TrainConfig

_NUM_TOKENIZED = 20_000  # rows
_NUM_BATCHES = 300
_NUM_SEGMENTS = 50_000  # of `formats`
_CHILDREN = resource.RUSAGE_CHILDREN


def make_config(rows: str, tokenizer: str) -> Config:
    """Return the config of rationale_then_label on the rows."""
    data = DataConfig(
        path=rows,
        schema="gsm8k",
        num_eval=500,
        tokenizer=tokenizer,
        max_prompt=512,
        max_target=512,
        on_long="truncate",
    )
    return Config(
        name="prepare",
        data=data,
        method=MethodConfig(
            name="rationale_then_label", hard_weight=1.0, soft_weight=0.0
        ),
        train=TrainConfig(batch_size=32, row_length=1024),
    )


def make_rows(source: str, num: str, out: str) -> dict:
    """Write `num` distinct rows."""
    rows = [json.loads(line) for line in pathlib.Path(source).read_text().splitlines()]
    with open(out, "w") as file:
        for number, row in enumerate(itertools.islice(itertools.cycle(rows), int(num))):
            question = f"{row['question']} (variant {number})"
            file.write(json.dumps(row | {"question": question}) + "\n")
    return {"rows": int(num), "bytes": pathlib.Path(out).stat().st_size}


def tokenize(rows: str, path: str) -> dict:
    """Time the tokenizer alone, with its own threads."""
    from kdjax.data import sources, templates
    from kdjax.experiment.data import load_tokenizer

    config = make_config(rows, path)
    tokenizer = load_tokenizer(config)
    examples = itertools.islice(
        sources.iter_examples(config.data, "train", seed=0), _NUM_TOKENIZED
    )
    texts = [
        text
        for example in examples
        for rendered in templates.render(example, "rationale_then_label", config.data)
        for text in (rendered.prompt, rendered.target)
    ]
    start = time.perf_counter()
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(
        texts, add_special_tokens=False
    )
    seconds = time.perf_counter() - start
    return {
        "rows_per_minute": 60 * _NUM_TOKENIZED / seconds,
        "tokens_per_row": sum(len(e.ids) for e in encodings) / _NUM_TOKENIZED,
    }


def prepare(rows: str, path: str, folder: str) -> dict:
    """Time the first start, which prepares the data."""
    from kdjax.experiment.data import load_data

    before = memory()
    start = time.perf_counter()
    data = load_data(make_config(rows, path), pathlib.Path(folder), splits=("train",))
    seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, _CHILDREN)]
    core_seconds = sum(u.ru_utime + u.ru_stime for u in used)
    return {
        "segments": len(data.train),
        "seconds": seconds,
        "rows_per_core_minute": 60 * len(data.train) / core_seconds,
        "rows_per_minute": 60 * len(data.train) / seconds,
        "bytes": data.train.num_bytes,
        "peak_mib_beyond_imports": memory("VmHWM") - before,
    }


def start(rows: str, path: str, folder: str) -> dict:
    """Time a later start to its first batch, and further batches."""
    import jax
    import numpy as np

    from kdjax.data import loader
    from kdjax.experiment.data import load_data
    from kdjax.experiment.methods import terms

    jax.devices()
    config = make_config(rows, path)
    before = memory()
    clock = [time.perf_counter()]
    data = load_data(config, pathlib.Path(folder))
    clock.append(time.perf_counter())
    plan = loader.BatchPlan(data.train, batch_size=32, row_length=1024, seed=0)
    loader.make_batch(plan, 0, terms=terms(config.method))
    clock.append(time.perf_counter())
    seconds = []
    for step in range(1, _NUM_BATCHES):
        begin = time.perf_counter()
        loader.make_batch(plan, step * 7, terms=terms(config.method))
        seconds.append(time.perf_counter() - begin)
    return {
        "segments": len(data.train),
        "seconds_to_open": clock[1] - clock[0],
        "seconds_to_first_batch": clock[2] - clock[0],
        "steps_per_epoch": plan.steps_per_epoch(0),
        "packing_efficiency": plan.packing_efficiency(),
        "batch_ms_median": 1e3 * float(np.median(seconds)),
        "batch_ms_max": 1e3 * max(seconds),
        "mib_beyond_imports": memory() - before,
        "peak_mib_beyond_imports": memory("VmHWM") - before,
    }


def formats(rows: str, path: str, folder: str) -> dict:
    """Compare random reads of the store, of an Arrow file and of ArrayRecord."""
    import numpy as np
    import pyarrow as pa
    from array_record.python import array_record_module

    from kdjax.data.views import Segment
    from kdjax.experiment.data import load_data

    data = load_data(make_config(rows, path), pathlib.Path(folder), splits=("train",))
    segments = [data.train[i] for i in range(_NUM_SEGMENTS)]
    columns = {
        "id": [s.example_id for s in segments],
        "key": [s.key for s in segments],
        "prompt": [s.prompt_ids for s in segments],
        "target": [s.target_ids for s in segments],
    }
    table = pa.table(columns)
    files = [f"{folder}/segments.arrow", f"{folder}/segments.array_record"]
    with (
        pa.OSFile(files[0], "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=16384)
    options = "group_size:1,uncompressed"
    writer = array_record_module.ArrayRecordWriter(files[1], options)
    for s in segments:
        ids = s.prompt_ids.tobytes() + s.target_ids.tobytes()
        writer.write(len(s.prompt_ids).to_bytes(4, "little") + s.key + ids)
    writer.close()
    arrow = pa.ipc.open_file(pa.memory_map(files[0])).read_all()
    prompts, targets = arrow["prompt"], arrow["target"]
    reader = array_record_module.ArrayRecordReader(files[1], "readahead_buffer_size:0")

    def read_arrow(i: int) -> Segment:
        ids = (prompts[i].values.to_numpy(), targets[i].values.to_numpy())
        return Segment(arrow["id"][i].as_py(), 0, *ids, arrow["key"][i].as_py())

    def read_record(i: int) -> Segment:
        (content,) = reader.read([i])
        ids = np.frombuffer(content, np.int32, offset=20)
        num = int.from_bytes(content[:4], "little")
        return Segment("", 0, ids[:num], ids[num:], content[4:20])

    order = np.random.default_rng(0).integers(0, _NUM_SEGMENTS, 20_000).tolist()
    result = {}
    for name, read in (
        ("store", data.train.read),
        ("arrow", read_arrow),
        ("array_record", read_record),
    ):
        before, start = memory(), time.perf_counter()
        for i in order:
            read(i)
        microseconds = 1e6 * (time.perf_counter() - start) / len(order)
        result[name] = {"us_per_read": microseconds, "mib_more": memory() - before}
    return result


def memory(name: str = "VmRSS") -> float:
    """Return resident memory of this process, MiB."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


COMMANDS = {
    "rows": make_rows,
    "tokenize": tokenize,
    "prepare": prepare,
    "start": start,
    "formats": formats,
}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])))
