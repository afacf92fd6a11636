"""Installation of ov_segmentation: version ranges; the tested versions are pinned in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/ov_segmentation/__init__.py").read_text(), re.M).group(1)
DATA = ["accelerate>=1.10", "datasets>=4.0"]
EXTRAS = {
    "train": [*DATA, "pyyaml>=6.0", "scipy>=1.11", "tensorboard>=2.16"],
    "eval": [*DATA, "evaluate>=0.4.3", "scipy>=1.11"],
    "lora": ["peft>=0.17"],
    "mining": [*DATA, "textblob>=0.18"],
    "demo": [],  # inference is enough
}
EXTRAS["dev"] = [
    *sorted({package for extra in EXTRAS.values() for package in extra}),
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "ruff>=0.15",
    "scikit-learn>=1.4",
    "setuptools>=70.1",
]

setup(
    name="ov_segmentation",
    version=VERSION,
    description="Open-vocabulary semantic segmentation for Hugging Face Transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",  # setuptools asks for no classifier beside it
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"ov_segmentation": ["vocabularies/*.json", "data/*.json", "cards/*.md", "py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "huggingface_hub>=2.0",
        "jinja2>=3.1",
        "numpy>=1.26",
        "pillow>=10.1",
        "safetensors>=0.5",
        "torch>=2.6",
        "transformers>=5.23,<5.24",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ov-segment=ov_segmentation.cli:main"]},
)
