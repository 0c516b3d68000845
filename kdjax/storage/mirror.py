"""Folders of a store, mirrored from a local disk.

All work is done in a local folder. Beside it a thread copies what has changed to the
store, as the state of the folder at one moment (`snapshot`):

1. the index gets a list of the objects that are about to be written;
2. new files become objects of their own names; new content of files that the index has
   lies beside them, under `.kdjax/next/`;
3. the index is replaced: from now on the new moment counts;
4. changed files are written under their own names too, the index says so, and what no
   file needs any more is removed.

Killed after any request, the index names one moment, and every object of it is there.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

from kdjax.config import StorageConfig
from kdjax.runtime import files, interrupts, locks
from kdjax.storage import index as index_lib
from kdjax.storage import snapshot, urls
from kdjax.storage.index import Entry, Index
from kdjax.storage.lease import Lease
from kdjax.storage.store import Store, StoreError

_NUM_THREADS = 8  # that copy files
_NUM_READS = 3  # of an object that is not as it was written


class Mirror:
    """Copies of a local folder in a store, by the one process that writes there.

    Args:
      store: of the folder.
      folder: on a local disk.
      guard: called before each write of the index; it raises where that may not be.
    """

    def __init__(
        self,
        store: Store,
        folder: pathlib.Path,
        *,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._folder, self._guard = store, folder, guard
        self._index: Index | None = None  # of the store; None = not known
        self._copied: dict[str, snapshot.File] = {}  # the listing that was copied last
        self._checksums: dict[tuple[str, snapshot.File], str] = {}
        self._lock = threading.Lock()

    def fetch(self) -> None:
        """Make the local folder what the store has, unless it is that, or ahead of it.

        Raises:
          ValueError: the store has lost what this folder was a copy of.
        """
        index = index_lib.read(self._store)
        known = _known_generations(self._folder)
        if index.generation and index.generation not in known:
            index = download(self._store, index, self._folder)
        elif known and index.generation not in known:
            raise ValueError(
                f"{self._store.url} has nothing any more, and {self._folder} is a copy "
                "of what was there: remove that folder to start afresh"
            )
        self._index = index

    def copy(self) -> None:
        """Copy a moment of the folder to the store; nothing where none has changed.

        Raises:
          ValueError: somebody else writes there.
          StoreError: the store does not do what is needed.
          OSError: of the local disk.
        """
        with self._lock:
            index = self._settle(self._current())  # what a kill has left
            if snapshot.listing(self._folder) == self._copied:
                return
            with snapshot.take(self._folder) as (scratch, listing):
                index = self._copy(index, scratch, listing)
            self._settle(index)
            self._copied = listing

    def _current(self) -> Index:
        """Return the index in the store, which is read again after an error.

        A write that failed may have been done all the same.
        """
        if self._index is None:
            self._index = index_lib.read(self._store)
            if self._index.generation not in ("", *_known_generations(self._folder)):
                raise ValueError(f"{self._store.url} was written by another process")
        return self._index

    def _copy(
        self, old: Index, scratch: pathlib.Path, listing: dict[str, snapshot.File]
    ) -> Index:
        new = self._entries(scratch, listing)
        added = [path for path in new if path not in old.files]
        changed = [p for p in new if p in old.files and new[p] != old.files[p]]
        if not (added or changed or old.files.keys() - new.keys()):
            return old
        next_names = {path: index_lib.next_name(path) for path in changed}
        coming = {*added, *next_names.values()}
        self._write(dataclasses.replace(old, garbage=old.garbage | coming))
        self._upload(scratch, {path: path for path in added})
        self._upload(scratch, next_names)
        generation = uuid.uuid4().hex
        # Either of them may be in the store when this process is killed.
        _remember(self._folder, self._store, [old.generation, generation])
        entries = {
            path: dataclasses.replace(entry, is_next=path in next_names)
            for path, entry in new.items()
        }
        gone = frozenset(old.files.keys() - new.keys())
        index = Index(generation=generation, files=entries, garbage=gone)
        self._write(index)
        _remember(self._folder, self._store, [generation])
        return index

    def _settle(self, index: Index) -> Index:
        """Give changed files their own names, and remove what is nobody's."""
        pending = [path for path, entry in index.files.items() if entry.is_next]
        garbage = index.garbage | {index_lib.next_name(path) for path in pending}
        if not garbage:
            return index
        self._guard()
        if pending:
            _in_threads(
                lambda path: self._store.copy(index_lib.next_name(path), path), pending
            )
            entries = {
                path: dataclasses.replace(entry, is_next=False)
                for path, entry in index.files.items()
            }
            index = dataclasses.replace(index, files=entries, garbage=garbage)
            self._write(index)
        _in_threads(self._store.remove, sorted(garbage))
        # The next index that is written says so.
        self._index = dataclasses.replace(index, garbage=frozenset())
        return self._index

    def _write(self, index: Index) -> None:
        self._guard()
        self._index = None
        index_lib.write(self._store, index)
        self._index = index

    def _upload(self, scratch: pathlib.Path, names: dict[str, str]) -> None:
        """Copy files into objects: those last that may name others."""
        for is_json in (False, True):
            paths = [p for p in names if p.endswith(".json") == is_json]
            _in_threads(lambda p: self._store.upload(scratch / p, names[p]), paths)

    def _entries(
        self, scratch: pathlib.Path, listing: dict[str, snapshot.File]
    ) -> dict[str, Entry]:
        """Return the entries of files; those that are as they were are not read."""
        self._checksums = {
            (path, file): self._checksums.get((path, file))
            or snapshot.checksum(scratch / path)
            for path, file in listing.items()
        }
        return {
            path: Entry(num_bytes=file.num_bytes, checksum=checksum)
            for (path, file), checksum in self._checksums.items()
        }


