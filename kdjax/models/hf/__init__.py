"""Hugging Face folders in and out."""

from kdjax.models.hf.folder import *  # noqa: F403
