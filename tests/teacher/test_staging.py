"""New files and folders appear whole, and leftovers of killed processes are no bar."""

import fcntl
import os

import pytest

from kdjax.teacher import cache as cache_lib
from kdjax.teacher import merge_export, staging
from tests.teacher.test_cache import MANIFEST, _pairs, _write_cache


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out, partial = tmp_path / "a" / "out", tmp_path / "a" / ".out.partial"
    partial.mkdir(parents=True)
    (partial / "old").write_text("of a killed process")
    (partial / "old_folder").mkdir()
    with staging.new_folder(out) as scratch:
        assert scratch == partial and not list(scratch.iterdir())
        (scratch / "new").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["new"] and not partial.exists()
    with (
        pytest.raises(ValueError, match=r"out=.*is not empty: name a new folder"),
        staging.new_folder(out),
    ):
        pass
    (out / "new").unlink()
    with pytest.raises(KeyError), staging.new_folder(out) as scratch:
        (scratch / "half").write_text("x")
        raise KeyError
    assert not list(out.iterdir()) and not partial.exists()
    with staging.new_folder(out) as scratch:  # an empty one may be there
        (scratch / "new").write_text("y")
    assert (out / "new").read_text() == "y"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    partial.write_text("of a killed process")
    with staging.new_file(out) as scratch:
        scratch.write_text("x")
        assert not out.exists()
    assert out.read_text() == "x" and not partial.exists()
    for other in (out, tmp_path / "none" / "out"):
        with (
            pytest.raises(ValueError, match="exists, or its folder does not"),
            staging.new_file(other),
        ):
            pass
    with pytest.raises(KeyError), staging.new_file(tmp_path / "b") as scratch:
        scratch.write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_process_that_writes_it_is_named(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "shard").write_text("of a living process")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with (
        pytest.raises(ValueError, match="is being written by another process"),
        staging.new_folder(tmp_path / "out"),
    ):
        pass
    os.close(descriptor)
    assert (partial / "shard").exists()


def test_merge_goes_on_after_a_kill(tmp_path):
    _write_cache(tmp_path / "a")
    cache_lib.write_shard(tmp_path / "b", 0, 1, iter(_pairs(50)), MANIFEST)
    cache_lib.finish(tmp_path / "b", MANIFEST, num_shards=1)
    cache_lib.write_shard(tmp_path / ".out.partial", 3, 9, iter(_pairs(1)), MANIFEST)
    caches = [cache_lib.load_cache(tmp_path / name) for name in "ab"]
    merge_export.merge(caches, tmp_path / "out")
    merged = cache_lib.load_cache(tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 6  # 4 shards, index, manifest
    assert cache_lib.verify(merged)["records"] == 20
    with pytest.raises(ValueError, match=r"key=[0-9a-f]{32} is in .*a and in .*out"):
        merge_export.merge([caches[0], merged], tmp_path / "no")
