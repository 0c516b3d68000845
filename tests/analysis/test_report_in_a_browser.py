"""The page of a comparison in a real browser: it renders, and asks for nothing."""

import os
import pathlib
import shutil
import subprocess

import pytest

from kdjax.analysis import report, runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browser() -> str:
    found = os.environ.get("KDJAX_BROWSER") or next(
        filter(None, map(shutil.which, BROWSERS)), ""
    )
    if not found:
        pytest.skip("no browser: install chromium, or name one in KDJAX_BROWSER")
    return found


def visit(page: pathlib.Path, folder: pathlib.Path, *flags: str) -> tuple[str, str]:
    """What a headless browser prints of a page, and what it asked the network for."""
    log = folder / "net.json"
    shown = subprocess.run(
        [
            browser(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}",
            *flags,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return shown.stdout, log.read_text(errors="replace")


def test_renders_with_no_message_and_no_request(tmp_path):
    page = tmp_path / "report.html"
    design = runs.Design(
        metrics=("accuracy",),
        factors=("method", "soft"),
        compare=("method",),
        within=("soft",),
    )
    found = runs.parse(rows(), design)
    report.write(page, found, design, title="Kinship & others")
    text, asked = visit(page, tmp_path, "--dump-dom")
    assert "Kinship &amp; others" in text
    assert text.count("<svg") >= 1 and "</html>" in text
    assert "report.html" not in asked.replace(page.as_uri(), "")
    blank = tmp_path / "blank.html"
    blank.write_text("<!doctype html><title>nothing</title>")
    other = tmp_path / "other"
    other.mkdir()
    _, usual = visit(blank, other, "--dump-dom")
    assert hosts(asked) <= hosts(usual)

    picture = tmp_path / "report.png"
    visit(page, tmp_path, f"--screenshot={picture}", "--window-size=1000,1600")
    assert picture.stat().st_size > 20_000  # a blank page of this size has 8 kB


def rows() -> list[dict[str, str]]:
    return [
        {
            "run": f"{method}-{soft}-{seed}",
            "status": "done",
            "error": "",
            "method": method,
            "soft": soft,
            "seed": str(seed),
            "accuracy": str(0.5 + 0.1 * (soft == "yes") + 0.01 * seed),
        }
        for method in ("finetune", "multitask")
        for soft in ("no", "yes")
        for seed in range(3)
    ]


def hosts(log: str) -> set[str]:
    """Hosts of all requests in a log of the browser's network."""
    found = set()
    for part in log.split('"url":"')[1:]:
        url = part.split('"', 1)[0]
        if url.startswith(("http:", "https:", "ws:", "wss:")):
            found.add(url.split("/")[2])
    return found
