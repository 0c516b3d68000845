"""Data of a config, shown and prepared: python -m kdjax.prepare --config=FILE.py.

With --show=5 it prints examples of both splits: what their file and row are, how each
view makes them prompt and target, which tokens are trained and which are only read, and
what is cut, left out or unknown; nothing is written. Without, it writes both splits as
prepared data, which `python -m kdjax.train` does for large ones when they are missing.
Killed anywhere and started again it continues with the next shard.
"""

import pathlib
from typing import Any

from absl import flags

from kdjax import cli
from kdjax.config import Config
from kdjax.runtime import console

_SHOW = flags.DEFINE_integer(
    "show", 0, "Examples of each split to print, token by token.", lower_bound=0
)
_VERIFY = flags.DEFINE_bool("verify", False, "Read and check all that was prepared.")
_NUM_COUNTED = 1000  # examples of a split that counts are of, at least


def run(config: Config, workdir: pathlib.Path) -> None:
    """Print the examples and the counts of both splits, or prepare them."""
    from kdjax.experiment import mixture
    from kdjax.parallel import distributed

    if not _SHOW.value:
        prepare(config, workdir, verify=_VERIFY.value)
    elif distributed.is_main():
        configs = [source.config for source in mixture.sources(config)] or [config]
        for part in configs:
            show(part, _SHOW.value)


def prepare(config: Config, workdir: pathlib.Path, *, verify: bool = False) -> None:
    """Prepare both splits, unless they are, and print what they hold.

    Args:
      config: of the run.
      workdir: of the run.
      verify: read and check all of it.

    Raises:
      ValueError: an error of the data, or a damaged file.
    """
    from kdjax.data import prepared
    from kdjax.experiment.data import load_data
    from kdjax.parallel import distributed

    if config.data.is_built_in:
        raise ValueError(
            "data.source='kinship' is generated at each start: there is nothing to "
            "prepare; give data.path"
        )
    loaded = load_data(config, workdir, force=True)
    rows = []
    parts = [data for _, data in loaded.parts] or [loaded]
    for segments in (s for data in parts for s in (data.train, data.evaluation)):
        assert isinstance(segments, prepared.PreparedSegments)
        if verify:
            segments.verify()
        counts = segments.report.counts
        rows.append(
            {
                "prepared": str(segments.folder),
                "examples": f"{segments.report.num_examples:,}",
                "segments": f"{len(segments):,}",
                "prompt tokens": f"{counts.prompt_tokens:,}",
                "target tokens": f"{counts.target_tokens:,}",
                "bytes": f"{segments.num_bytes:,}",
            }
        )
    if distributed.is_main():
        console.print_table(f"{config.name}: prepared data", rows)


def show(config: Config, num: int) -> None:
    """Print the first examples of both splits, and counts of the first 1,000.

    Of a mixture, those of each source.

    Args:
      config: of the run.
      num: examples of each split.

    Raises:
      ValueError: an error of the data, or too many unknown tokens.
    """
    import itertools
    import sys

    from kdjax.data import preview, selection, sources, views
    from kdjax.experiment import data, methods, mixture

    if mixture.is_mixture(config):
        for source in mixture.sources(config):
            print(f"source {source.name}, {source.share:.0%} of the rows")
            show(source.config, num)
        return
    tokenizer = data.load_tokenizer(config)
    totals = []
    examples = {}
    for split, names in (
        ("train", methods.views(config.method)),
        ("eval", methods.held_out_views(config.method)),
    ):
        stream = sources.iter_examples(
            config.data, split, seed=config.data.kinship.seed
        )
        examples[split] = list(itertools.islice(stream, max(num, _NUM_COUNTED)))
        is_all = next(stream, None) is None
        print(f"{split}: {sources.describe(config.data, split)}")
        selected = selection.select(examples[split], names, split, config.data)
        for note in selected.notes:
            print(note, file=sys.stderr)
        ids = {example.id for example in selected.examples}
        segments_by_id: dict[str, list[Any]] = {}
        counts: dict[str, dict[str, int]] = {}
        for name in names:
            segments, total = views.make_segments(
                selected.examples, (name,), tokenizer, config.data
            )
            totals.append(total)
            for segment in segments:
                # Each turn of a chat may be an example of its own, "<id>/<turn>".
                key = segment.example_id
                key = key if key in ids else key.rpartition("/")[0]
                segments_by_id.setdefault(key, []).append((name, segment))
            num_trained = sum(s.num_loss_tokens for s in segments)
            counts[name] = {
                "examples": len(selected.examples),
                "examples left out": len(examples[split]) - len(selected.examples),
                "segments": total.segments,
                "segments truncated": total.truncated,
                "segments dropped": total.dropped,
                "chats without a turn": total.without_turn,
                "tokens read": sum(s.length + 1 for s in segments) - num_trained,
                "tokens trained": num_trained,
                "tokens unknown": preview.count_unknown(segments, tokenizer),
                "longest segment, tokens": max(
                    (s.length + 1 for s in segments), default=0
                ),
            }
        for example in selected.examples[:num]:
            if example.id not in segments_by_id:
                reason = "too long, or without a turn to learn"
                print(f"\n{split} {example.name}: left out, {reason}")
            for name, segment in segments_by_id.get(example.id, []):
                print(f"\n{split} {example.name}, view {name}:")
                _print_spans(preview.spans(segment, tokenizer))
        print()
        console.print_table(
            f"{split}: {'all' if is_all else 'the first'} {len(examples[split])} "
            "examples, by view",
            [
                {"": count} | {name: counts[name][count] for name in names}
                for count in counts[names[0]]
            ],
        )
    for total in totals:
        views.check_unknown(total, tokenizer, config.data)
    if config.data.is_built_in:
        return
    if overlap := selection.describe_overlap(
        selection.content_digests(examples["train"]), examples["eval"]
    ):
        print(overlap, file=sys.stderr)


def _print_spans(spans: Any) -> None:
    """Print spans in colours, on a terminal; else each as a line with its kind."""
    if not console.has_colors():
        for span in spans:
            print(f"  {span}")
        return
    styles = {False: ("white", "bright_black"), True: ("black on green", "bold green")}
    console.print_pieces(
        [
            (text, styles[span.trained][index % 2])
            for span in spans
            for index, text in enumerate(span.tokens)
        ]
    )


if __name__ == "__main__":
    cli.run(run)
