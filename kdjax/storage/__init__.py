"""Folders in object stores: gs:// and s3://, mirrored from a local disk."""
