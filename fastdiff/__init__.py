"""fastdiff: train, sample and score pixel-space diffusion models."""

from pathlib import Path

__version__ = "0.1.0"

_package = Path(__file__).resolve().parent
if not (_package / "kernels").is_dir():  # a checkout: kernels/ lies beside this package, not inside it
    __path__.append(str(_package.parent))
