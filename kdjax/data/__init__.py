"""Examples, views, tokens, packing and batches."""
