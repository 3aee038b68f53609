import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: importing the package needs what is about to be installed.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "tapo_jax" / "__init__.py").read_text(encoding="utf-8"), re.M)[1]

setup(
    name="tapo_jax",
    version=VERSION,
    description="TAPO: reinforcement learning of vision-language agents that use tools, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["tapo_jax", "tapo_jax.*"]),
    # The tiny model that ships with the package, a directory in Hugging Face form; page templates; types for checkers.
    package_data={
        "tapo_jax": [
            "py.typed",
            "*/*.pyi",
            "cold_start/*/*.json",
            "cold_start/*/*.safetensors",
            "cold_start/*/*.jinja",
            "cold_start/*/*.txt",
            "viewer/*.html",
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.0,<0.13",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6",  # tensorflow-datasets imports it and does not ask for it
        "array_record>=0.8.3",
        "grain>=0.2.15,<0.3",
        "transformers>=5.0,<6",
        "tokenizers>=0.22,<0.24",
        "ml-collections>=1.0",
        "absl-py>=2.1",
        "lazy_loader>=0.4",
        "bm25s>=0.2.14",
        "countryinfo>=1.0,<2",
        "numpy>=2.0",
        "ml_dtypes>=0.5",
        "scipy>=1.14",
        "pillow>=11.0",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "rich>=13",
        "tensorboardX>=2.6.2",
        "httpx>=0.27",
        "httpcore>=1.0,<2",
        "jsonschema>=4.23,<5",
        "pyyaml>=6",
        "referencing>=0.35",  # jsonschema looks references up with it
    ],
    extras_require={
        "cpu": [],  # plain jax runs on the CPU
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"],
        "colab": ["ipykernel", "nbformat"],
        "parquet": ["pyarrow>=17"],  # published data sets; arrays that carry code are refused since 14.0.1
        "mcp": ["mcp>=2.3,<3"],  # tools.mcp: tools of MCP servers
        "serve": ["starlette>=0.46,<2", "uvicorn>=0.34,<1"],  # launch/retrieval_server.py
        "web": [  # tools.backend="ddgs", and the tool "visit"
            "ddgs>=9.6,<10",
            "trafilatura>=2,<3",
            "lxml_html_clean>=0.4",  # trafilatura needs it and gets it only through an extra of lxml
        ],
        "test": [
            "ddgs>=9.6,<10",
            "trafilatura>=2,<3",
            "lxml_html_clean>=0.4",
            "starlette>=0.46,<2",
            "uvicorn>=0.34,<1",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "pyarrow>=17",
            "mcp>=2.3,<3",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel",
            "peft>=0.18",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<2.5",
            "safetensors>=0.6",
            "torch==2.13.0",  # what depends on torch (peft) has to take this one
        ],
    },
)
