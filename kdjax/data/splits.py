"""Data sets as splits of rows: files, saved sets, sets of the hub and of tfds."""

import contextlib
import functools
import json
import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.config import SOURCES
from kdjax.data import files, readers
from kdjax.data.readers import Row, Values

# Name of a split -> what yields its rows; the name is "" where there is but one.
Splits = Mapping[str, Callable[[], Iterator[Row]]]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_PREPARE = "prepare it with file_format='array_record' and give its folder"
# What load_from_disk raises for damaged files.
_UNREADABLE = (*readers.DAMAGES, LookupError, ValueError, TypeError, AttributeError)
_SECONDS = 3.0  # to wait for the hub's first answer


def open_splits(path: str, source: str = "auto") -> Splits:
    """Open a data set; the rows of a split are read when they are iterated.

    A folder is a set of `save_to_disk` or of tfds, or holds files: those named after
    splits are these, else all are one. What is no path is the name of a set of the
    hub, "name" or "name:subset".

    Args:
      path: file, glob, folder or name.
      source: of `DataConfig`; "datasets" and "tfds" take a folder as theirs, "jsonl"
        and "text" files of other names as JSON lines, or text.

    Raises:
      ValueError: there is no such set, or it cannot be read.
    """
    if source not in SOURCES:
        raise ValueError(f"source={source!r}: use one of {SOURCES}")
    path = os.path.expanduser(path)
    with (
        files.readable(path),
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
    ):
        os.scandir(path).close()
    folder = Path(path)
    if source == "tfds":
        return _open_tfds(folder)
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(path)
    if (folder / "state.json").is_file():
        if source == "datasets":
            raise ValueError(
                f"path={path!r} holds one split without a name: save a DatasetDict "
                "with the splits, or use source='auto', with eval_path or num_eval"
            )
        return {"": lambda: _saved_rows(path, path)}
    if source == "datasets":
        return _load(path)
    if _is_tfds(folder):
        return _open_tfds(folder)
    if is_hub_name(path):
        return _load(path)
    fallback = {"jsonl": "json", "text": "text"}.get(source, "")
    if folder.is_dir() and (by_split := files.files_by_split(path)):
        return {
            name: functools.partial(readers.iter_rows, paths, fallback)
            for name, paths in by_split.items()
        }
    return {"": lambda: readers.iter_rows(files.find_files(path), fallback)}


def is_hub_name(path: str) -> bool:
    """Return True if a path is no file, but may be the name of a set of the hub."""
    suffixes = {suffix.lower() for suffix in Path(path).suffixes}
    return (
        not os.path.lexists(path)
        and _HUB_NAME.fullmatch(path) is not None
        and suffixes.isdisjoint([*files.FORMATS, ".gz", ".zst"])
    )


def _saved_splits(path: str) -> Splits:
    file = f"{path}/dataset_dict.json"
    values = readers.read_json(file)
    names = values.get("splits") if isinstance(values, dict) else None
    if not isinstance(names, list) or not names:
        raise ValueError(f"{file} names no splits: save the DatasetDict again")
    for name in names:
        is_text = isinstance(name, str) and name.isprintable() and "/" not in name
        if not is_text or name in ("", ".", ".."):
            raise ValueError(
                f"{file} names the split {name!r}, which is no name of a folder: save "
                "the DatasetDict again"
            )
    return {
        name: functools.partial(_saved_rows, f"{path}/{name}", f"{path}/{name}")
        for name in names
    }


def _saved_rows(folder: str, where: str) -> Iterator[Row]:
    """Yield the rows of one split of `save_to_disk`, mapped into memory."""
    import datasets

    try:
        # An empty split may have no files, which load_from_disk does not read.
        state = json.loads(Path(folder, "state.json").read_bytes())
        if state["_data_files"] == []:
            return
        split = datasets.load_from_disk(folder, keep_in_memory=False)
    except _UNREADABLE as error:
        raise ValueError(
            f"path={folder!r} cannot be read as a saved data set "
            f"({_first_line(error)}): save it again"
        ) from error
    yield from _dataset_rows(split, where)


def _dataset_rows(split: Any, where: str) -> Iterator[Row]:
    try:
        decode = readers.class_decoder(split.features.to_dict())
    except ValueError as error:
        raise ValueError(
            f"path={where!r} has features that cannot be read ({error}): save it again"
        ) from None
    arrow = split.with_format("arrow")
    tables = (arrow[i : i + 512] for i in range(0, len(arrow), 512))
    rows = readers.iter_batches(tables, arrow.data.schema, where, decode)
    number = 0
    try:
        for number, values in rows:
            yield Row(where, number, values, is_padded=True)
    except readers.DAMAGES as error:
        raise readers.describe_damage(f"{where}:{number + 1}", error) from error


