"""Importers of other tools' teacher outputs."""
