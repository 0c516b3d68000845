"""Teacher caches of a run: checked where they exist, built where they are missing."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax

from kdjax import losses
from kdjax.config import Config, MeshConfig
from kdjax.data import loader, teacher_records
from kdjax.data import tokenizer as tokenizers
from kdjax.data.segments import as_segments
from kdjax.data.views import Segment
from kdjax.experiment import fingerprint, methods, mixture
from kdjax.experiment import workdir as workdir_lib
from kdjax.experiment.models import check_ids, label_vocab_size, load_model
from kdjax.experiment.rows import row_kwargs
from kdjax.experiment.run import Run
from kdjax.experiment.teacher import (
    check_runs_elsewhere,
    has_teacher,
    runs_elsewhere,
    teacher_folder,
    teacher_shape,
)
from kdjax.models import flops, hf
from kdjax.models.lm import Shape
from kdjax.parallel import distributed, sharding
from kdjax.runtime import chips, locks, untrusted
from kdjax.runtime.console import progress
from kdjax.storage import mirror, urls
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import label
from kdjax.teacher.union import CacheUnion
from kdjax.training import step

Cache = cache_lib.TeacherCache | CacheUnion


_fetch = functools.cache(functools.partial(mirror.fetch, name="cache.path"))


def folder(config: Config, workdir: pathlib.Path, split: str) -> pathlib.Path:
    """Return the folder of the cache of a split, fetched first if a store has it."""
    path = config.cache.path
    if urls.is_url(path):
        return _fetch(path) / split
    return pathlib.Path(path or workdir / "cache") / split


def segments_to_label(run: Run) -> dict[str, Sequence[Segment]]:
    """Return the segments that need records: held-out ones, training ones if soft."""
    config = run.config
    if not has_teacher(config):
        return {}
    segments: dict[str, Sequence[Segment]] = {"eval": run.data.evaluation}
    if methods.has_soft_terms(config.method) and not config.teacher.online:
        segments["train"] = run.data.train
    return segments


def check(run: Run) -> None:
    """Open the caches that are finished, so that their errors come first.

    Raises:
      ValueError: a cache that does not fit, or an example longer than a labelled row.
    """
    if run.data.parts:
        for part in part_runs(run):
            check(part)
        return
    config, splits = run.config, segments_to_label(run)
    todo = _missing(run, splits)
    if has_teacher(config) and runs_elsewhere(config):
        check_runs_elsewhere(config)
        if "train" in todo:
            check_can_label(run)
    elif todo:
        _check_not_in_store(config, todo)
        teacher = teacher_shape(config, run.tokenizer)
        rows = _rows(config, teacher)
        for split in todo:
            label.check(splits[split], _manifest(run, split, teacher), config.cache)
            try:
                loader.BatchPlan(splits[split], batch_size=1, shuffle=False, **rows)
            except ValueError as error:
                raise ValueError(
                    f"labelling {split}, with cache.row_length: {error}"
                ) from None
    for split in splits:
        if split not in todo:
            _open(run, split, splits[split])


def check_can_label(run: Run) -> None:
    """Raise ValueError if the teacher is to label something and has no weights."""
    if run.data.parts:
        for part in part_runs(run):
            check_can_label(part)
        return
    config = run.config
    todo = sorted(_missing(run, segments_to_label(run)), reverse=True)
    if todo and runs_elsewhere(config):
        raise ValueError(
            f"{folder(config, run.workdir, todo[0])} is not labelled, and teacher.path="
            f"{config.teacher.path!r} has no weights to label with: download them, or "
            "import what the teacher said elsewhere (docs/cache.md)"
        )


def _missing(run: Run, splits: Collection[str]) -> list[str]:
    """Return the splits whose cache is not there, or not finished."""
    return [s for s in splits if label.missing(folder(run.config, run.workdir, s))]


def _agree(run: Run, splits: Iterable[str]) -> None:
    """Check that all processes see the same caches, before any of them changes one."""

    def look() -> dict[str, str]:
        paths = [folder(run.config, run.workdir, split) for split in splits]
        return {
            f"cache {path}": "not labelled"
            if label.missing(path)
            else fingerprint.of_path(str(path / cache_lib.MANIFEST))
            for path in paths
        }

    distributed.agree_on_files("caches", look)


def _rows(config: Config, teacher: Shape) -> dict[str, Any]:
    """Return the keywords of `BatchPlan` for rows as the teacher reads them."""
    cache = config.cache
    return row_kwargs(teacher, cache.row_length, cache.encoder_row_length)


def part_runs(run: Run) -> list[Run]:
    """Return the runs on each source of a mixture; the run itself where it has one."""
    if not run.data.parts:
        return [run]
    runs = []
    root = run.config.cache.path or str(run.workdir / "cache")
    caches = run.config.mixture.caches or ("",) * len(run.data.parts)
    for source, (name, data), path in zip(
        mixture.sources(run.config), run.data.parts, caches, strict=True
    ):
        cache = dataclasses.replace(run.config.cache, path=path or f"{root}/{name}")
        config = dataclasses.replace(source.config, cache=cache)
        runs.append(dataclasses.replace(run, config=config, data=data))
    return runs


def open_split(run: Run, split: str) -> Cache | None:
    """Open the cache of a split; None, with a note on stderr, if it is not labelled."""
    if run.data.parts:
        caches = [open_split(part, split) for part in part_runs(run)]
        opened = [cache for cache in caches if cache is not None]
        return CacheUnion(opened) if len(opened) == len(caches) else None
    if not has_teacher(run.config):
        return None
    path = folder(run.config, run.workdir, split)
    _agree(run, [split])
    if label.missing(path):
        print(f"{path} is not labelled: no KL, no agreement", file=sys.stderr)
        return None
    return _open(run, split, segments_to_label(run)[split])


def describe(config: Config, workdir: pathlib.Path, split: str) -> dict[str, Any]:
    """Summarize a finished cache: records, tokens, bytes per target token."""
    path = folder(config, workdir, split)
    manifest = cache_lib.read_manifest(path)
    size = sum((path / shard.name).stat().st_size for shard in manifest.shards)
    return {
        "cache": str(path),
        "kind": manifest.kind,
        "k": manifest.k,
        "records": manifest.num_records,
        "tokens": manifest.num_tokens,
        "bytes_per_token": size / max(1, manifest.num_tokens),
        "bytes_per_pair": size / max(1, manifest.num_tokens * manifest.k),
    }


def ensure(run: Run) -> dict[str, Cache]:
    """Label what is not labelled yet, and open all caches, by split.

    Raises:
      ValueError: a finished cache that does not fit the config or lacks an example.
    """
    if run.data.parts:
        caches = [ensure(part) for part in part_runs(run)]
        names = [name for name in caches[0] if all(name in c for c in caches)]
        return {name: CacheUnion([c[name] for c in caches]) for name in names}
    config, workdir = run.config, run.workdir
    teacher_path = teacher_folder(config, workdir)
    splits = segments_to_label(run)
    _agree(run, splits)
    todo = {split: splits[split] for split in _missing(run, splits)}
    if todo and runs_elsewhere(config):
        print(
            f"{' and '.join(str(folder(config, workdir, split)) for split in todo)}: "
            "not labelled, and the teacher has no weights here: no KL, no agreement",
            file=sys.stderr,
        )
        splits = {name: of for name, of in splits.items() if name not in todo}
        todo = {}
    if finished := set(splits) - set(todo):
        _check_teacher(config, workdir, teacher_path, finished)
    if todo:
        _check_not_in_store(config, todo)
        with contextlib.ExitStack() as stack:
            for split in todo:
                path = folder(config, workdir, split)
                stack.enter_context(
                    workdir_lib.hold(path, name="cache", remedy="another cache.path")
                )
            _build(run, teacher_path, todo)
    for split in finished if distributed.is_main() else ():
        locks.clear(folder(config, workdir, split))
    return {split: _open(run, split, segments) for split, segments in splits.items()}


def _check_not_in_store(config: Config, todo: Iterable[str]) -> None:
    if urls.is_url(config.cache.path):
        raise ValueError(
            f"cache.path={config.cache.path!r} is not labelled for {sorted(todo)}: "
            "caches in a store are read alone there; fill one in a --workdir "
            "(kdjax.label --workdir=gs://BUCKET/FOLDER), and name FOLDER/cache"
        )


def _open(run: Run, split: str, segments: Sequence[Segment]) -> cache_lib.TeacherCache:
    config, data = run.config, run.data
    kind, k = _kind(run, split)
    cache = cache_lib.load_cache(
        folder(config, run.workdir, split),
        tokenizer_fingerprint=tokenizers.fingerprint(data.tokenizer),
        kind=kind,
        k=k,
        num_rounds=config.cache.num_rounds,
        temperatures={*methods.temperatures(config.method), 1.0},
        tail=config.method.tail,
    )
    teacher_records.check_cache(segments, cache, set(range(len(data.views))))
    return cache


def _check_teacher(
    config: Config, workdir: pathlib.Path, teacher_path: str, splits: set[str]
) -> None:
    """Refuse caches of another teacher; an import's is only known by name.

    So is that of a teacher without weights here.
    """
    for split in sorted(splits):
        path = folder(config, workdir, split)
        manifest = cache_lib.read_manifest(path)
        if manifest.missing or runs_elsewhere(config):
            continue
        if manifest.teacher_fingerprint != hf.fingerprint(teacher_path):
            raise ValueError(
                f"teacher.path={teacher_path!r} is not the teacher that {path} was "
                f"labelled with ({untrusted.quote(repr(manifest.teacher_path))}): name "
                "that one, or another cache.path"
            )


def _kind(run: Run, split: str) -> tuple[str, int]:
    """Return the kind of a split's cache, and its pairs or draws per token.

    Held-out measures are exact: that split has the top k where training has draws, and
    where it has whole rows of an online teacher.
    There are no more pairs than the vocabulary has.
    """
    config, kind = run.config, run.config.cache.kind
    if kind == "sampled" and split == "train":
        return kind, config.cache.num_draws
    whole = kind == "dense" and not config.teacher.online
    return "dense" if whole else "top_k", min(config.cache.k, len(run.tokenizer))


def _manifest(run: Run, split: str, teacher: Shape) -> cache_lib.Manifest:
    """Describe the cache of a split, but for its content and its teacher's weights."""
    config, data = run.config, run.data
    vocab_size = label_vocab_size(run.student.shape, teacher, data.tokenizer)
    kind, k = _kind(run, split)
    names = data.eval_views if split == "eval" else data.views
    return cache_lib.Manifest(
        kind=kind,
        k=vocab_size if kind == "dense" else k,
        num_rounds=config.cache.num_rounds if kind == "sampled" else 0,
        vocab_size=vocab_size,
        temperatures=tuple(map(float, config.cache.temperatures)),
        tokenizer_fingerprint=tokenizers.fingerprint(data.tokenizer),
        teacher_path=config.teacher.path or "teacher",
        teacher_fingerprint="",
        data=f"{config.data.source} {config.data.path} {split} {'+'.join(names)}",
        dtype=config.train.dtype,
    )


