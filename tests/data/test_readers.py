"""Formats, folders, globs and sets of rows: read alike, streamed, refused by name."""

import csv
import gzip
import io
import json
import os
import pathlib
import random
import tracemalloc
import types
import uuid

import datasets
import numpy as np
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


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("trainSet", "testSet", "test"),
        ("QATrain", "QATest", "test"),
        ("trainset", "testset", "test"),
        ("TRAIN", "TEST", "test"),
        ("TRAINset", "DEVset", "validation"),
        ("trn", "tst", "test"),
        ("train", "heldout", "validation"),
        ("train", "held_out", "validation"),
        ("train", "rowsHeldOut", "validation"),
        ("train", "hold-out", "validation"),
        ("train", "holdout", "validation"),
    ],
)
def test_words_that_name_splits(train, other, split, tmp_path):
    write(tmp_path / f"{train}.jsonl", as_lines(ROWS[:2]))
    write(tmp_path / f"{other}.jsonl", as_lines(ROWS[2:]))
    assert [e.id for e in load(tmp_path)] == ["r0", "r1"]
    assert [e.id for e in load(tmp_path, "eval", eval_split=split)] == ["r2"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rows", "test"], "rows.jsonl', whose name tells none"),
        (["heldout", "rows"], "rows.jsonl', whose name tells none"),
        (["train_test", "test"], "train_test.jsonl', whose name tells several"),
        (["train_test", "rows"], "rows.jsonl', whose name tells none"),
        (["train", "trainTest"], "trainTest.jsonl', whose name tells several"),
        (["train_test", "dev_test"], "whose name tells several"),
    ],
)
def test_files_beside_those_of_a_split(names, message, tmp_path):
    for name in names:
        write(tmp_path / f"{name}.jsonl", as_lines(ROWS))
    with pytest.raises(ValueError, match=rf"{message}: give a file or a glob"):
        load(tmp_path, num_eval=1)


@pytest.mark.parametrize(
    "names", [["train-1", "train-2"], ["train", "more"], ["test-1", "test-2"]]
)
def test_files_that_are_one_split(names, tmp_path):
    for name, row in zip(names, ROWS, strict=False):
        write(tmp_path / f"{name}.jsonl", as_lines([row]))
    assert len(load(tmp_path, num_eval=1)) == 1
    write(tmp_path / "alone" / "train_test.jsonl", as_lines(ROWS))
    assert len(load(tmp_path / "alone")) == 3


@pytest.mark.parametrize(
    ("shards", "missing"),
    [
        ([(0, 3), (2, 3)], "x-00001-of-00003.jsonl' is missing"),
        ([(0, 3), (1, 3)], "x-00002-of-00003.jsonl' is missing"),
        ([(1, 3), (2, 3)], "x-00000-of-00003.jsonl' is missing"),
        ([(0, 2), (1, 2), (2, 3)], "x-00000-of-00003.jsonl' is missing"),
        ([(0, 1), (0, 2), (1, 2)], "x-.*.jsonl' are shards of 1 and of 2: keep"),
        ([(0, 2), (1, 2)], ""),
        ([(1, 2), (2, 2)], ""),  # also counted from 1
    ],
)
def test_a_missing_shard(shards, missing, tmp_path):
    for index, (number, total) in enumerate(shards):
        name = f"x-{number:05}-of-{total:05}.jsonl"
        write(tmp_path / name, as_lines([{"id": index, "text": "t"}]))
    for path in (tmp_path, tmp_path / "*.jsonl"):
        if missing:
            with pytest.raises(ValueError, match=missing):
                load(path)
        else:
            assert len(load(path)) == len(shards)
    # What is asked for by name is read.
    assert len(load(tmp_path / name)) == 1


def test_a_glob_of_some_shards(tmp_path):
    for number in range(3):
        write(tmp_path / f"x-0000{number}-of-00003.jsonl", as_lines([{"text": "t"}]))
    assert len(load(tmp_path / "x-0000[01]-*.jsonl")) == 2


