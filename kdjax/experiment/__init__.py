"""From a Config: data, models, methods, validation and working directory."""
