"""The teacher cache: labelling, storage, verification, import and export."""
