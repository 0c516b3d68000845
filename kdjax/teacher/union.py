"""Several teacher caches as one: those of the sources of a mixture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from kdjax.teacher.cache import Manifest, Record


class CacheUnion:
    """Caches of one kind; a record is read from the first that has it."""

    def __init__(self, caches: Sequence[Any]) -> None:
        """See the class.

        Args:
          caches: `TeacherCache`s of one teacher, opened with the same properties.

        Raises:
          ValueError: their vocabularies, kinds, pairs or temperatures differ.
        """
        self._caches = list(caches)
        for cache in caches[1:]:
            for name in ("kind", "k", "vocab_size", "temperatures"):
                own, first = getattr(cache, name), getattr(caches[0], name)
                if own != first:
                    raise ValueError(
                        f"{name}={own} of {cache.folder} differs from {first} of "
                        f"{caches[0].folder}: label the sources of a mixture alike"
                    )

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the first cache."""
        return self._caches[0].manifest

    @property
    def kind(self) -> str:
        """One of "top_k", "sampled" and "dense"."""
        return self._caches[0].kind

    @property
    def k(self) -> int:
        """Pairs per target token; dense: vocab_size; sampled: draws per round."""
        return self._caches[0].k

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the teacher."""
        return self._caches[0].vocab_size

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures with exact log_z and entropy, in the order of their columns."""
        return self._caches[0].temperatures

    def has(self, key: bytes) -> bool:
        """Return True if there is a record for this 16-byte content key."""
        return any(cache.has(key) for cache in self._caches)

    def contains(self, keys: UInt8[np.ndarray, "N 16"]) -> Bool[np.ndarray, " N"]:
        """Return True for each key that has a record."""
        return np.logical_or.reduce([cache.contains(keys) for cache in self._caches])

    def read(self, key: bytes) -> Record:
        """Return the record of a key.

        Raises:
          ValueError: no such record, or it is damaged (naming file and record).
        """
        for cache in self._caches:
            if cache.has(key):
                return cache.read(key)
        return self._caches[0].read(key)  # its error
