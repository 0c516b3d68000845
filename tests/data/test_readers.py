"""Formats, folders, globs and sets of rows: read alike, streamed, refused by name."""

import csv
import gzip
import io
import json
import pathlib
import random
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from kdjax.config import DataConfig
from kdjax.data import files, readers, splits
from kdjax.data.sources import iter_examples, load_examples

ROWS = [
    {"id": f"r{i}", "question": f"Où, Käse {i}?", "answer": f"da, {i}\n(b)"}
    for i in range(3)
]


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows, row_group_size=2):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return file.getvalue()


def as_arrow(rows, new=pa.ipc.new_file):
    file = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return file.getvalue()


CONTENTS = {
    ".jsonl": as_lines(ROWS),
    ".ndjson": as_lines(ROWS).replace(b"\n", b"\r\n"),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": as_csv(ROWS),
    ".tsv": as_csv(ROWS, "\t"),
    ".parquet": as_parquet(ROWS),
    ".arrow": as_arrow(ROWS),
    ".ipc": as_arrow(ROWS, pa.ipc.new_stream),
}
COMPRESSION = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def load(path, split="train", **fields):
    return load_examples(DataConfig(path=str(path), **fields), split, seed=0)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("end", COMPRESSION)
@pytest.mark.parametrize("suffix", CONTENTS)
def test_formats_are_read_alike(suffix, end, tmp_path):
    path = write(tmp_path / f"rows{suffix}{end}", COMPRESSION[end](CONTENTS[suffix]))
    examples = load(path)
    assert [(e.id, e.question, e.answer) for e in examples] == [
        tuple(row.values()) for row in ROWS
    ]
    origins = [e.origin.removeprefix(f"{path}:") for e in examples]
    # Of a table with cells of several lines, the line on which a row begins.
    first = 2 if suffix in (".csv", ".tsv") else 1
    step = 2 if suffix in (".csv", ".tsv") else 1
    assert origins == [str(first + step * i) for i in range(3)]


def test_a_format_is_seen_from_the_content(tmp_path):
    path = write(tmp_path / "rows.data", CONTENTS[".parquet"])
    assert files.inspect(str(path)).format == "parquet"
    assert files.inspect(str(write(path, CONTENTS[".ipc"]))).format == "arrow"
    assert files.inspect(str(write(path, CONTENTS[".jsonl"]))).format == "json"
    assert files.inspect(str(write(path, CONTENTS[".json"]))).format == "json"
    zipped = zstandard.compress(CONTENTS[".jsonl"])
    assert files.inspect(str(write(path, zipped))) == (str(path), "json", "zstd")
    # What `data.source` says counts where neither name nor content does.
    write(path, b"one\n\ntwo\n")
    assert [e.text for e in load(path, source="text")] == ["one", "two"]
    lines = write(tmp_path / "rows.txt", CONTENTS[".jsonl"])
    assert len(load(lines, source="jsonl")) == 3
    assert len(load(lines)) == 1  # one block of text


def test_frames_of_compression_one_after_another(tmp_path):
    for end in (".gz", ".zst"):
        content = b"".join(COMPRESSION[end](as_lines([row])) for row in ROWS)
        assert len(load(write(tmp_path / f"rows.jsonl{end}", content))) == 3


