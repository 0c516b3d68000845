"""The shape of the tree: imports one way, small files, nothing forgotten."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "kdjax"
FILES = sorted(PACKAGE.rglob("*.py"))
VERBS = (
    "train",
    "label",
    "annotate",
    "evaluate",
    "compare",
    "export",
    "cache",
    "plan",
    "benchmark",
)
ALLOWED = {  # part -> the parts of kdjax it may import
    "losses": {"losses"},
    "metrics": set(),
    "config": set(),
    "models": {"models", "losses", "config"},
    "data": {"data", "config"},
    "step": {"freezing", "live", "losses", "models", "sharding", "state"},
    "live": {"losses", "models", "sharding"},
    "state": {"freezing", "sharding"},
    "freezing": {"models"},
    "writer": set(),
    "flops": {"config"},
    "hlo": set(),
    "topology": {"flops"},
    "analysis": {"analysis"},
}


def imports_of(file: pathlib.Path) -> set[str]:
    """Modules of kdjax that a file imports, as dotted names below the package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "kdjax":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("kdjax."):
                found.add(node.module.removeprefix("kdjax."))
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("kdjax.")
                for a in node.names
                if a.name.startswith("kdjax.")
            }
    return found


def part_of(file: pathlib.Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_one_way():
    wrong = []
    for file in FILES:
        allowed = ALLOWED.get(part_of(file))
        for module in imports_of(file):
            top = module.split(".")[0]
            if top in VERBS:
                wrong.append(f"{file.name} imports the verb {top}")
            if allowed is not None and top not in allowed:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong


def test_only_checkpoint_imports_orbax():
    found = [f.name for f in FILES if "orbax.checkpoint" in f.read_text()]
    assert found == ["checkpoint.py"]


def test_files_are_small():
    lines = {f.name: len(f.read_text().splitlines()) for f in FILES}
    assert {n: c for n, c in lines.items() if c > 400} == {}


def test_architecture_names_every_file():
    tree = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    missing = [
        str(f.relative_to(PACKAGE))
        for f in FILES
        if f.name != "__init__.py"
        and not re.search(rf"(?<![\w/]){re.escape(f.name)}", tree)
    ]
    assert not missing, missing


def test_verbs_are_where_the_readme_says():
    readme = (ROOT / "README.md").read_text()
    assert all(f"kdjax.{verb}" in readme for verb in VERBS)
