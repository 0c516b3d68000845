"""Prints docs/config.md: python -m tests.make_config_page > docs/config.md."""

import ast
import inspect
import operator

from kdjax import config as config_lib
from kdjax.config import Config

INTRODUCTION = """# Fields of a config

Every field is a flag: `--config.train.steps=5`. A value of another type or outside its
limit is refused before anything is written; the limit of a tuple is that of each item.
Made from `kdjax/config.py` by `python -m tests.make_config_page > docs/config.md`.
"""


def comments() -> dict[tuple[str, str], str]:
    """(class, field) -> its comment in the source, beside the field or above it."""
    source = inspect.getsource(config_lib)
    lines = source.splitlines()
    result = {}
    for cls in ast.parse(source).body:
        for node in cls.body if isinstance(cls, ast.ClassDef) else ():
            if isinstance(node, ast.AnnAssign):
                beside = lines[node.end_lineno - 1][node.end_col_offset :]
                above = lines[node.lineno - 2]
                comment = beside or (above if above.lstrip().startswith("#") else "")
                result[cls.name, node.target.id] = comment.strip().lstrip("# ")
    return result


def page() -> str:
    """The page, in Markdown: a table for each dataclass."""
    config, texts = Config(), comments()
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