def test_large_arrays_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 7)
    path = write(tmp_path / "rows.json", CONTENTS[".json"])
    assert [dict(row.values) for row in readers.iter_rows([str(path)])] == ROWS
    with pytest.raises(ValueError, match=r"rows.json:3 .*"):
        list(readers.iter_rows([str(write(path, CONTENTS[".json"][:-9]))]))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_rows_are_streamed(suffix, tmp_path):
    rows = [{"id": i, "question": "q" * 2000, "answer": "a"} for i in range(5_000)]
    content = {
        ".jsonl": as_lines,
        ".json": lambda rows: json.dumps(rows).encode(),
        ".csv": as_csv,
        ".parquet": lambda rows: as_parquet(rows, 500),
        ".arrow": as_arrow,
    }[suffix](rows)
    path = write(tmp_path / f"rows{suffix}", content)
    next(iter_examples(DataConfig(path=str(path)), "train", seed=0))  # imports
    tracemalloc.start()
    config = DataConfig(path=str(path), num_eval=100)
    num = sum(1 for _ in iter_examples(config, "train", seed=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num == 4_900
    assert peak < 5e6  # a list of the rows takes over 10 MB


def test_shards_of_a_folder_are_read_in_order_of_their_names(tmp_path):
    for name, rows in {"b/2.jsonl.gz": [], "a.jsonl": [2], "b/1.jsonl": [3]}.items():
        content = as_lines([{"text": str(i)} for i in rows])
        if name.endswith(".gz"):
            content = gzip.compress(content)
        write(tmp_path / "rows" / name, content)
    for name in (".hidden.jsonl", "_SUCCESS", "README.md", "LICENSE", ".git/x.jsonl"):
        write(tmp_path / "rows" / name, b"{")
    assert [e.text for e in load(tmp_path / "rows")] == ["2", "3"]
    assert [e.text for e in load(tmp_path / "rows" / "*.jsonl")] == ["2"]
    assert [e.text for e in load(tmp_path / "rows" / "**" / "*.jsonl")] == ["2", "3"]
    for name in ("rows.jsonl~", "rows.bak", "Thumbs.db"):
        write(tmp_path / "rows" / name, as_lines([{"text": "5"}]))
    assert [e.text for e in load(tmp_path / "rows")] == ["2", "3"]
    other = write(tmp_path / "rows" / "a.jsonl.part", as_lines([{"text": "6"}]))
    with pytest.raises(ValueError, match=r"a.jsonl.part: its format is not seen"):
        load(tmp_path / "rows")
    other.unlink()
    write(tmp_path / "rows" / "c.jsonl", as_lines([{"text": "4"}]) + b"{oops\n")
    with pytest.raises(ValueError, match=r"c.jsonl:2 is not JSON"):
        load(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"x\*.jsonl' matches no file"):
        load(tmp_path / "rows" / "x*.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a folder without data files"):
        load(tmp_path / "empty")


def test_ids_that_two_shards_share(tmp_path):
    for name in "ab":
        write(tmp_path / "rows" / f"{name}.jsonl", as_lines(ROWS[:1]))
    with pytest.raises(ValueError, match=r"b.jsonl:1: id 'r0' .*first: .*a.jsonl:1\)"):
        load(tmp_path / "rows")


def test_a_folder_of_files_named_after_splits(tmp_path):
    names = ["data/train-00-of-02.parquet", "data/train-01-of-02.parquet"]
    for name, row in zip([*names, "data/validation-0.parquet"], ROWS, strict=True):
        write(tmp_path / name, as_parquet([row]))
    assert [e.id for e in load(tmp_path)] == ["r0", "r1"]
    assert [e.id for e in load(tmp_path, "eval", eval_split="validation")] == ["r2"]
    assert [e.id for e in load(tmp_path, "eval", eval_split="dev")] == ["r2"]
    with pytest.raises(ValueError, match=r"'test' is not in .*\['train', 'validation'"):
        load(tmp_path, "eval")
    write(tmp_path / "more.parquet", as_parquet(ROWS))
    with pytest.raises(ValueError, match=r"more.parquet', whose name tells none"):
        load(tmp_path)
    # Files of one split are shards.
    assert [e.id for e in load(tmp_path / names[0])] == ["r0"]
    config = {"num_eval": 1, "source": "auto"}
    (tmp_path / "more.parquet").unlink()
    (tmp_path / "data" / "validation-0.parquet").unlink()
    assert [e.id for e in load(tmp_path, "eval", **config)] == ["r1"]


def test_classes_have_names(tmp_path):
    features = datasets.Features(
        question=datasets.Value("string"),
        choices=datasets.List(datasets.Value("string")),
        answer=datasets.ClassLabel(names=["A", "B", "C", "D"]),
    )
    rows = [
        {"question": "q", "choices": ["3", "0", "2", "1"], "answer": answer}
        for answer in (0, 3, -1)
    ]
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        examples = load(path, on_missing="drop")
        assert [e.answer for e in examples] == ["3", "1", ""]
        with pytest.raises(
            ValueError, match=r":3: row 'train-2': answer=None is missing"
        ):
            load(path)


def test_classes_that_are_no_letters(tmp_path):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"])
    )
    rows = [{"text": "t", "label": 1}]
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    [example] = load(tmp_path / "rows.parquet", columns="question=text,answer=label")
    assert (example.question, example.answer) == ("t", "good")


def test_one_saved_split_is_rows(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert [e.id for e in load(tmp_path / "one", num_eval=1)] == ["r0", "r1"]
    assert [e.id for e in load(tmp_path / "one", "eval", num_eval=1)] == ["r2"]


def test_a_damaged_set_is_one_line(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved")
    (shard,) = (tmp_path / "saved" / "train").glob("*.arrow")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    damages = [lambda: None, shard.unlink]
    damages.append((tmp_path / "saved" / "train" / "state.json").unlink)
    for damage in damages:
        damage()
        with pytest.raises(ValueError, match=r"saved/train") as error:
            load(tmp_path / "saved")
        assert "\n" not in str(error.value)
    for text in ("{", "[]", "{}"):
        (tmp_path / "saved" / "dataset_dict.json").write_text(text)
        with pytest.raises(ValueError, match=r"dataset_dict.json"):
            load(tmp_path / "saved")


@pytest.mark.parametrize("name", [".parquet", ".arrow", ".ipc", ".json", ".jsonl.gz"])
def test_a_damage_is_one_line_or_harmless(name, tmp_path):
    suffix, _, end = name[1:].partition(".")
    content = COMPRESSION[f".{end}" if end else ""](CONTENTS[f".{suffix}"])
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(content)) :]
        for _ in range(rng.choice((1, 1, 8))):
            if damaged:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path = write(tmp_path / f"rows{name}", damaged)
        try:
            load(path)
        except ValueError as error:
            assert not isinstance(error, UnicodeDecodeError)
            assert f"rows{name}" in str(error) and "\n" not in str(error)


def test_columns_of_other_kinds(tmp_path):
    column = pa.array(["a", "b"]).dictionary_encode()
    table = pa.table({"question": column, "answer": pa.array([b"x", b"y"])})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet:1: .*answer=b'x' is bytes"):
        load(tmp_path / "rows.parquet")
    table = pa.table({"question": column, "answer": pa.array([7, 8])})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [(e.question, e.answer) for e in load(tmp_path / "rows.parquet")] == [
        ("a", "7"),
        ("b", "8"),
    ]
    names = pa.table([column, column, column], names=["question", "answer", "answer"])
    write(tmp_path / "rows.arrow", b"")
    with pa.ipc.new_file(tmp_path / "rows.arrow", names.schema) as writer:
        writer.write_table(names)
    with pytest.raises(ValueError, match=r"rows.arrow: two columns of"):
        load(tmp_path / "rows.arrow")


def test_choices_that_other_rows_do_not_have(tmp_path):
    rows = [
        {"question": "q", "choices": {"A": "w", "B": "x"}, "answer": "B"},
        {"question": "q", "choices": {"A": "w", "B": "x", "C": "y"}, "answer": "C"},
    ]
    path = write(tmp_path / "rows.parquet", as_parquet(rows))
    examples = load(path)
    assert [(e.choices, e.answer) for e in examples] == [
        (("w", "x"), "x"),
        (("w", "x", "y"), "y"),
    ]
    rows[0]["answer"] = "C"
    with pytest.raises(ValueError, match=r"rows.parquet:1: .*'C' is none of its"):
        load(write(path, as_parquet(rows)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nobody/nothing", "'nobody/nothing' is no file or folder .*not reached"),
        ("nobody/nothing:part", "'nobody/nothing:part' is no file or folder"),
        ("nothing.jsonl", "'nothing.jsonl' cannot be read .*No such file"),
        ("no/such/folder", "'no/such/folder' cannot be read"),
        ("https://host/rows.jsonl", "cannot be read"),
    ],
)
def test_what_is_not_there_is_one_line(path, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(pathlib.PurePath(path) if "//" not in path else path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_without_a_network_nobody_waits(monkeypatch):
    places = (datasets.config, __import__("huggingface_hub").constants)
    for place in places:
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(places[1], "ENDPOINT", "https://localhost:9")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with splits._offline_if_unreachable(local=False) as offline:
        assert offline and all(place.HF_HUB_OFFLINE for place in places)
    assert not any(place.HF_HUB_OFFLINE for place in places)


def test_code_of_data_sets_is_never_run(monkeypatch, tmp_path):
    calls = []
    saved = datasets.Dataset.from_list(ROWS)

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.DatasetDict(train=saved, test=saved)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert len(load("someone/set:part")) == 3
    assert calls == [(("someone/set", "part"), {"trust_remote_code": False})]
