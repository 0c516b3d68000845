"""Whole experiments, stage by stage, and their finished students."""
