"""Draws the figure of docs/performance.md from what `whole_job.py` wrote.

python benchmarks/peers/whole_job_figure.py docs/whole_job.json docs/whole_job.svg
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLORS = {"kdjax": "#0b6e4f", "stored": "#9aa0a6", "trl": "#9aa0a6"}
LABELS = {
    "kdjax": "kdjax",
    "stored": "PyTorch by hand,\ntop 64 in files",
    "trl": "TRL, teacher\nin every step",
}
BARS = (
    ("seconds", "minutes, all of it", 60),
    ("to_equal_kl", "minutes to the same held-out KL", 60),
    ("max_rss_bytes", "GiB of memory, at most", 2**30),
)


def main() -> None:
    """Draw a panel per number, a bar per library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=pathlib.Path)
    parser.add_argument("figure", type=pathlib.Path)
    args = parser.parse_args()
    done = json.loads(args.json.read_text())
    names = list(done["results"])
    # Without a date or random ids, the same json gives the same file.
    plt.rcParams["svg.hashsalt"] = "kdjax"
    figure, panels = plt.subplots(1, len(BARS), figsize=(9, 1.9), sharey=True)
    for panel, (key, title, unit) in zip(panels, BARS, strict=True):
        values = [(done["results"][name][key] or 0) / unit for name in names]
        bars = panel.barh(
            [LABELS[name] for name in names],
            values,
            color=[COLORS[name] for name in names],
            height=0.6,
        )
        panel.bar_label(bars, fmt="%.1f", padding=3)
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlim(0, 1.25 * max(values))
        panel.xaxis.set_visible(False)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.tick_params(axis="y", length=0, labelsize=8)
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(args.figure, metadata={"Date": None})


if __name__ == "__main__":
    main()