def test_shards_of_other_ends(tmp_path):
    """As older sets of the hub end their names, and as some files are compressed."""
    for number in range(2):
        name = f"train-0000{number}-of-00002-{number}c91cd5f7a5f5b3e.jsonl"
        write(tmp_path / "a" / name, as_lines([{"text": "t"}]))
    assert len(load(tmp_path / "a")) == 2
    (tmp_path / "a" / name).unlink()
    with pytest.raises(ValueError, match=r"train-00001-of-00002.jsonl' is missing"):
        load(tmp_path / "a")
    row = as_lines([{"text": "t"}])
    write(tmp_path / "b" / "x-00000-of-00002.jsonl", row)
    write(tmp_path / "b" / "x-00001-of-00002.jsonl.gz", gzip.compress(row))
    assert len(load(tmp_path / "b")) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train.jsonl", "train.csv"),
        ("train.jsonl", "train.jsonl.gz"),
        ("a/train.json.zst", "a/train.parquet"),
        ("train.jsonl", "train (1).jsonl"),
        ("train.jsonl", "train(2).jsonl"),
        ("train.jsonl", "train copy.jsonl"),
        ("train.jsonl", "train copy 2.jsonl"),
        ("train.jsonl", "train - Copy.jsonl"),
        ("train.jsonl", "train - Copy (2).jsonl"),
        ("train.jsonl", "Copy of train.jsonl"),
        ("train.jsonl", "train (1).jsonl.gz"),
    ],
)
def test_files_that_would_be_read_twice(first, second, tmp_path):
    write(tmp_path / "rows" / first, b"")
    write(tmp_path / "rows" / second, b"")
    for path in (tmp_path / "rows", tmp_path / "rows" / "**" / "*"):
        with pytest.raises(ValueError, match="the same rows") as error:
            files.find_files(str(path))
        assert repr(str(tmp_path / "rows" / first)) in str(error.value)
        assert repr(str(tmp_path / "rows" / second)) in str(error.value)
        assert "\n" not in str(error.value)


def test_files_of_other_names_are_read_once(tmp_path):
    names = ["a.v1.jsonl", "a.v2.jsonl", "b/a.v1.csv", "c (1).csv", "c (2).csv"]
    for name in names:
        write(tmp_path / name, b"")
    assert len(files.find_files(str(tmp_path))) == len(names)


@pytest.mark.parametrize("cell", ["null", "NULL", "<NA>", "#N/A", "", "NaN", "nan"])
def test_cells_that_stand_for_nothing(cell, tmp_path):
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        content = delimiter.join(("question", "answer\nq", f"{cell}\n")).encode()
        path = write(tmp_path / f"rows{suffix}", content)
        with pytest.raises(ValueError, match=rf"rows{suffix}:2: .*answer=None is miss"):
            load(path)


@pytest.mark.parametrize("cell", ["NA", "none", "no", "nil", "None of them", "#"])
def test_cells_that_are_words(cell, tmp_path):
    path = write(tmp_path / "rows.csv", f"question,answer\nq,{cell}\n".encode())
    assert [e.answer for e in load(path)] == [cell]


@pytest.mark.parametrize(
    "cell", ["#REF!", "#DIV/0!", "#VALUE!", "#NAME?", "#NUM!", "#NULL!"]
)
def test_errors_of_a_spreadsheet(cell, tmp_path):
    path = write(tmp_path / "rows.csv", f"question,answer\nq,a\nq,{cell}\n".encode())
    with pytest.raises(ValueError, match=r"rows.csv:3: answer=.* an error of") as error:
        load(path)
    assert repr(cell) in str(error.value)


@pytest.mark.parametrize(
    "line", ["sep=,", "sep=;", '"sep=,"', "SEP=,", "sep=", "sep=\t"]
)
def test_the_separator_that_a_spreadsheet_writes(line, tmp_path):
    path = write(tmp_path / "rows.csv", f"{line}\nquestion,answer\nq,a\n".encode())
    with pytest.raises(ValueError, match=r"(?i)rows.csv:1 is 'sep=.*remove the line"):
        load(path)


