"""Teacher cache tools: python -m kdjax.cache ACTION ...

    info FOLDER [--png=FILE]               what is in it, with a histogram of entropies
    verify FOLDER                          reads and checks everything
    export FOLDER --out=FILE.parquet       one row per record, for other tools
    merge FOLDER FOLDER ... --out=FOLDER   one cache of disjoint examples
    ids --config=FILE.py --split=train --out=FILE.jsonl
                                           what a teacher elsewhere is to be run on
    import PATH --format=NAME --config=FILE.py --split=train --out=FOLDER
                                           another tool's teacher outputs as a cache

FOLDER holds a manifest.json: DIR/cache/train and DIR/cache/eval of a run, also of one
in a store: gs://BUCKET/DIR/cache/train.
"""

import sys

from absl import flags

from kdjax import cli
from kdjax.runtime.console import print_table, progress

for _name in ("config", "workdir"):
    flags.declare_key_flag(_name)
_OUT = flags.DEFINE_string(
    "out", None, "New folder (merge, import) or file (export, ids)."
)
_PNG = flags.DEFINE_string("png", None, "Where info draws what it prints.")
_FORMAT = flags.DEFINE_string(
    "format",
    None,
    "Tool that wrote what import reads: vllm, sglang, distillkit, axolotl, maxtext.",
)
_LAYOUT = flags.DEFINE_string("layout", None, "Renamed: use --format.")
_SPLIT = flags.DEFINE_enum(
    "split", "train", ["train", "eval"], "Examples that ids writes, or import covers."
)
_TEACHER = flags.DEFINE_string(
    "teacher", None, "Name of the teacher that wrote them; teacher.path by default."
)


def info(folders: list[str]) -> None:
    """Print and plot statistics of a cache."""
    from kdjax.teacher import cache as cache_lib
    from kdjax.teacher import describe

    (folder,) = _check_count(folders, 1)
    cache = cache_lib.load_cache(folder)
    with progress(cache.num_tokens, "read") as advance:
        summary = describe.summarize(cache, advance=advance)
    rows = [
        {"": name, "value": value}
        for name, value in (describe.provenance(cache.manifest) | summary).items()
        if not isinstance(value, dict | list)
    ]
    for name, unit in (("entropy", "T="), ("mass", "first ")):
        for column, value in summary.get(name, {}).items():
            rows.append({"": f"{name}, {unit}{column}", "value": value})
    print_table(folder, rows)
    for line in describe.histogram_lines(summary):
        print(line)
    if _PNG.value:
        describe.plot(summary, _PNG.value)


def verify(folders: list[str]) -> None:
    """Check a cache; exit code 0 only if all of it is right."""
    from kdjax.teacher import cache as cache_lib

    (folder,) = _check_count(folders, 1)
    cache = cache_lib.load_cache(folder)
    with progress(cache.num_tokens, "verify") as advance:
        totals = cache_lib.verify(cache, advance=advance)
    print_table(f"{folder}: verified", [totals])


def export(folders: list[str]) -> None:
    """Write a cache as Parquet."""
    (folder,) = _check_count(folders, 1)
    out = _out()

    from kdjax.teacher import cache as cache_lib
    from kdjax.teacher import merge_export

    num_rows = merge_export.export(cache_lib.load_cache(folder), out)
    print(f"exported {num_rows} records to {out}")


def merge(folders: list[str]) -> None:
    """Write one cache of several."""
    from kdjax.experiment import workdir
    from kdjax.teacher import cache as cache_lib
    from kdjax.teacher import merge_export

    caches = [
        cache_lib.load_cache(folder) for folder in _check_count(folders, 2, more=True)
    ]
    with (
        workdir.hold_output(_out()),
        progress(sum(c.num_records for c in caches), "merge") as advance,
    ):
        manifest = merge_export.merge(caches, _out(), advance=advance)
    print(f"merged {manifest.num_records} records into {_out()}")


def ids(names: list[str]) -> None:
    """Write the prompts and targets that a teacher elsewhere is to be run on."""
    _check_count(names, 0)
    config, out = cli.given_config(), _out()

    from kdjax.experiment.data import load_data
    from kdjax.teacher import merge_export

    data = load_data(config, splits=(_SPLIT.value,))
    is_train = _SPLIT.value == "train"
    segments = data.train if is_train else data.evaluation
    with progress(len(segments), f"write {_SPLIT.value}") as advance:
        num_rows = merge_export.write_ids(
            segments,
            data.views if is_train else data.eval_views,
            data.tokenizer,
            out,
            advance=lambda _: advance(),
        )
    print(
        f"wrote {num_rows} sequences to {out}: run the teacher on their token_ids for "
        f"the log-probabilities of its {config.cache.k} most probable tokens, then "
        f"import them, --split={_SPLIT.value}"
    )


def import_(files: list[str]) -> None:
    """Write a cache of another tool's teacher outputs."""
    (path,) = _check_count(files, 1)
    if _LAYOUT.value is not None:
        raise ValueError(f"--layout was renamed: use --format={_LAYOUT.value}")

    from kdjax.teacher.importers import convert

    tool = _FORMAT.value or ""
    if tool not in convert.FORMATS:
        raise ValueError(f"--format={tool}: use one of {sorted(convert.FORMATS)}")

    from kdjax.data.segments import as_segments
    from kdjax.experiment import workdir
    from kdjax.experiment.data import load_data
    from kdjax.teacher import merge_export

    config = cli.given_config()
    data = load_data(config, cli.workdir(config), splits=(_SPLIT.value,))
    segments = data.train if _SPLIT.value == "train" else data.evaluation
    num_tokens = int(as_segments(segments).loss_lengths.sum())
    with (
        workdir.hold_output(_out()),
        progress(num_tokens, f"import {_SPLIT.value}") as advance,
    ):
        totals = merge_export.import_file(
            path,
            segments,
            _out(),
            config=config,
            tokenizer=data.tokenizer,
            tool=tool,
            teacher=_TEACHER.value,
            name=f"{config.data.source} {config.data.path} {_SPLIT.value}",
            advance=advance,
        )
    print_table(f"imported {_SPLIT.value} into {_out()}", [totals])


def _check_count(names: list[str], count: int, *, more: bool = False) -> list[str]:
    if len(names) < count or (len(names) > count and not more):
        expected = f"{count}{' or more' if more else ''}"
        raise ValueError(f"{names} given, {expected} wanted: see --helpshort")
    return names


def _out() -> str:
    if not _OUT.value:
        raise ValueError("--out is missing: say where to write")
    if "://" in _OUT.value:
        raise ValueError(
            "--out is an address in a store: give a folder or file; caches in a store "
            "are written by kdjax.label --workdir=gs://BUCKET/FOLDER"
        )
    return _OUT.value


ACTIONS = {
    "info": info,
    "verify": verify,
    "export": export,
    "merge": merge,
    "ids": ids,
    "import": import_,
}


def run(arguments: list[str]) -> None:
    """Run the action that the first argument names on the others."""
    if not arguments or arguments[0] not in ACTIONS:
        raise ValueError(
            f"action={' '.join(arguments[:1])!r} is unknown: use one of {list(ACTIONS)}"
        )
    ACTIONS[arguments[0]](arguments[1:])
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run_actions(run)
