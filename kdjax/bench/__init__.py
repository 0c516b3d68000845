"""Timing of training steps and their components."""
