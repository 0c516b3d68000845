"""Rationales and labels written by a prompted teacher."""
