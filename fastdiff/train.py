"""Train a diffusion model on a folder of images.

    deepspeed fastdiff/train.py --config configs/cifar10_uncond.json --data_dir DIR
    python fastdiff/train.py --data_dir DIR --image_size 64 --num_channels 128 --lr 1e-4 --batch_size 128

Starts under deepspeed, torchrun or plain python. The same command again resumes the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastdiff.errors import leave_quietly_on_ctrl_c

if __name__ == "__main__":
    leave_quietly_on_ctrl_c()  # before the slow imports

from fastdiff.config.load import default_name, load
from fastdiff.config.sections import Config
from fastdiff.runtime.script import run_script


def main(argv: list[str] | None = None) -> None:
    config, args = load(  # the checkpoint's weights, if it read one, are dropped
        argv,
        description=__doc__ or "",
        sections=("model", "diffusion", "data", "train"),
        checkpoint=("train", "resume_checkpoint"),
    )[:2]
    from fastdiff.training.run import train

    train(config, default_name=default_name(args.config, Config), dry_run=args.dry_run)


if __name__ == "__main__":
    run_script(main, "train.py")
