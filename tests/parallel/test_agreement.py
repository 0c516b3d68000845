"""Ranks that differ are told in what; every field of a config is compared."""

import json
import os

import pytest

from kdjax import config as config_lib
from kdjax.config import Config
from kdjax.experiment import fingerprint
from kdjax.parallel import agreement
from tests.helpers import small_config

LEAVES = {leaf.path: leaf.value for leaf in config_lib.leaves(Config())}


def another(value):
    """A value of the same type that is not equal."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, value[0] if value else "another")
    return value + ("another" if isinstance(value, str) else 1)


@pytest.fixture(scope="module")
def versions():
    """The fields that are not of the config, computed once."""
    return fingerprint._versions()


def fields_of(config, monkeypatch, versions):
    monkeypatch.setattr(fingerprint, "_versions", lambda: versions)
    return fingerprint.of_command("train", {"until": "end"}, config)


@pytest.mark.parametrize("name", LEAVES)
def test_every_field_of_a_config_is_compared(name, monkeypatch, versions):
    config = Config()
    other = config_lib.replace(config, name, another(LEAVES[name]))
    fields = [fields_of(c, monkeypatch, versions) for c in (config, other, config)]
    assert agreement.differences(fields) == [name]
    text = agreement.describe(fields, ["a", "b", "c"])
    assert f" {name}: " in text
    assert "on ranks 0, 2 (host a, host c), " in text and "on rank 1 (host b)" in text


def test_equal_ranks_differ_in_nothing(monkeypatch, versions):
    fields = fields_of(small_config(), monkeypatch, versions)
    assert agreement.describe([fields] * 3, ["a", "b", "c"]) == ""
    for name in ("command", "--until", "version of jax", "version of kdjax"):
        assert name in fields


def test_flags_versions_and_variables_are_compared(monkeypatch):
    config = small_config()
    fields = [fingerprint.of_command("train", {"workdir": "/a"}, config)]
    monkeypatch.setattr("kdjax.__version__", "9.9")
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_dump_to=/x")
    monkeypatch.setenv("KDJAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    fields.append(fingerprint.of_command("label", {"workdir": "/b"}, config))
    assert agreement.differences(fields) == [
        "command",
        "--workdir",
        "version of kdjax",
        "variable JAX_DEFAULT_MATMUL_PRECISION",
    ]


def test_content_of_files_that_fields_name_is_compared(tmp_path, monkeypatch, versions):
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("1\n")
    config = small_config(
        data={"path": str(tmp_path / "*.jsonl")}, teacher={"path": str(folder)}
    )
    fields = [fields_of(config, monkeypatch, versions)]
    (tmp_path / "rows.jsonl").write_text("2\n")
    fields.append(fields_of(config, monkeypatch, versions))
    assert agreement.differences(fields) == [
        f"content of data.path={tmp_path / '*.jsonl'}"
    ]
    (folder / "config.json").write_text("[]")
    fields = [fields[1], fields_of(config, monkeypatch, versions)]
    assert agreement.differences(fields) == [f"content of teacher.path={folder}"]


def test_large_files_are_compared_by_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(fingerprint, "_BLOCK", 4)
    monkeypatch.setattr(fingerprint, "_NUM_BLOCKS", 3)
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(100))
    assert list(fingerprint._blocks(200)) == [(0, 4), (98, 4), (196, 4)]
    before = fingerprint.of_path(str(tmp_path))
    for offset, changes in ((99, True), (50, False), (0, True)):
        content = bytearray(100)
        content[offset] = 1
        (tmp_path / "a").write_bytes(content)
        assert (fingerprint.of_path(str(tmp_path)) != before) == changes
    assert fingerprint.of_path(str(tmp_path / "none")) == ""


def test_long_values_and_many_fields_are_cut():
    fields = [{f"f{i}": "x" * 500 for i in range(20)}, {}]
    text = agreement.describe(fields, ["a", "a"])
    assert "and 12 more fields" in text and "absent on rank 1" in text
    assert len(text) < 3000


def test_segments_are_compared_by_content():
    from kdjax.data.segments import as_segments
    from kdjax.experiment.data import load_data

    config = small_config()
    data = load_data(config)
    digest = fingerprint.of_segments(data.train)
    assert digest == fingerprint.of_segments(load_data(config).train)
    assert digest != fingerprint.of_segments(data.train[1:])
    assert digest != fingerprint.of_segments([*data.train[1:], data.train[0]])
    columns = as_segments(data.train)
    assert fingerprint.of_segments(columns) != fingerprint.of_segments(columns[1:])
    assert json.dumps(digest)
