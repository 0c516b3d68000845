"""Our reader of ArrayRecord files gives what theirs gives, and believes no size."""

import os
import struct

import numpy as np
import pytest
from array_record.python import array_record_module

from kdjax.teacher.array_record import ArrayRecordReader

BLOCK = 1 << 16


def write(path, records, options="group_size:1,uncompressed"):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


@pytest.mark.parametrize("options", ["group_size:1,uncompressed", "group_size:7"])
def test_records_of_all_sizes_and_places(tmp_path, options):
    rng = np.random.default_rng(0)
    # Chunks that end within, at and behind the headers of blocks.
    sizes = [1, 100, 65_300, 40, 20, 10, 65_512, 65_513, 3, 200_000, 1]
    sizes += [*rng.integers(1, 3000, 300).tolist(), 127, 128, 16_383, 16_384]
    records = [rng.bytes(size) for size in sizes]
    path = write(tmp_path / "a", records, options)
    reader = ArrayRecordReader(path)
    assert list(reader.iter_records()) == records
    theirs = array_record_module.ArrayRecordReader(str(path))
    assert theirs.read(range(len(records))) == records
    if "uncompressed" in options:
        assert reader.num_records() == len(records)
        assert reader.read(range(len(records))) == records


def test_every_end_of_a_record_against_the_border_of_a_block(tmp_path):
    for size in range(BLOCK - 250, BLOCK - 20, 3):
        records = [os.urandom(size), b"x" * 50, b"y"]
        reader = ArrayRecordReader(write(tmp_path / f"{size}", records))
        assert reader.read([2, 1, 0]) == records[::-1]


def test_what_is_no_such_file_is_refused_and_nothing_grows(tmp_path):
    path = write(tmp_path / "a", [b"a" * 300, b"b" * 70_000])
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    for number in range(400):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(data))] = rng.integers(256)
        if number % 4 == 0:
            damaged = damaged[: rng.integers(len(data))]
        (tmp_path / "b").write_bytes(damaged)
        try:
            reader = ArrayRecordReader(tmp_path / "b")
            list(reader.iter_records())
            reader.read(range(reader.num_records()))
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_declared_size_takes_no_memory(tmp_path):
    path = write(tmp_path / "a", [b"a" * 300])
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 64 + 8, 2**40)  # of the data of the first chunk
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not as the footer says"):
        ArrayRecordReader(path).read([0])


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path):
    path = write(tmp_path / "a", [bytes(300 * 2**20)], "group_size:1,zstd:1")
    with pytest.raises(ValueError, match="a chunk of 1 records with 314572800 bytes"):
        list(ArrayRecordReader(path).iter_records())


def test_another_compression_is_named(tmp_path):
    path = write(tmp_path / "a", [b"a" * 300], "group_size:1,brotli:3")
    with pytest.raises(ValueError, match="compressed with brotli: write it again"):
        list(ArrayRecordReader(path).iter_records())
