"""fastdiff: kernel-optimised training and sampling of pixel-space diffusion models."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
BESIDE = ("kernels", "configs", "datasets")

setup(
    name="fastdiff",
    version="0.1.0",
    description="Train, sample and score pixel-space diffusion models, fast",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.14",
    # These folders lie at the top of the repository and belong to the package as fastdiff.kernels and so on.
    packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), *(f"fastdiff.{name}" for name in BESIDE)],
    package_dir={"fastdiff": "fastdiff", **{f"fastdiff.{name}": name for name in BESIDE}},
    package_data={"fastdiff": ["attention_choices.json"], "fastdiff.configs": ["*.json"]},
    entry_points={"console_scripts": ["fastdiff = fastdiff.command:main"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "numpy>=1.26",
        "pillow>=10.1",
        "psutil>=5.9",
        "pydantic>=2.9",
        "safetensors>=0.4",
        "shtab>=1.9.3",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        'triton>=3.6; platform_system == "Linux"',
        'nvidia-dali-cuda130>=2.1; platform_system == "Linux"',
    ],
    extras_require={
        "demo": ["scikit-learn>=1.4"],
        "datasets": ["lmdb>=1.4"],
        "test": [
            *("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100"),
            *("diffusers>=0.35", "lmdb>=1.4", "matplotlib>=3.8", "scikit-learn>=1.4"),
        ],
        "benchmark": ["pytest-benchmark>=5", "matplotlib>=3.8"],
        "peers": ["diffusers>=0.35", "clean-fid>=0.1.35"],
        "evaluation": ["torch-fidelity>=0.4"],
        "lint": ["ruff>=0.9", "mypy>=1.14"],
    },
)
