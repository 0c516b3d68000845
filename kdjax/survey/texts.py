"""Texts of a survey's pages: a TOML file per language, single entries replaceable."""

import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from kdjax.survey.config import StudyConfig

_FOLDER = pathlib.Path(__file__).parent / "texts"


def languages() -> list[str]:
    """Return the languages that come with kdjax."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def read(config: StudyConfig, num_items: int) -> dict[str, Any]:
    """Read the texts of a study, with what its config says filled in.

    Raises:
      ValueError: an unknown language, entry or statement, or one of another form.
    """
    if config.language not in languages():
        raise ValueError(f"language={config.language!r}: use one of {languages()}")
    texts = _parse(_FOLDER / f"{config.language}.toml")
    if config.texts:
        _replace(texts, _parse(pathlib.Path(config.texts)), config.texts)
    for name in config.constructs:
        if not isinstance(texts["statements"].get(name), str):
            raise ValueError(
                f"constructs has {name!r}, and the texts have no statement of it: add "
                f'{name} = "..." below [statements] of a file, and give it as texts'
            )
    if len(texts["scale"][str(config.points)]) != config.points:
        raise ValueError(f"texts: scale.{config.points} needs {config.points} labels")
    values = {
        "institution": config.institution,
        "contact": config.contact,
        "minutes": config.minutes,
        "payment": config.payment,
        "num_items": num_items,
        "retention_days": config.retention_days,
    }
    try:
        paragraphs = [text.format(**values) for text in texts["consent"]["paragraphs"]]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"texts: a paragraph of consent has a placeholder {error}: use some of "
            f"{sorted(values)}, each in braces"
        ) from None
    texts["consent"]["paragraphs"] = paragraphs
    return texts


def _parse(file: pathlib.Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"texts={str(file)!r} is no valid TOML: {error}") from None


def _replace(texts: dict[str, Any], others: Mapping[str, Any], file: str) -> None:
    """Replace the entries that a file has; statements may also be new."""
    for section, entries in others.items():
        if section not in texts or type(entries) is not type(texts[section]):
            raise ValueError(f"texts={file!r}: there is no [{section}] of this form")
        if not isinstance(entries, dict):
            texts[section] = entries
            continue
        for name, value in entries.items():
            known = texts[section].get(name)
            if section == "statements":
                known = ""
            if type(value) is not type(known):
                raise ValueError(
                    f"texts={file!r}: {section}.{name} is no entry of this form"
                )
            texts[section][name] = value
