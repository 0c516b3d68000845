"""The Python blocks of docs/api.md run as they stand."""

import pathlib
import re

import jax
import pytest

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "api.md"
BLOCKS = re.findall(
    r"^## ([^\n]+)$|^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S
)


def python_blocks():
    """Return (heading, code) of each block."""
    heading, found = "", []
    for title, code in BLOCKS:
        heading = title or heading
        if code:
            found.append(pytest.param(code, id=heading))
    return found


@pytest.mark.parametrize("code", python_blocks())
def test_block(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As a reader has them: optax and Flax are not written for strict promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, PAGE.name, "exec"), {"__name__": "__main__"})
