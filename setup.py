"""Package metadata: dependencies and extras."""

import pathlib
import re

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
version = re.search(
    r'__version__ = "(.+)"', (root / "kdjax" / "__init__.py").read_text()
).group(1)

annotate = ["openai>=2.0"]
compare = [  # statistics and figures of kdjax.analysis
    "matplotlib>=3.9",
    "pandas>=2.2",
    "scikit-posthocs>=0.11",
    "scipy>=1.14",
    "statsmodels>=0.14.4",
]
test = [
    *compare,
    *annotate,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "filelock>=3.12",  # runs that workers share
    "beartype>=0.19",
    "tensorboard>=2.18",
    "tensorflow-datasets>=4.9",
]

setup(
    name="kdjax",
    version=version,
    description="Distils language models in JAX against precomputed teacher outputs",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["kdjax", "kdjax.*"]),
    package_data={
        "kdjax.analysis": ["*.jinja"],
        "kdjax.teacher": ["prompt_files/*"],
    },
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.6",
        "datasets>=3.0",
        "flax>=0.12",
        "grain>=0.2.10",
        "jax>=0.8",
        "jinja2>=3.1",
        "jaxtyping>=0.2.36",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "pyarrow>=17",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "tensorboardX>=2.6",
        "tokenizers>=0.21",
        "transformers>=5.0",
        "zstandard>=0.23",
    ],
    extras_require={
        "test": test,
        # Reference models for the tests; on a machine without a GPU use torch's own
        # CPU index, the default wheel brings several GB of CUDA libraries.
        "reference": ["torch>=2.6"],
        "dev": [
            *test,
            "ruff>=0.9",
            "codespell>=2.3",
            "mypy>=1.15",
            "pre-commit>=4",
            "transformers[serving]>=5.0",  # a server for the real-data tests; has torch
        ],
        "annotate": annotate,  # kdjax.annotate asks a server
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "peers": ["torch>=2.6", "trl>=1.0"],
        "plan": ["jax[tpu]"],  # compiles for TPU slices, also where there is none
        "tfds": ["tensorflow-datasets>=4.9"],
        "compare": compare,
    },
)
