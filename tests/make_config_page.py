"""Prints docs/config.md: python -m tests.make_config_page > docs/config.md."""

import inspect
import operator

from kdjax import config as config_lib
from kdjax.config import Config

INTRODUCTION = """# Fields of a config

Every field is a flag: `--config.train.steps=5`. A value of another type or outside its
limit is refused before anything is written; the limit of a tuple is that of each item.
Made from `kdjax/config.py` by `python -m tests.make_config_page > docs/config.md`.
"""


def page() -> str:
    """The page, in Markdown: a table for each dataclass."""
    config, texts = Config(), config_lib.comments()
    tables: dict[type, dict[str, list[config_lib.Leaf]]] = {}
    for leaf in config_lib.leaves(config):
        prefix = leaf.path.rpartition(".")[0]
        part = operator.attrgetter(prefix)(config) if prefix else config
        tables.setdefault(type(part), {}).setdefault(prefix, []).append(leaf)
    lines = [INTRODUCTION]
    for cls, uses in tables.items():
        names = ", ".join(f"`{prefix}`" for prefix in uses if prefix)
        lines += [f"## {names or 'The experiment'}", "", cls.__doc__ or "", ""]
        lines += ["| field | type | default | limit | |", "|---|---|---|---|---|"]
        for path, value, kind, limit in next(iter(uses.values())):
            name = path.rpartition(".")[2]
            cells = [f"`{name}`", f"`{inspect.formatannotation(kind)}`"]
            cells += [f"`{value!r}`", str(limit or "")]
            cells.append(texts[cls.__name__, name])
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
