"""Mirrored folders over HTTP, against local servers of S3 and GCS."""

import os
import shutil

import pytest

from kdjax.config import StorageConfig
from kdjax.storage import index as index_lib
from kdjax.storage import lease, mirror, store, urls
from kdjax.storage.store import Store, StoreError
from tests.storage import servers, toy

URL = f"s3://{servers.BUCKET}/runs/x"
# Of the libraries, whose sockets and coroutines are collected late.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An S3 server, which this process takes for Amazon's."""
    for module in ("s3fs", "moto.server"):
        pytest.importorskip(module)
    with pytest.MonkeyPatch.context() as monkeypatch, servers.s3() as running:
        for name, value in servers.environment(
            running, tmp_path_factory.mktemp("none")
        ).items():
            monkeypatch.setenv(name, value)
        servers.make_bucket()
        yield running


@pytest.fixture
def run_url(server, monkeypatch, tmp_path, request):
    """An address of the test's own; requests are tried again at once."""
    server.faults, server.made, server.denied = [], [], False
    monkeypatch.setenv("KDJAX_LOCAL_DIR", str(tmp_path / "disk"))
    monkeypatch.setattr(store, "_FIRST_DELAY", 0.01)
    config = {"read_timeout": 0.5, "connect_timeout": 5, "retries": {"max_attempts": 0}}
    monkeypatch.setitem(store._OPTIONS, "s3", {"config_kwargs": config})
    return f"{URL}/{request.node.name}".translate(str.maketrans("[]", "--"))


def train(url: str, seconds: float = 60) -> dict[str, bytes]:
    """The toy run on an address, on this machine; returns its files."""
    config = StorageConfig(sync_seconds=1000, retry_seconds=seconds)
    with mirror.mirrored(url, config) as folder:
        copies = mirror.Mirror(Store(url, retry_seconds=seconds), folder)
        copies.fetch()
        toy.run(folder, copies.copy)
    return toy.content(folder)


def test_20_faults_none_lost(server, run_url, tmp_path, capfd):
    toy.run(tmp_path / "undisturbed")
    expected = toy.content(tmp_path / "undisturbed")
    server.faults = list(servers.FAULTS) * 4
    assert train(run_url) == expected
    written = len(server.made)
    shutil.rmtree(tmp_path / "disk")  # a new machine, which reads through the rest
    server.faults += list(servers.FAULTS)
    folder = mirror.fetch(run_url)
    assert toy.content(folder) == expected
    assert written == 20 and len(server.made) > 20
    assert set(server.made[:20]) == set(servers.FAULTS)
    assert servers.SECRET not in "".join(capfd.readouterr())


def test_a_lease_is_made_by_one_alone(run_url):
    one, other = lease.Lease(Store(run_url)), lease.Lease(Store(run_url))
    one.acquire()
    data = Store(run_url).read(lease.LEASE)
    assert not Store(run_url).write(lease.LEASE, b"{}", new=True)
    assert Store(run_url).read(lease.LEASE) == data
    one.release()
    other.acquire()
    other.release()
    assert Store(run_url).read(lease.LEASE) is None


def test_rights_that_are_missing_are_named(server, run_url):
    server.denied = True
    with (
        pytest.raises(StoreError, match=r"not permitted to .*give these credentials"),
        mirror.mirrored(run_url),
    ):
        pass


def test_a_bucket_that_is_missing_is_named(run_url):
    url = "s3://no-such-bucket/run"
    with (
        pytest.raises(StoreError, match=f"{url}: there is no bucket 'no-such-bucket'"),
        mirror.mirrored(url),
    ):
        pass
    with pytest.raises(ValueError, match=r"or there is no such bucket: give the"):
        mirror.fetch(url)


def test_credentials_that_are_missing_are_named(run_url, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with (
        pytest.raises(StoreError, match=r"no credentials were found.*docs/storage\.md"),
        mirror.mirrored(run_url),
    ):
        pass


def test_a_server_that_stays_away_is_named(run_url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with (
        pytest.raises(StoreError) as caught,
        mirror.mirrored(run_url, StorageConfig(retry_seconds=0.05)),
    ):
        pass
    text = str(caught.value)
    assert text.startswith(f"{run_url}: could not write .kdjax/lease.json (")
    assert "start the same command again" in text and "\n" not in text
    assert servers.SECRET not in text


def test_gcs(monkeypatch, tmp_path):
    for module in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(module)
    monkeypatch.setenv("KDJAX_LOCAL_DIR", str(tmp_path / "disk"))
    toy.run(tmp_path / "undisturbed")
    expected = toy.content(tmp_path / "undisturbed")
    with servers.gcs(monkeypatch):
        url = f"gs://{servers.BUCKET}/runs/x"
        assert train(url) == expected
        shutil.rmtree(tmp_path / "disk")
        assert toy.content(mirror.fetch(url)) == expected
        assert urls.local_folder(url).is_relative_to(tmp_path)
        assert {index_lib.FOLDER, "config.json"} < set(Store(url).names())
        with (
            pytest.raises(StoreError, match="there is no bucket 'none'"),
            mirror.mirrored("gs://none/x", StorageConfig(retry_seconds=0)),
        ):
            pass
    assert os.environ["STORAGE_EMULATOR_HOST"]
