"""Packaging of smart_fairseq; the tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    for line in (HERE / "smart_fairseq" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("smart_fairseq/__init__.py names no __version__")


setup(
    name="smart_fairseq",
    version=version(),
    description="SMART fine-tuning (Jiang et al., ACL 2020) as a plugin for fairseq",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["smart_fairseq", "smart_fairseq.*"]),
    python_requires=">=3.8",
    install_requires=[
        # the original does not import on Python 3.11; fairseq-fixed is its last
        # state with the changes that newer Pythons need, under the same module name
        'fairseq-fixed==0.12.3.1; python_version >= "3.11"',
        'fairseq==0.12.2; python_version < "3.11"',
        "torch>=2.0",
        "numpy",
        "scikit-learn",
        "scipy",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "plot": ["matplotlib"],  # the picture of examples/glue/agreement.py
        "dev": ["matplotlib", "pytest", "ruff==0.17.5", "mypy==2.4.1"],
    },
)
