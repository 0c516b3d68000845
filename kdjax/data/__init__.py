"""Examples, views, tokens, packed rows and batches."""