def _build(run: Run, teacher_path: str, todo: dict[str, Sequence[Segment]]) -> None:
    config, data = run.config, run.data
    # Each process labels its own shards on its own devices.
    devices = jax.local_devices()
    mesh = sharding.make_mesh(MeshConfig(data=-1), devices=devices)
    settings = dataclasses.replace(
        config.cache,
        batch_size=-(-config.cache.batch_size // len(devices)) * len(devices),
    )
    model, params = load_model(teacher_path, mesh, dtype=config.train.dtype)
    check_ids("teacher", model.shape, data.max_id, data.tokenizer)
    vocab_size = label_vocab_size(run.student.shape, model.shape, data.tokenizer)
    placed = jax.sharding.NamedSharding(mesh, sharding.BATCH_SPEC)
    teacher_fingerprint = hf.fingerprint(teacher_path)

    @functools.cache  # splits of one kind share what was compiled
    def label_step(k: int | None) -> Any:
        return step.make_label_step(
            model.graphdef,
            mesh,
            model.abstract,
            k=k,
            temperatures=settings.temperatures,
            chunk_size=settings.chunk_size
            or losses.chunk_size(settings.memory_mib, model.shape.vocab_size),
            num_valid=vocab_size,
        )

    for split, segments in todo.items():
        path = folder(config, run.workdir, split)
        table = as_segments(segments)
        num_tokens = int(table.loss_lengths.sum())
        # Shards of a killed run over other examples are refused, not mixed in.
        content = hashlib.blake2b(table.keys.tobytes(), digest_size=16)
        manifest = _manifest(run, split, model.shape)
        shard_size = label.records_per_shard(segments, manifest, settings)
        manifest = dataclasses.replace(
            manifest,
            teacher_fingerprint=teacher_fingerprint,
            content=content.hexdigest(),
            shard_size=shard_size,
        )
        with progress(
            num_tokens, f"label {split}", is_main=distributed.is_main()
        ) as advance:
            totals = label.label(
                segments,
                path,
                manifest,
                settings,
                functools.partial(
                    _place_and_run,
                    label_step(manifest.k if manifest.kind == "top_k" else None),
                    params,
                    placed,
                ),
                rows=_rows(config, model.shape),
                advance=advance,
            )
        distributed.barrier(f"label {split}")
        if distributed.is_main():
            num_shards = len(label.shards(segments, shard_size))
            cache_lib.finish(path, manifest, num_shards=num_shards)
            _print_speed(config, split, totals, model.shape)
        distributed.barrier(f"finish {split}")


def _place_and_run(
    label_step: Any, params: Any, placed: Any, batch: Any, uniforms: Any
) -> Any:
    return label_step(params, *jax.device_put((batch, uniforms), placed))


def _print_speed(
    config: Config, split: str, totals: dict[str, float], shape: Shape
) -> None:
    if not totals["seconds"]:
        return
    rows, num_tokens = _rows(config, shape), int(totals["positions"])
    length = rows.get("encoder_length", 0)
    computed = flops.forward_flops(
        shape,
        num_tokens=num_tokens,
        row_length=rows["row_length"],
        num_head_tokens=num_tokens,
        num_encoder_tokens=num_tokens * length // rows["row_length"],
        encoder_row_length=length,
    )
    peak = chips.peak_flops(jax.devices()[0])
    share = flops.mfu(
        computed,
        seconds_per_step=totals["seconds"],
        num_devices=jax.local_device_count(),
        peak=peak,
    )
    print(
        f"labelled {split}: {totals['tokens'] / totals['seconds']:.0f} target "
        f"tokens/s, {totals['positions'] / totals['seconds']:.0f} positions/s"
        + ("" if share is None else f", MFU {share:.2f}"),
        file=sys.stderr,
    )
