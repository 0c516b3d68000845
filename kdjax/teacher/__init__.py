"""The teacher cache: labelling, storage, verification, import and export."""

from kdjax.teacher.cache import (
    DamagedShardError,
    Manifest,
    Record,
    TeacherCache,
    load_cache,
    verify,
)

__all__ = [
    "DamagedShardError",
    "Manifest",
    "Record",
    "TeacherCache",
    "load_cache",
    "verify",
]