NO_ROWS = {
    "pandas": {"question": {"0": "p", "1": "q"}, "answer": {"0": "a", "1": "b"}},
    "pandas, a row": {"question": {"0": "q"}, "answer": {"0": "a"}},
    "pandas, some": {"question": {"3": "q", "7": "q"}, "answer": {"3": "a", "7": "b"}},
    "pandas, index": {str(i): row for i, row in enumerate(ROWS)},
    "pandas, split": {"columns": ["text"], "index": [0, 1], "data": [["a"], ["b"]]},
    "pandas, table": {"schema": {"fields": []}, "data": ROWS},
    "columns": {"question": ["p", "q"], "answer": ["a", "b"]},
    "columns of numbers": {"question": ["p", "q"], "answer": [1, None]},
    "columns of chats": {"messages": [[{"role": "user", "content": "q"}]] * 2},
    "data": {"data": ROWS},
    "any name": {"problems": ROWS},
    "splits": {"train": ROWS, "test": ROWS[:1]},
    "SQuAD": {"version": "1.1", "data": ROWS},
}


@pytest.mark.parametrize("case", NO_ROWS)
def test_an_object_that_is_no_row(case, tmp_path):
    content = json.dumps(NO_ROWS[case]).encode()
    path = write(tmp_path / "rows.json", content)
    message = r"rows.json:1 is one object, not rows: give a list .*orient='records'"
    for end in (b"", b"\n\n"):
        write(path, content + end)
        with pytest.raises(ValueError, match=message) as error:
            load(path)
        assert "\n" not in str(error.value)
    # A line of several is a row, and so is an element of a list.
    for many in (content + b"\n" + content, b"[" + content + b"]"):
        assert next(readers.iter_rows([str(write(path, many))])).values == NO_ROWS[case]


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": SHARED},
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]},
        {"chosen": TURNS, "rejected": TURNS},
        {"question": "q", "choices": ["a", "b"], "answer": "b"},
        {"question": "q", "answer": "b", "data": [{"x": 1}, {"x": 2}]},
        {
            "question": {"stem": "q", "choices": [{"label": "A", "text": "a"}]},
            "answerKey": "A",
        },
        {"context": "c", "question": "q", "answers": {"text": ["c"]}},
        {"question": "q", "choices": {"0": "a", "1": "b"}, "answer": "b"},
        {"body": {"text": "q"}, "solutions": [{"value": "a"}]},
        {"text": "t"},
        {"question": ["q"], "answer": ["a"]},
        {"body": {}},
        {},
    ],
    ids=str,
)
def test_an_object_that_is_the_only_row(row, tmp_path):
    path = write(tmp_path / "rows.jsonl", as_lines([row]))
    assert [r.values for r in readers.iter_rows([str(path)])] == [row]


def test_kinds_in_words():
    class HTTPError2:
        pass

    assert readers.kind_of(uuid.UUID(int=1)) == "UUID"
    assert readers.kind_of(pathlib.PurePosixPath("a")) == "Pure Posix Path"
    assert readers.kind_of(HTTPError2()) == "HTTPError2"


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


def as_type(value, kind):
    return pa.array([None, value], pa.int64()).view(kind)


