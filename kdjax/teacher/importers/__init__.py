"""Other tools' teacher outputs, read as records."""
