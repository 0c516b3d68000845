"""Fields of a config that a resumed run may change, and those it may not."""

from kdjax.config import Config, leaves

# Fields that change neither the numbers of a run nor what a checkpoint holds.
_FREE = (
    "data.prepared",
    "data.num_workers",
    "mesh.",
    "distributed.",
    "storage.",
    "evaluation.",
    "annotate.",
    "cache.path",
    "mixture.caches",
    "cache.shard_size",
    "cache.shard_mib",
    "cache.num_threads",
    "cache.batch_size",
    "cache.row_length",
    "cache.encoder_row_length",
    "cache.chunk_size",
    "cache.memory_mib",
    "train.num_microbatches",
    "train.chunk_size",
    "train.memory_mib",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_last",
    "train.keep_best",
    "train.non_finite",
    "train.num_threads",
    "train.prefetch",
)


# Fields of which "auto" stands for what the data is seen to be.
_SEEN = ("data.source", "data.schema")


def differences(old: Config, new: Config) -> list[str]:
    """List the fields that a resumed run may not change, as "field: old -> new"."""
    before, after = ({leaf.path: leaf.value for leaf in leaves(c)} for c in (old, new))
    return [
        f"{name}: {before[name]!r} -> {after[name]!r}"
        for name in before
        if before[name] != after[name]
        and not name.startswith(_FREE)
        and not (name in _SEEN and "auto" in (before[name], after[name]))
    ]
