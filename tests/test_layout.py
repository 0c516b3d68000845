"""The structure of the package: imports go downwards, and the docs name every part."""

import ast
import graphlib
import pathlib
import re

from kdjax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "kdjax"
FILES = sorted(PACKAGE.rglob("*.py"))
# Lowest first; a part imports parts below its own layer, and within itself.
LAYERS = (
    {"config", "losses", "runtime"},
    {"analysis", "data", "parallel"},
    {"models", "storage"},
    {"experiment"},
    {"training"},
    {"teacher", "evaluation", "annotation"},
    {"pipeline", "aot", "bench", "comparison", "survey", "supervision"},
    {"cli"},
    {*COMMANDS, "__main__"},
)
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
JAX_FREE = (
    "config",
    "runtime",
    "analysis",
    "storage",
    "supervision",
)  # at import, but for runtime.chips


def module_of(file: pathlib.Path) -> str:
    """The dotted name of a file below the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: pathlib.Path, *, at_top: bool = False) -> set[str]:
    """Modules of kdjax that a file imports, as dotted names below the package.

    With `at_top` those that are imported with it, not inside its functions.
    """
    tree = ast.parse(file.read_text())
    names = set()
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdjax"):
            parent = node.module.removeprefix("kdjax").removeprefix(".")
            for alias in node.names:
                name = f"{parent}.{alias.name}".removeprefix(".")
                names.add(name if name in MODULES else parent)
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("kdjax").removeprefix(".")
                for alias in node.names
                if alias.name.split(".")[0] == "kdjax"
            }
    return names - {""}


def part_of(module: str) -> str:
    return module.split(".")[0]


def test_every_part_has_a_layer():
    assert {part_of(module) for module in MODULES if module} == HEIGHT.keys()


def test_a_file_at_the_root_is_a_command():
    files = {file.stem for file in PACKAGE.glob("*.py")}
    assert files == {*COMMANDS, "cli", "config", "__init__", "__main__"}


def test_parts_import_downwards_only():
    upwards = [
        f"{module} imports {imported}"
        for module, file in MODULES.items()
        if module
        for imported in imports_of(file)
        if part_of(imported) != part_of(module)
        and HEIGHT[part_of(imported)] >= HEIGHT[part_of(module)]
    ]
    assert not upwards, upwards


def test_no_circle():
    graph = {
        module: imports_of(file, at_top=True) - {module}
        for module, file in MODULES.items()
        if module
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_only_commands_define_flags_or_import_cli():
    for module, file in MODULES.items():
        if part_of(module) not in {*COMMANDS, "cli", "__main__"}:
            text = file.read_text()
            assert "absl import" not in text or "flags" not in text, module
            assert "cli" not in imports_of(file), module


def test_only_checkpoint_imports_orbax():
    names = [
        module for module, f in MODULES.items() if "orbax.checkpoint" in f.read_text()
    ]
    assert names == ["training.checkpoint"]


def test_the_ground_floor_needs_no_jax():
    for module, file in MODULES.items():
        if part_of(module) in JAX_FREE and module != "runtime.chips":
            top = ast.parse(file.read_text()).body
            text = "\n".join(
                ast.unparse(node)
                for node in top
                if isinstance(node, ast.Import | ast.ImportFrom)
            )
            assert not re.search(r"\b(jax|flax|optax)\b", text), module


def test_the_docs_name_every_file():
    """docs/ARCHITECTURE.md has a line for each, the README for each part."""
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    tree = next(part for part in page.split("```") if part.startswith("\nkdjax/"))
    path: list[str] = []
    named = set()
    for line in tree.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*path[:depth], name.rstrip("/")]
        if name.endswith(".py"):
            named.add("/".join(path))
    expected = {
        f"kdjax/{file.relative_to(PACKAGE).as_posix()}"
        for file in FILES
        if file.name != "__init__.py"
    }
    assert named == expected
    readme = (ROOT / "README.md").read_text()
    for part in {part_of(module) for module in MODULES if module}:
        assert re.search(rf"\b{part}(/|\.py|\b)", readme), part
    assert all(f"kdjax.{command}" in readme for command in COMMANDS)