TWICE = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (as_type(10**18, pa.timestamp("s")), r"<timestamp\[s\]> .*too large"),
        (as_type(10**18, pa.timestamp("us", "UTC")), "UTC.*out of range"),
        (as_type(-(10**18), pa.duration("s")), r"<duration\[s\]> .*too large"),
        (as_type(1, pa.timestamp("s", "Mars/Base")), "Mars/Base"),
        (pa.array([None, 2**31 - 1], pa.int32()).view(pa.date32()), "<date32"),
        (TWICE.take([None, 0]), "duplicate field names"),
        (pa.ListArray.from_arrays([None, 0, 1], TWICE), "duplicate field names"),
    ],
)
def test_values_that_python_cannot_hold(column, message, tmp_path):
    texts = pa.array(["a", "b"])
    table = pa.table({"question": texts, "answer": texts, "when": column})
    path = tmp_path / "rows.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    # A column that nobody reads does no harm.
    assert [(e.question, e.answer) for e in load(path)] == [("a", "a"), ("b", "b")]
    message = f"rows.arrow:2: .*answer=.*{message}.*, not text: write it as text"
    with pytest.raises(ValueError, match=message) as error:
        load(path, columns="answer=when", on_missing="drop")
    assert "\n" not in str(error.value)


def test_a_saved_set_with_a_value_that_python_cannot_hold(tmp_path):
    texts = pa.array(["a", "b"])
    when = as_type(10**18, pa.timestamp("s"))
    table = datasets.Dataset(pa.table({"text": texts, "when": when}))
    table.save_to_disk(tmp_path / "one")
    assert [e.text for e in load(tmp_path / "one", num_eval=1)] == ["a"]
    with pytest.raises(ValueError, match=r"one:2: .*text=<timestamp\[s\]> is a value"):
        load(tmp_path / "one", "eval", columns="text=when", num_eval=1)


def with_metadata(path, answers, metadata):
    table = pa.table({"question": ["q"] * len(answers), "answer": answers})
    metadata = metadata if isinstance(metadata, bytes) else json.dumps(metadata)
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)
    return path


def features_of(answer):
    return {"info": {"features": {"answer": answer}}}


CLASSES = {"_type": "ClassLabel", "names": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b"", "is not JSON"),
        (b"{oops", "is not JSON"),
        (b'{"info": "\xe9"}', "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"info": {}, "info": {}}', "'info' twice"),
        ([], "is a list"),
        (None, "is nothing"),
        ({"info": []}, "is a list"),
        ({"info": None}, "is nothing"),
        ({"info": {"features": []}}, r"\[\] is a list"),
        ({"info": {"features": "x"}}, "'x' is text"),
        (features_of(None), "the feature None is nothing"),
        (features_of([]), r"the feature \[\]"),
        (features_of([CLASSES, CLASSES]), r"the feature \[\{"),
        (features_of({"_type": 3}), "the feature 3 is a number"),
        (features_of({"_type": "List", "feature": None}), "the feature None"),
        (features_of({"_type": "ClassLabel"}), "class names None"),
        (features_of({**CLASSES, "names": None}), "class names None"),
        (features_of({**CLASSES, "names": "abc"}), "class names 'abc'"),
        (features_of({**CLASSES, "names": {"a": 0}}), "class names {'a': 0}"),
        (features_of({**CLASSES, "names": ["a", None]}), "class names .*None"),
        (features_of({**CLASSES, "names": ["a", ["b"]]}), "class names"),
        (features_of({**CLASSES, "names": ["a", "a"]}), "class names"),
    ],
)
def test_broken_metadata(metadata, message, tmp_path):
    path = with_metadata(tmp_path / "rows.parquet", [0, 1], metadata)
    message = f"rows.parquet: its metadata 'huggingface' .*{message}.*or without it"
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_metadata_without_classes(tmp_path):
    for metadata in (
        {},
        {"info": {}},
        {"info": {"features": None}},
        features_of({"dtype": "int64", "_type": "Value"}),
    ):
        path = with_metadata(tmp_path / "rows.parquet", [0, 1], metadata)
        assert [e.answer for e in load(path)] == ["0", "1"]
    path = with_metadata(path, [0, 1], features_of({**CLASSES, "names": [5, 6]}))
    assert [e.answer for e in load(path)] == ["5", "6"]
    path = with_metadata(path, ["a", None], features_of(CLASSES))
    assert [e.answer for e in load(path, on_missing="drop")] == ["a", ""]


def sequence_of(feature):
    return {"_type": "Sequence", "feature": feature}


