"""Process-level utilities: files, console output, metrics, malloc, chip peaks."""
