"""Write scikit-learn's handwritten digits as 16x16 gray PNG files, CLASS_NUMBER.png, into train/ and test/.

    python datasets/digits.py --out .demo/digits

1797 real scans of 8x8 pixels (UCI, Alpaydin & Kaynak 1998), enlarged bicubically; every tenth goes to test/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for train/ and test/")
    out = parser.parse_args().out
    from sklearn.datasets import load_digits

    digits = load_digits()
    for part in ("train", "test"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        picture = Image.fromarray(np.clip(pixels * 16, 0, 255).astype(np.uint8))
        target = out / ("test" if i % 10 == 0 else "train") / f"{label}_{i:04d}.png"
        partial = target.with_suffix(".partial")
        picture.resize((16, 16), Image.Resampling.BICUBIC).save(partial, format="PNG")
        partial.replace(target)
    print(f"{len(digits.images)} digits in {out}")


if __name__ == "__main__":
    main()
