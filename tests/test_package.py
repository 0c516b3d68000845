"""The package: metadata, and library modules that change nothing when imported."""

import json
import pathlib
import re
import subprocess
import sys
import tomllib

import kdjax
from kdjax import __main__ as script

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTS = """
import importlib, json, os, pkgutil, sys

def refuse(*args):
    raise AssertionError(f"a module replaces the process: {args}")

os.execv = os.execve = refuse
import jax
from absl import flags
import kdjax

def state():
    modules = flags.FLAGS.flags_by_module_dict()
    return {
        "flags": [name for name in modules if "kdjax" in name],
        "environment": dict(os.environ),
        "jax.config": {name: repr(value) for name, value in jax.config.values.items()},
        "path": list(sys.path),
        "float": repr(sys.float_info),
    }

before = state()
names = [
    module.name
    for module in pkgutil.walk_packages(kdjax.__path__, "kdjax.")
    if module.name.split(".")[1] not in sys.argv[1:]
]
for name in names:
    importlib.import_module(name)
after = state()
changed = {
    part: [before[part], after[part]] for part in before if before[part] != after[part]
}
print(json.dumps({"imported": names, "changed": changed}))
"""


def test_library_modules_change_nothing_when_imported():
    commands = [*script.COMMANDS, "cli", "__main__"]
    process = subprocess.run(
        [sys.executable, "-c", IMPORTS, *commands], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert {"kdjax.losses", "kdjax.training.loop"} <= set(report["imported"])
    assert report["changed"] == {}


def test_the_version_is_written_once():
    pattern = re.compile(re.escape(f'"{kdjax.__version__}"'))
    files = [
        *(ROOT / "kdjax").rglob("*.py"),
        ROOT / "pyproject.toml",
        ROOT / "setup.py",
    ]
    assert [f.name for f in files if pattern.search(f.read_text())] == ["__init__.py"]


def test_metadata_names_what_is_there():
    assert PROJECT["license"] == "Apache-2.0" and "urls" not in PROJECT
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert (ROOT / "kdjax" / "py.typed").is_file()
    module, function = PROJECT["scripts"]["kdjax"].split(":")
    assert (module, function) == (script.__name__, script.main.__name__)
    # What an extra names of the package is an extra too.
    extras = PROJECT["optional-dependencies"]
    for requirement in (r for extra in extras.values() for r in extra):
        if match := re.fullmatch(r"kdjax\[(.+)\]", requirement):
            assert set(match[1].split(",")) <= set(extras)


def test_readme_has_no_relative_links():
    # They lead nowhere on the index that shows the README.
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if "://" not in link and link[0] != "#"] == []
