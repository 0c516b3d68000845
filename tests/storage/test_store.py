"""Addresses, errors and retries of stores; leases."""

import dataclasses
import json
import socket

import pytest

from kdjax import cache as cache_command
from kdjax import cli
from kdjax import config as config_lib
from kdjax.config import StorageConfig
from kdjax.experiment import validate
from kdjax.parallel import distributed
from kdjax.storage import lease, mirror, store, urls
from kdjax.storage.store import Store, StoreError
from kdjax.teacher import build
from kdjax.teacher import cache as cache_lib
from tests import helpers
from tests.storage.memory import Files, Machine, Memory

URL = "s3://bucket/runs/x"


@pytest.fixture
def memory(monkeypatch, tmp_path):
    memory = Memory()
    Machine(monkeypatch, tmp_path / "disk").use(Files(memory))
    return memory


@pytest.mark.parametrize(
    "url", ["gs://b-1/x", "s3://b.c/x/y=1,2/z_0", "s3://bucket/a b"]
)
def test_addresses(url):
    assert urls.check(f"{url}/") == url


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket", "s3://bucket/", "s3://bucket/a//b", "s3://bucket/../a"),
        *("s3://bucket/x/.kdjax", "file:///x", "http://host/x", "s3:///x", "s3://B/x"),
        *("s3a://bucket/x", "gcs://bucket/x", "memory://x/y", "s3://bucket/x\n"),
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(
        ValueError, match=r"workdir=.* is no folder in a store: give gs:"
    ):
        urls.check(url)


@pytest.mark.parametrize(
    "url",
    [
        *("s3://user:hunter2@bucket/x", "s3://bucket/x?signature=hunter2"),
        *("s3://hunter2%40bucket/x", "gs://bucket/x#hunter2"),
    ],
)
def test_secrets_in_addresses_are_not_repeated(url):
    config = helpers.small_config(cache={"path": url})
    for check in (lambda: urls.check(url), lambda: validate.validate(config)):
        with pytest.raises(ValueError, match="not repeated here") as caught:
            check()
        assert "hunter2" not in str(caught.value)