@pytest.mark.parametrize(
    ("answers", "feature", "message"),
    [
        ([0, 7], CLASSES, r"answer=7 is no index of the 3 classes \['a', 'b', 'c'\]"),
        ([0, 10**15], CLASSES, "answer=10{15} is no index"),
        ([0.0, 1.0], CLASSES, "answer=0.0 is no index"),
        ([True, False], CLASSES, "answer=True is no index"),
        (["a", "0"], CLASSES, "answer='0' is no index"),
        ([[0], [3]], [CLASSES], "answer=3 is no index"),
        ([[0], [3]], sequence_of(CLASSES), "answer=3 is no index"),
        ([0, 1], [CLASSES], "answer=0 is a number"),
        (["ab", "c"], [CLASSES], "answer='ab' is text"),
        ([{"x": 0}, {"x": 3}], {"x": CLASSES}, "answer x=3 is no index"),
        ([[{"x": 0}], [{"x": 3}]], [{"x": CLASSES}], "answer x=3 is no index"),
        ([{"x": [0]}, {"x": [3]}], sequence_of({"x": CLASSES}), "answer x=3 is no"),
        ([[0], [1]], {"x": CLASSES}, r"answer=\[0\] is a list"),
        ([{"x": 0}, {"x": 1}], sequence_of(CLASSES), "answer={'x': 0} is an object"),
    ],
)
def test_values_that_are_of_no_class(answers, feature, message, tmp_path):
    path = with_metadata(tmp_path / "rows.parquet", answers, features_of(feature))
    with pytest.raises(ValueError, match=rf"rows.parquet:[12]: {message}") as error:
        list(readers.iter_rows([str(path)]))
    assert "\n" not in str(error.value)


def test_a_saved_set_with_values_of_no_class(tmp_path):
    table = datasets.Dataset.from_list([{"question": "q", "answer": i} for i in (0, 7)])
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved" / "train" / "dataset_info.json"
    info = json.loads(file.read_text())
    info["features"]["answer"] = CLASSES
    file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"saved/train:2: answer=7 is no index"):
        load(tmp_path / "saved")
    info["features"]["answer"] = {**CLASSES, "names": ["a", None]}
    file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"saved/train' .*class names .*save it again"):
        load(tmp_path / "saved")


def test_a_tfds_set_with_values_of_no_class():
    rows = [{"label": np.int64(1), "raw": b"\xff", "l": [{"text": b"a"}]}]
    rows.append({**rows[0], "label": np.int64(2)})
    rows[0]["labels"] = np.array([0, 1])
    names = types.SimpleNamespace(names=["a", "b"])
    features = {"label": names, "raw": object()}
    features["labels"] = types.SimpleNamespace(feature=names, names=names.names)
    builder = types.SimpleNamespace(
        info=types.SimpleNamespace(features=features),
        data_dir="set",
        as_data_source=lambda split: rows,
    )
    found = splits._tfds_rows(builder, "train")
    assert next(found)[:3] == (
        "set/train",
        1,
        {"label": "b", "raw": b"\xff", "l": [{"text": "a"}], "labels": ["a", "b"]},
    )
    with pytest.raises(ValueError, match=r"set/train:2: label=2 is no index of the 2"):
        next(found)


@pytest.mark.parametrize("columns", [{}, {"question": ["q"], "answer": ["a"]}])
def test_an_empty_split_has_no_rows(columns, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    empty = datasets.Dataset.from_dict(columns).select([])
    datasets.DatasetDict(train=table, test=empty).save_to_disk(tmp_path / "saved")
    assert len(load(tmp_path / "saved")) == 3
    with pytest.raises(ValueError, match=r"split 'test' of path=.*saved' has no rows"):
        load(tmp_path / "saved", "eval")
    empty.save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"one' has no rows"):
        load(tmp_path / "one")


