"""The packages: kdjax, and configs/ as kdjax/configs; all else is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

configs = ["configs", *(f"configs.{p}" for p in find_namespace_packages("configs"))]

setup(
    packages=[
        *find_packages(include=["kdjax", "kdjax.*"]),
        *(f"kdjax.{package}" for package in configs),
    ],
    package_dir={"kdjax.configs": "configs"},
)
