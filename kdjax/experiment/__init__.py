"""What a Config stands for: data, models, methods, validation, working directory."""
