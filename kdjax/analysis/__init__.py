"""Statistics, figures and reports of finished runs, without JAX."""