def download(store: Store, index: Index, folder: pathlib.Path) -> Index:
    """Make a local folder what an index names; files that are right stay.

    What is damaged in the store is left out and named: training goes on from an older
    checkpoint, other readers say what they miss.

    Args:
      store: of the folder.
      index: of it.
      folder: local; files that the index does not have are removed.

    Returns:
      The index; another one, if the store has gone on meanwhile.
    """
    _remember(folder, store, [])
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        _remove_others(folder, index)
        damaged = _in_threads(
            lambda item: _download(store, item[0], item[1], folder),
            [*index.files.items()],
        )
        damaged = [path for path in damaged if path]
        latest = index_lib.read(store) if damaged else index
        if latest.files == index.files:
            break
        index = latest
    for path in damaged:
        print(
            f"{store.url}/{path} is missing or damaged: it is left out",
            file=sys.stderr,
            flush=True,
        )
    _remember(folder, store, [index.generation])
    return index


def _remove_others(folder: pathlib.Path, index: Index) -> None:
    """Remove files that an index does not have, and folders that are empty then."""
    for path in snapshot.listing(folder):
        if path not in index.files:
            (folder / path).unlink()
            for parent in (folder / path).relative_to(folder).parents:
                if parent.name and not any((folder / parent).iterdir()):
                    (folder / parent).rmdir()


def _download(store: Store, path: str, entry: Entry, folder: pathlib.Path) -> str:
    """Download a file unless it is there; return its path if that cannot be."""
    file = folder / path
    if _is_right(file, entry):
        return ""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = files.temporary(file)
    try:
        for _ in range(_NUM_READS):
            is_there = store.download(index_lib.object_name(path, entry), scratch)
            if is_there and _is_right(scratch, entry):
                files.sync(scratch)
                scratch.replace(file)
                return ""
    finally:
        scratch.unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    return path


def _is_right(file: pathlib.Path, entry: Entry) -> bool:
    return (
        file.is_file()
        and file.stat().st_size == entry.num_bytes
        and snapshot.checksum(file) == entry.checksum
    )