def _load(path: str) -> Splits:
    """Load a folder, or a set of the hub, by `load_dataset`."""
    import datasets

    name, _, subset = (path, "", "") if os.path.exists(path) else path.partition(":")
    remedy = "check the name"
    try:
        with _offline_if_unreachable(local=os.path.exists(path)) as offline:
            if offline:
                remedy = "the hub is not reached from here: give files or a folder"
            splits = datasets.load_dataset(
                name, subset or None, trust_remote_code=False
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"path={path!r} is no file or folder that is read, and load_dataset "
            f"failed: {_first_line(error)}; {remedy}"
        ) from error
    return {
        str(split): functools.partial(_dataset_rows, rows, f"{path}/{split}")
        for split, rows in splits.items()
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _offline_if_unreachable(*, local: bool) -> Iterator[bool]:
    """Have the hub's libraries look at their local cache alone, if there is no network.

    They would try again and again otherwise, for minutes.

    Args:
      local: what is read is a folder, for which there is nothing to ask.

    Yields:
      True if the hub is not asked.
    """
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    offline = any(place.HF_HUB_OFFLINE for place in places)
    if offline or local or _is_reachable(huggingface_hub.constants.ENDPOINT):
        yield offline
        return
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield True
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _is_reachable(url: str) -> bool:
    """Return True if the host of a URL, or the proxy to it, takes a connection."""
    proxy = next(
        (
            os.environ[name]
            for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
            if os.environ.get(name)
        ),
        url,
    )
    parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or {"http": 80}.get(parts.scheme, 443)
    answers: list[bool] = []

    def connect() -> None:
        address = (parts.hostname or "", port)
        with (
            contextlib.suppress(OSError),
            socket.create_connection(address, _SECONDS),
        ):
            answers.append(True)

    # Looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return bool(answers)


def _is_tfds(folder: Path) -> bool:
    return (folder / "features.json").is_file() or any(
        (version / "features.json").is_file()
        for version in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", version.name)
    )


def _open_tfds(folder: Path) -> Splits:
    """Open a prepared array_record data set, by the folder of its name or version.

    Random access through `data_source`: TensorFlow is not needed.
    """
    try:
        import tensorflow_datasets as tfds
        from google.protobuf import json_format
    except ImportError as error:
        raise ValueError(
            f"path={str(folder)!r} is a set of tensorflow_datasets, which is not "
            f"installed ({error}): pip install 'kdjax[tfds]'"
        ) from error

    if not folder.is_dir():
        raise ValueError(f"path={str(folder)!r} is no folder: {_PREPARE}")
    try:
        if (folder / "dataset_info.json").exists():
            builder = tfds.builder_from_directory(str(folder))
        else:
            builder = tfds.builder(folder.name, data_dir=str(folder.parent))
    except (
        OSError,
        ValueError,
        json_format.ParseError,
        tfds.core.DatasetNotFoundError,
    ) as error:
        raise ValueError(
            f"path={str(folder)!r} is no prepared set of tensorflow_datasets "
            f"({_first_line(error)}): {_PREPARE}"
        ) from error
    return {
        split: functools.partial(_tfds_rows, builder, split)
        for split in builder.info.splits
    }


def _tfds_rows(builder: Any, split: str) -> Iterator[Row]:
    decode = readers.class_decoder(_tfds_feature(builder.info.features))
    where = f"{builder.data_dir}/{split}"
    try:
        source = builder.as_data_source(split=split)
    except (NotImplementedError, OSError, ValueError) as error:
        raise ValueError(
            f"{where} cannot be read ({_first_line(error)}): {_PREPARE}"
        ) from error
    for number in range(len(source)):
        try:
            values: Values = _to_python(source[number])
        except (*readers.DAMAGES, RuntimeError) as error:
            raise readers.describe_damage(f"{where}:{number + 1}", error) from error
        row = Row(where, number + 1, values)
        yield row._replace(values=decode(values, f"{row.where}:")) if decode else row


def _tfds_feature(feature: Any) -> Any:
    """Describe a feature of tfds as `readers.class_decoder` takes it."""
    # A sequence also has the attributes of what it is of.
    if inner := getattr(feature, "feature", None):
        return {"_type": "Sequence", "feature": _tfds_feature(inner)}
    if names := getattr(feature, "names", None):
        return {"_type": "ClassLabel", "names": list(names)}
    if hasattr(feature, "items"):
        return {name: _tfds_feature(f) for name, f in feature.items()}
    return {"_type": "Value"}


def _to_python(value: Any) -> Any:
    """Convert NumPy scalars and arrays to Python values, bytes of UTF-8 to text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    if isinstance(value, Mapping):
        return {key: _to_python(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_to_python(inner) for inner in value]
    return value
