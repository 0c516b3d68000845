"""Held-out measures of models and of their explanations."""
