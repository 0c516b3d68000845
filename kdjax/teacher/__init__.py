"""The teacher: labelling and the cache of its outputs."""