def _in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Call a function on items in threads; the first error ends it."""
    with futures.ThreadPoolExecutor(_NUM_THREADS, "store") as pool:
        pending = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in pending]
        finally:
            for future in pending:
                future.cancel()


def _lock_name(folder: pathlib.Path) -> str:
    """Return the lock beside a folder; an export locks the folder itself, too."""
    return f".{folder.name}.mirror.lock"


def _record(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f".{folder.name}.json")


def _known_generations(folder: pathlib.Path) -> list[str]:
    """Return which moments of the store a local folder is, or is ahead of."""
    file = _record(folder)
    if not (file.is_file() and folder.is_dir()):
        return []
    return list(files.read_json(file)["generations"])


def _remember(folder: pathlib.Path, store: Store, generations: list[str]) -> None:
    value = {"url": store.url, "generations": generations}
    files.write_json(_record(folder), value)


@contextlib.contextmanager
def mirrored(
    url: str, config: StorageConfig | None = None, *, name: str = "workdir"
) -> Iterator[pathlib.Path]:
    """Yield the local folder of an address, which is copied there while the block runs.

    It has what the store has. What changes is copied every `sync_seconds`, and at the
    end, also after an error or a signal. A store that fails in between is named on
    stderr; only at the end that is an error.

    Args:
      url: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.
      config: how often is copied, and how long is tried.
      name: of its flag or field, for errors.

    Raises:
      ValueError: no such address, bucket, right or package; or another process writes
        there.
      StoreError: the store failed at the end; local files are kept.
    """
    url, config = _check_alone(url, name), config or StorageConfig()
    folder = urls.local_folder(url)
    store = Store(url, retry_seconds=config.retry_seconds)
    lease = Lease(store)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_hold(folder, url, name))
        lease.acquire()
        stack.callback(_release, lease)
        stack.enter_context(locks.checked(lease))
        mirror = Mirror(store, folder, guard=lease.renew)
        mirror.fetch()
        stack.enter_context(_copying(mirror, store, folder, config.sync_seconds))
        yield folder


def _check_alone(url: str, name: str) -> str:
    """Check an address, and that this process is a run of one."""
    url = urls.check(url, name)
    from kdjax.parallel import distributed  # it imports JAX

    if distributed.is_several():
        raise ValueError(
            f"{name}={url!r} in a run of several processes: stores are for runs of one "
            "process; use a folder that all of them share, and copy it off"
        )
    return url


@contextlib.contextmanager
def _hold(folder: pathlib.Path, url: str, name: str) -> Iterator[None]:
    """Hold the lock of a local folder, beside it."""
    with locks.hold(
        folder.parent,
        shown=f"{name}={url!r}",
        remedy="another address",
        file=_lock_name(folder),
    ):
        files.clear_leftovers(folder.parent, folder.name)
        yield


def _release(lease: Lease) -> None:
    try:
        lease.release()
    except StoreError as error:  # it is dead in two minutes anyway
        print(error, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _copying(
    mirror: Mirror, store: Store, folder: pathlib.Path, seconds: float
) -> Iterator[None]:
    """Copy a folder from time to time while the block runs, and at its end."""
    stopped = threading.Event()

    def copy_often() -> None:
        while not stopped.wait(seconds):
            try:
                mirror.copy()
            except (ValueError, OSError) as error:  # tried again later
                print(f"not copied yet: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=copy_often, daemon=True, name="mirror")
    thread.start()
    try:
        yield
    except BaseException:
        _finish(thread, stopped, store)
        try:
            mirror.copy()
        except (ValueError, OSError) as error:  # not in place of what went wrong before
            print(_not_copied(store, folder, error), file=sys.stderr, flush=True)
        raise
    _finish(thread, stopped, store)
    try:
        mirror.copy()
    except (ValueError, OSError) as error:
        raise StoreError(_not_copied(store, folder, error)) from error


def _finish(thread: threading.Thread, stopped: threading.Event, store: Store) -> None:
    stopped.set()
    with interrupts.notice(f"what is complete is copied to {store.url} first"):
        thread.join()


def _not_copied(store: Store, folder: pathlib.Path, error: BaseException) -> str:
    return f"not all is in {store.url}, all is kept in {folder}: {error}"


def fetch(url: str, *, name: str = "workdir") -> pathlib.Path:
    """Return the local folder of an address, for reading: nothing is written there.

    It has what the store has; where a process of this machine is writing it, it is as
    that has left it.

    Args:
      url: of a mirrored folder, or of a folder in one.
      name: of its flag or field, for errors.

    Raises:
      ValueError: no such address, bucket, right or package, or nothing is there.
    """
    url = _check_alone(url, name)
    store, index, inner = _find(url, name)
    folder = urls.local_folder(store.url)
    try:
        with _hold(folder, url, name):
            if index.generation not in _known_generations(folder):
                download(store, index, folder)
    except ValueError:
        is_held = locks.holder(folder.parent, _lock_name(folder)) is not None
        if not (is_held and _known_generations(folder)):
            raise
    return folder / inner


def read_file(url: str, path: str, *, name: str = "workdir") -> bytes | None:
    """Read one file of a mirrored folder; None if it is not there.

    Args:
      url: of the folder.
      path: of the file in it.
      name: of its flag or field, for errors.
    """
    store = Store(urls.check(url, name))
    entry = index_lib.read(store).files.get(path)
    return None if entry is None else store.read(index_lib.object_name(path, entry))


def _find(url: str, name: str) -> tuple[Store, Index, str]:
    """Find the mirrored folder that an address is in: its store, index, path in it."""
    scheme, _, path = url.partition("://")
    parts = path.split("/")
    for end in range(len(parts), 1, -1):
        store = Store(f"{scheme}://{'/'.join(parts[:end])}")
        index = index_lib.read(store)
        inner = "/".join(parts[end:])
        if index.generation and (
            not inner or any(file.startswith(f"{inner}/") for file in index.files)
        ):
            return store, index, inner
    raise ValueError(
        f"{name}={url!r} has nothing that kdjax has written, or there is no such "
        "bucket: give the address of a run, a cache or an exported model"
    )


@contextlib.contextmanager
def new_output(url: str, *, name: str = "out") -> Iterator[pathlib.Path]:
    """Yield a path to write a new folder at, which is uploaded when the block ends.

    Args:
      url: where nothing is yet.
      name: of its flag or field, for errors.

    Raises:
      ValueError: something is there, or as `mirrored`.
    """
    url = _check_alone(url, name)
    folder = urls.local_folder(url)
    store = Store(url)
    lease = Lease(store)
    index = index_lib.read(store)
    # What a killed export has left is in the garbage of an index without generation.
    others = set(store.names()) - {index_lib.FOLDER}
    if index.generation or (others and not index.garbage):
        raise ValueError(f"{name}={url!r} is not empty: name a new folder")
    with _hold(folder, url, name):
        shutil.rmtree(folder, ignore_errors=True)
        _record(folder).unlink(missing_ok=True)
        lease.acquire()
        try:
            mirror = Mirror(store, folder, guard=lease.renew)
            mirror.fetch()
            yield folder
            mirror.copy()
        finally:
            _release(lease)
            shutil.rmtree(folder, ignore_errors=True)
            _record(folder).unlink(missing_ok=True)
