"""Write a network for another program, or read one of diffusers.

    python fastdiff/convert.py --model_path runs/NAME --to diffusers FOLDER
    python fastdiff/convert.py --preset cifar10_uncond --to safetensors net.safetensors
    python fastdiff/convert.py --model_path runs/NAME --to openai net.pt
    python fastdiff/convert.py --model_path FOLDER_OF_DIFFUSERS --to pt net.pt

A folder receives a model card as well, in the layout of the Hugging Face hub. Every bit of the weights is kept, but for
--half True. What the other program can't express is refused, with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastdiff.errors import leave_quietly_on_ctrl_c

if __name__ == "__main__":
    leave_quietly_on_ctrl_c()  # before the slow imports

from fastdiff.config.load import load
from fastdiff.config.sections import ClassifierConfig, Config, SuperResConfig
from fastdiff.runtime.script import run_script


def main(argv: list[str] | None = None) -> None:
    from fastdiff.config.checkpoint import named
    from fastdiff.conversion.convert import convert, open_source

    source, kind = open_source(sys.argv[1:] if argv is None else argv)
    config, _, checkpoint = load(
        argv,
        description=__doc__ or "",
        sections=("convert", "model", "diffusion"),
        kind={"super_res": SuperResConfig, "classifier": ClassifierConfig}.get(kind, Config),
        checkpoint=("convert", "model_path"),
        opened=source,
    )
    print("\n".join(convert(config, named(checkpoint))))


if __name__ == "__main__":
    run_script(main, "convert.py")
