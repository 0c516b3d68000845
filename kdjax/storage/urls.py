"""Addresses of folders in object stores, and the local folders that stand for them."""

import hashlib
import os
import pathlib
import re

SCHEMES = ("gs", "s3")
_ADDRESS = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,221})/([A-Za-z0-9._=+,/ -]+)")


def is_url(text: str | os.PathLike) -> bool:
    """Return True if a text is an address, not the path of a folder."""
    return isinstance(text, str) and "://" in text


def check(url: str, name: str = "workdir") -> str:
    """Return an address in its one form, without a slash at its end.

    Args:
      url: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.
      name: of its flag or field, for errors.

    Raises:
      ValueError: it is none, or has a user, a password or a query, which are not
        repeated.
    """
    if any(sign in url for sign in "@?#%"):
        raise ValueError(
            f"{name} has a user, a password, or one of ? # % in its address (it is not "
            "repeated here): give gs://BUCKET/FOLDER or s3://BUCKET/FOLDER alone; "
            "credentials come from the environment (docs/storage.md)"
        )
    match = _ADDRESS.fullmatch(url.rstrip("/"))
    parts = match[3].split("/") if match else [""]
    # ".kdjax" holds what describes a mirrored folder, which is none itself.
    if match is None or any(part in ("", ".", "..", ".kdjax") for part in parts):
        raise ValueError(
            f"{name}={url!r} is no folder in a store: give gs://BUCKET/FOLDER or "
            "s3://BUCKET/FOLDER, of letters, digits and . _ - = + , in its names"
        )
    return match[0]


def local_folder(url: str) -> pathlib.Path:
    """Return the local folder of an address: the same on every call.

    It lies in the folder that KDJAX_LOCAL_DIR names, else in ~/.cache/kdjax/stores
    (XDG_CACHE_HOME).

    Args:
      url: as `check` returns it.
    """
    base = os.environ.get("KDJAX_LOCAL_DIR")
    if not base:
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        base = str(pathlib.Path(cache) / "kdjax" / "stores")
    digest = hashlib.blake2b(url.encode(), digest_size=6).hexdigest()
    return pathlib.Path(base).absolute() / f"{url.rpartition('/')[2][:64]}-{digest}"