def test_names_of_saved_splits(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved" / "dataset_dict.json"
    content = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + content)
    assert len(load(tmp_path / "saved")) == 3
    for text in (
        content.decode().encode("utf-16"),
        content.decode().encode("utf-16-le"),
        content.replace(b"test", b"t\xe9st"),
    ):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=r"dataset_dict.json:1 is not UTF-8"):
            load(tmp_path / "saved")
    for name in (3, None, "", ".", "..", "../x", "/etc", "a/b", ["a"], "a\0", "\ud83d"):
        file.write_text(json.dumps({"splits": ["train", name]}))
        with pytest.raises(ValueError, match=r"dataset_dict.json names the split") as e:
            load(tmp_path / "saved")
        assert str(e.value).isprintable()


def test_marks_of_order_where_files_were_joined(tmp_path):
    mark = b"\xef\xbb\xbf"
    path = write(tmp_path / "rows.txt", mark * 2 + b"one\n\n" + mark + b"two\n" + mark)
    assert [e.text for e in load(path)] == ["one", "two"]
    path = write(tmp_path / "rows.json", mark * 2 + b'[{"text": "a"},' + mark + b"]")
    with pytest.raises(ValueError, match=r"rows.json:2 is missing after a comma"):
        load(path)
    write(path, mark * 2 + b'[{"text": "a"}]' + mark)
    assert [e.text for e in load(path)] == ["a"]
    rows = mark * 2 + b"id,text\n1,one\n" + mark + b"2,two\n"
    assert [e.id for e in load(write(tmp_path / "rows.csv", rows))] == ["1", "2"]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_bytes_that_are_no_text(suffix, tmp_path):
    rows = b"".join(b'{"text": "%d"}\n' % i for i in range(9))
    path = write(tmp_path / f"rows{suffix}", rows + b"\0\0\n")
    with pytest.raises(ValueError, match=rf"rows{suffix}:10 holds NUL bytes"):
        list(readers.iter_rows([str(path)]))


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_a_pointer_of_git_lfs(suffix, tmp_path):
    content = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
    path = write(tmp_path / f"rows{suffix}", content)
    with pytest.raises(ValueError, match=rf"rows{suffix} is a pointer .*git lfs pull"):
        load(path)


def test_streams_that_were_joined_or_cut_off(tmp_path):
    content = CONTENTS[".ipc"]
    path = write(tmp_path / "rows.ipc", content * 2)
    with pytest.raises(ValueError, match=r"rows.ipc goes on after the end of its"):
        load(path)
    for end in range(16, len(content), 8):  # also where its messages end
        write(path, content[:end])
        with pytest.raises(ValueError, match=r"rows.ipc.* cut off"):
            load(path)


def test_places_that_may_not_be_read(tmp_path, monkeypatch):
    write(tmp_path / "a" / "rows.jsonl", as_lines(ROWS))
    write(tmp_path / "b" / "rows.jsonl", as_lines(ROWS))
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for path in (tmp_path, tmp_path / "b"):
        with pytest.raises(
            ValueError, match=r"path='.*/b' cannot be read \(Permission"
        ):
            load(path)
    with pytest.raises(ValueError, match=r"cannot be read \(File name too long\)"):
        load(tmp_path / ("x" * 300))


def test_data_under_the_names_of_documents(tmp_path):
    data = ["sources.jsonl", "readme.jsonl.gz", "license.csv", "CITATION.parquet"]
    data += ["notice-1.tsv", "changelog.arrow", "sources.txt.jsonl"]
    documents = ["README.txt", "LICENSE.txt.gz", "LICENSE", "license.gz", "readme.md"]
    documents += ["dataset_info.json", "state.json", "sources.jsonl.bak", "NOTICE.text"]
    documents += [
        "README.json",
        "LICENSE.json",
        "dataset_dict.json",
        "features.json",
        "dataset_infos.json",
    ]
    for name in data + documents:
        write(tmp_path / name, b"")
    found = [pathlib.Path(path).name for path in files.find_files(str(tmp_path))]
    assert found == sorted(data)


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
