"""Writes scikit-learn's handwritten digits as 16x16 gray PNG files, CLASS_NUMBER.png, into train/ and test/.

    python datasets/digits.py --out .demo/digits

They are 1797 scans of 8x8 pixels (UCI, Alpaydin & Kaynak 1998), enlarged bicubically; every tenth goes to test/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from fastdiff.datasets.preparation_cli import Parser, given_path, run
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.runtime.files import atomic_write


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=given_path, help="folder for train/ and test/")
    out = parser.parse_args().out
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits are scikit-learn's; install it with: pip install scikit-learn") from None

    digits = load_digits()
    for part in ("train", "test"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        picture = Image.fromarray(np.clip(pixels * 16, 0, 255).astype(np.uint8))
        target = out / ("test" if i % 10 == 0 else "train") / f"{label}_{i:04d}.png"
        with atomic_write(target, sync=False) as file:
            picture.resize((16, 16), Image.Resampling.BICUBIC).save(file, format="PNG")
    print(f"{len(digits.images)} digits in {out}")


if __name__ == "__main__":
    run(main)
