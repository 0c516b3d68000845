"""Decoders, T5, adapters, decoding and FLOPs."""
