"""Divergences, losses against stored teachers, and the fused head."""