def test_local_folders_are_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("KDJAX_LOCAL_DIR", str(tmp_path))
    one, other = map(urls.local_folder, ("gs://bucket/x", "s3://bucket/x"))
    assert one != other and one.parent == other.parent == tmp_path
    monkeypatch.delenv("KDJAX_LOCAL_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = urls.local_folder("gs://bucket/x")
    assert folder == tmp_path / "cache" / "kdjax" / "stores" / one.name


@pytest.mark.parametrize("scheme, extra", [("gs", "gcs"), ("s3", "s3")])
def test_an_extra_that_is_missing_is_named(monkeypatch, scheme, extra):
    monkeypatch.setitem(store._PACKAGES, scheme, ("no_such_package", extra))
    with pytest.raises(ValueError, match=rf"pip install 'kdjax\[{extra}\]'"):
        mirror.mirrored(f"{scheme}://bucket/x").__enter__()


class HttpError(Exception):
    """As gcsfs has it."""

    __module__ = "gcsfs.retry"

    def __init__(self, code):
        super().__init__(f"code {code}")
        self.code = code


@pytest.mark.parametrize(
    "error, num_attempts",
    [
        (OSError(121, "InternalError"), 3),
        (ConnectionResetError("reset"), 3),
        (TimeoutError(), 3),
        (HttpError(503), 3),
        (HttpError(429), 3),
        (HttpError(403), 1),
        (HttpError(400), 1),
        (PermissionError("AccessDenied"), 1),
        (OSError("Forbidden: bucket/x"), 1),
    ],
    ids=repr,
)
def test_what_fails_in_passing_is_tried_again(monkeypatch, memory, error, num_attempts):
    calls = []

    def fault(number, name):
        calls.append(name)
        if len(calls) < 3:
            raise error

    monkeypatch.setattr(store, "open_file_system", lambda s: Files(memory, fault=fault))
    opened = Store(URL, retry_seconds=10)
    if num_attempts == 1:
        with pytest.raises(StoreError):
            opened.read("name")
    else:
        assert opened.read("name") is None
    assert len(calls) == num_attempts


def test_bugs_and_full_disks_are_not_tried_again(monkeypatch, memory):
    for error in (TypeError("a bug"), OSError(28, "No space left on device")):
        calls = []

        def fault(number, name, error=error, calls=calls):
            calls.append(name)
            raise error

        files = Files(memory, fault=fault)
        monkeypatch.setattr(store, "open_file_system", lambda s, files=files: files)
        with pytest.raises(type(error)):
            Store(URL).read("name")
        assert len(calls) == 1


def test_secrets_are_not_in_errors(monkeypatch, memory):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hunter2")

    def fault(number, name):
        raise OSError("request with hunter2 failed")

    monkeypatch.setattr(store, "open_file_system", lambda s: Files(memory, fault=fault))
    with pytest.raises(StoreError, match=r"request with \[AWS_SESSION_TOKEN\] failed"):
        Store(URL, retry_seconds=0).read("name")


def test_an_object_that_is_cut_is_written_again(monkeypatch, memory):
    cut = []

    class Cutting(Files):
        def __getattr__(self, name):
            function = super().__getattr__(name)
            if name != "pipe_file" or cut:
                return function
            cut.append(name)
            return lambda path, data, **kw: function(path, data[:3], **kw)

    monkeypatch.setattr(store, "open_file_system", lambda s: Cutting(memory))
    Store(URL, retry_seconds=10).write("name", b"content")
    assert cut and memory.cat_file("/bucket/runs/x/name") == b"content"


def put_lease(memory, age: float, **changes) -> lease.Owner:
    """Leaves a lease of another process, which is so many seconds old."""
    other = lease.Lease(Store(URL))
    owner = dataclasses.replace(other._owner, **({"machine": "other"} | changes))
    memory.pipe_file(f"/bucket/runs/x/{lease.LEASE}", lease._pack(owner))
    stored = memory.store[f"/bucket/runs/x/{lease.LEASE}"]
    stored.modified = stored.modified.replace(year=stored.modified.year - (age > 1000))
    return owner


def test_a_dead_lease_is_taken_over(memory):
    put_lease(memory, age=1e6)
    taken = lease.Lease(Store(URL))
    taken.acquire()
    taken.renew()
    taken.release()
    assert not memory.store


def test_the_lease_of_a_process_of_this_machine_that_has_ended(memory):
    put_lease(memory, age=0, machine=lease.files.machine(), pid=2**22 - 1)
    taken = lease.Lease(Store(URL))
    taken.acquire()
    taken.release()


def test_a_living_lease_is_respected(monkeypatch, memory):
    owner = put_lease(memory, age=0)

    def sleep(seconds):  # the owner renews its lease meanwhile
        beating = dataclasses.replace(owner, beat=owner.beat + 1)
        memory.pipe_file(f"/bucket/runs/x/{lease.LEASE}", lease._pack(beating))

    monkeypatch.setattr(lease.time, "sleep", sleep)
    host = socket.gethostname()
    with pytest.raises(ValueError, match=rf"{URL} is being written by .*host {host}"):
        lease.Lease(Store(URL)).acquire()


def test_who_has_lost_the_lease_writes_nothing_more(memory):
    with (
        pytest.raises(StoreError, match=r"was taken over by .*it writes nothing more"),
        mirror.mirrored(URL, StorageConfig(sync_seconds=1000)) as folder,
    ):
        put_lease(memory, age=0)
        folder.mkdir()
        (folder / "late").write_text("1")
        num = len(memory.store)
    assert len(memory.store) == num
    owner = json.loads(memory.cat_file(f"/bucket/runs/x/{lease.LEASE}"))
    assert owner["machine"] == "other"  # and it is left to its new owner


def test_the_loop_hears_of_a_lost_lease(memory):
    from kdjax.runtime import locks

    with (
        pytest.raises(ValueError, match="was taken over"),
        mirror.mirrored(URL, StorageConfig(sync_seconds=0.01)) as folder,
    ):
        locks.check()
        put_lease(memory, age=0)
        folder.mkdir()
        (folder / "late").write_text("1")
        for _ in range(1000):
            lease.threading.Event().wait(0.01)
            locks.check()  # before each save


def test_several_processes_are_refused(monkeypatch, memory):
    monkeypatch.setattr(distributed, "is_several", lambda: True)
    for opened in (mirror.mirrored, mirror.new_output):
        with pytest.raises(ValueError, match="for runs of one process"):
            opened(URL).__enter__()
    with pytest.raises(ValueError, match="for runs of one process"):
        mirror.fetch(URL)


def test_finished_runs_are_read_from_a_store(decoder_run, memory):
    from kdjax.pipeline import student

    workdir = decoder_run[1]
    with mirror.mirrored(URL) as folder:
        helpers.shutil.copytree(workdir, folder)
    local = cache_lib.load_cache(workdir / "cache" / "train")
    stored = cache_lib.load_cache(f"{URL}/cache/train")
    assert cache_lib.verify(stored) == cache_lib.verify(local)
    params = student.load_student(URL).params
    expected = student.load_student(workdir).params
    helpers.jax.tree.map(helpers.np.testing.assert_array_equal, params, expected)
    # The cache of one run is that of others, which do not write there.
    other = helpers.taught(workdir.parent, name="other")
    other.cache.path = f"{URL}/cache"
    run = helpers.open_run(other, workdir.parent / "other")
    build.check(run)
    assert set(build.ensure(run)) == {"train", "eval"}
    longer = helpers.changed(other, data={"num_train": 25})
    helpers.shutil.rmtree(build.folder(longer, workdir, "train"))
    longer_run = helpers.open_run(longer, workdir.parent / "other")
    for refuse in (build.check, build.ensure):
        with pytest.raises(ValueError, match=r"caches in a store are read alone there"):
            refuse(longer_run)


def test_outputs_of_the_cache_command_are_local(monkeypatch):
    monkeypatch.setattr(type(cache_command._OUT), "value", "s3://bucket/x")
    with pytest.raises(ValueError, match="--out is an address in a store"):
        cache_command._out()


def test_config_limits():
    config = config_lib.replace(config_lib.Config(), "storage.sync_seconds", 0.0)
    with pytest.raises(ValueError, match=r"storage.sync_seconds=0\.0"):
        config_lib.check(config)


def test_commands_and_addresses(monkeypatch, memory):
    monkeypatch.setattr(type(cli._WORKDIR), "value", URL)
    config = helpers.small_config()
    with pytest.raises(ValueError, match=r"takes a folder; train, label, evaluate and"):
        cli.workdir(config)
    with pytest.raises(ValueError, match=r"has no config\.json, so it is no run"):
        cli._config_of_run(URL)
    with cli._open_workdir(config, "write") as folder:
        folder.mkdir()
        (folder / "config.json").write_text(config_lib.to_json(config))
    assert cli._config_of_run(URL) == config
    with cli._open_workdir(config, "read") as again:
        assert again == folder
    with pytest.raises(ValueError, match="takes a folder"):
        cli._open_workdir(config, "").__enter__()
