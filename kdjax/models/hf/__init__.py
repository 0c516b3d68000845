"""Hugging Face folders in and out."""

from kdjax.models.hf.folder import (
    eos_ids,
    fingerprint,
    has_weights,
    join,
    load_params,
    read_config,
    resolve,
    save,
    stored_shapes,
)

__all__ = [
    "eos_ids",
    "fingerprint",
    "has_weights",
    "join",
    "load_params",
    "read_config",
    "resolve",
    "save",
    "stored_shapes",
]
