"""Objects below one address of a store, with retries and errors in one line."""

import contextlib
import errno
import os
import pathlib
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from kdjax.analysis import extras

T = TypeVar("T")

_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: module, extra
_OPTIONS: dict[str, dict[str, Any]] = {
    "gs": {},
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60}},
}
_FIRST_DELAY, _MAX_DELAY = 0.5, 30.0  # seconds between attempts
# Packages whose errors are of a store or of the way to it.
_STORE_PACKAGES = {
    "aiobotocore",
    "aiohttp",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "requests",
    "urllib3",
}
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "ProfileNotFound",
)
# Of the local disk: no store mends them.
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_MAX_REASON = 200  # characters


class StoreError(ValueError):
    """A store that does not do what is needed, with what to do about it."""


class _IncompleteError(OSError):
    """An object has another size than what was sent."""


class Store:
    """The objects below an address.

    Every call is tried again while the store fails in passing, with random delays that
    grow exponentially, and may be made from any thread.

    Args:
      url: as `urls.check` returns it.
      retry_seconds: after which a call that still fails raises.

    Raises:
      ValueError: the package of the store is not installed.
    """

    def __init__(self, url: str, *, retry_seconds: float = 300.0) -> None:
        self.url, self._root = url, url.partition("://")[2]
        self._retry_seconds = retry_seconds
        scheme = url.partition("://")[0]
        module, extra = _PACKAGES[scheme]
        extras.load(module, extra=extra)
        self._tenacity = extras.load("tenacity", extra=extra)
        self._files = open_file_system(scheme)

    def read(self, name: str) -> bytes | None:
        """Return the content of an object; None if there is none."""
        try:
            return self._call(f"read {name}", self._files.cat_file, self._path(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """Write an object, in one step for all who read it.

        Args:
          name: below the address.
          data: its content.
          new: leave an object of this name as it is, by a conditional request.

        Returns:
          False if `new`, and there is one.
        """
        path, mode = self._path(name), {"mode": "create"} if new else {}

        def attempt() -> None:
            self._files.pipe_file(path, data, **mode)
            self._check_size(path, len(data))

        try:
            self._call(f"write {name}", attempt)
        except FileExistsError:
            # The answer to an attempt that wrote it may have been lost.
            return self.read(name) == data
        except FileNotFoundError as error:
            raise StoreError(self._no_bucket()) from error
        return True

    def upload(self, file: pathlib.Path, name: str) -> None:
        """Copy a local file into an object, which appears in one step."""
        path, size = self._path(name), file.stat().st_size

        def attempt() -> None:
            self._files.put_file(str(file), path)
            self._check_size(path, size)

        self._call(f"write {name}", attempt)

    def download(self, name: str, file: pathlib.Path) -> bool:
        """Copy an object into a local file; False if there is none."""
        try:
            path = self._path(name)
            self._call(f"read {name}", self._files.get_file, path, str(file))
        except FileNotFoundError:
            return False
        return True

    def copy(self, source: str, target: str) -> None:
        """Copy an object to another name, within the store."""
        paths = self._path(source), self._path(target)
        self._call(f"write {target}", self._files.cp_file, *paths)

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._call(f"remove {name}", self._files.rm_file, self._path(name))

    def modified(self, name: str) -> datetime | None:
        """Return when an object was written, by the clock of the store, or None."""
        try:
            path = self._path(name)
            return self._call(f"look at {name}", self._files.modified, path)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """List the names of objects and folders right below the address."""
        try:
            paths = self._call("list it", self._files.ls, self._root, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _check_size(self, path: str, size: int) -> None:
        stored = self._files.info(path)["size"]
        if stored != size:
            raise _IncompleteError(f"{stored} of {size} bytes were stored")

    def _call(self, task: str, function: Callable[..., T], *args: Any, **kw: Any) -> T:
        """Call the file system, again while it fails in passing.

        Raises:
          FileNotFoundError, FileExistsError: what they say.
          StoreError: anything else that the store refuses or fails in.
          OSError: of the local disk.
        """
        retrying = self._tenacity.Retrying(
            retry=self._tenacity.retry_if_exception(_is_transient),
            wait=self._tenacity.wait_random_exponential(_FIRST_DELAY, _MAX_DELAY),
            stop=self._tenacity.stop_after_delay(self._retry_seconds),
            before_sleep=self._say,
            reraise=True,
        )
        try:
            return retrying(function, *args, **kw)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            if not _is_of_store(error):
                raise
            raise StoreError(self._explain(task, error)) from error

    def _say(self, state: Any) -> None:
        """Say that a call is tried again, from the second time on."""
        if state.attempt_number > 1:
            reason = _reason(state.outcome.exception())
            print(f"{self.url}: {reason}: trying again", file=sys.stderr, flush=True)

    def _explain(self, task: str, error: BaseException) -> str:
        if type(error).__name__ in _NO_CREDENTIALS:
            return (
                f"{self.url}: no credentials were found: set them up as docs/storage.md"
                " says"
            )
        if "NoSuchBucket" in str(error):
            return self._no_bucket()
        if _is_denied(error):
            return (
                f"{self.url}: not permitted to {task} ({_reason(error)}): give these "
                "credentials the right to list, read, write and delete objects there"
            )
        return (
            f"{self.url}: could not {task} ({_reason(error)}), tried for "
            f"{self._retry_seconds:.0f} s: look at the store and the way to it, and "
            "start the same command again"
        )

    def _no_bucket(self) -> str:
        bucket = self._root.partition("/")[0]
        return f"{self.url}: there is no bucket {bucket!r}: make it, or name another"


def open_file_system(scheme: str) -> Any:
    """Open fsspec's file system of a scheme, without caches of listings."""
    import fsspec

    # An instance of its own: none that somebody else has set up.
    options = {"use_listings_cache": False, "skip_instance_cache": True}
    return fsspec.filesystem(scheme, **options, **_OPTIONS[scheme])


def _is_of_store(error: BaseException) -> bool:
    """Return True if an error is of the store or the network, not of this program."""
    if isinstance(error, OSError):
        return error.errno not in _LOCAL
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    if isinstance(error, ValueError):  # gcsfs's, of a request that is refused
        return "Bad Request" in str(error) or bool(packages & _STORE_PACKAGES)
    return bool(packages & _STORE_PACKAGES)


def _is_denied(error: BaseException) -> bool:
    """Return True if the credentials do not permit it."""
    is_forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden")
    code = str(getattr(error, "code", ""))
    return isinstance(error, PermissionError) or is_forbidden or code in ("401", "403")


def _is_transient(error: BaseException) -> bool:
    """Return True if the same call may succeed later."""
    if isinstance(error, FileNotFoundError | FileExistsError) or _is_denied(error):
        return False
    if type(error).__name__ in _NO_CREDENTIALS or "NoSuchBucket" in str(error):
        return False
    code = str(getattr(error, "code", ""))
    if code.startswith("4") and code not in ("408", "429"):
        return False
    return isinstance(error, Exception) and _is_of_store(error)


def _reason(error: BaseException | None) -> str:
    """Return the text of an error on one short line, without secrets."""
    text = " ".join((str(error) or type(error).__name__).split())
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, f"[{name}]")
    return text if len(text) <= _MAX_REASON else f"{text[: _MAX_REASON - 3]}..."
