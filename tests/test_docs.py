"""Files, modules and links that the docs mention exist; the README's Python runs."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
HISTORY = "docs/LOG.md"  # names are those of the day of an entry
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in [
        *(ROOT / "docs").glob("*.md"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
    if page.relative_to(ROOT).as_posix() != HISTORY
]
FILE = re.compile(r"\b((?:kdjax|benchmarks|configs|launch|tests|docs)/[\w./-]*\w/?)")
MODULE = re.compile(r"(?<![\w/.-])kdjax((?:\.[A-Za-z_]\w*)+)")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def missing_files(text: str) -> list[str]:
    """The files named in a text that do not exist."""
    return [name for name in FILE.findall(text) if not (ROOT / name).exists()]


def missing_modules(text: str) -> list[str]:
    """The names below kdjax that are no module, nor written in the module before."""
    missing = []
    for dotted in MODULE.findall(text):
        names = dotted.removeprefix(".").split(".")
        path = ROOT / "kdjax"
        while names and ((path / names[0]).is_dir() or is_module(path, names[0])):
            path /= names.pop(0)
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if names and not re.search(rf"\b{names[0]}\b", file.read_text()):
            missing.append(f"kdjax{dotted}")
    return missing


def is_module(folder: pathlib.Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_files_modules_and_links_exist(page):
    text = (ROOT / page).read_text()
    assert not missing_files(text)
    assert not missing_modules(text)
    folder = (ROOT / page).parent
    links = [(folder / link).resolve() for link in LINK.findall(text)]
    assert not [link for link in links if not link.exists()]


def test_what_does_not_exist_is_noticed():
    assert missing_files("`kdjax/losses/fused.py` and kdjax/config.py.") == [
        "kdjax/losses/fused.py"
    ]
    text = "`kdjax.experiment`, `kdjax.fitting.fit`, kdjax.training.loop.train_loop"
    assert missing_modules(text) == ["kdjax.fitting.fit"]


def test_the_readme_runs():
    [code] = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    # As a reader has it, without the suite's strict promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
