"""Train a super-resolution model: it enlarges images from small_size to large_size.

    deepspeed fastdiff/super_res_train.py --config configs/upsample_256.json --data_dir DIR
    python fastdiff/super_res_train.py --data_dir DIR --large_size 256 --small_size 64 --num_channels 192

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
from fastdiff.config.sections import SuperResConfig
from fastdiff.runtime.script import run_script


def main(argv: list[str] | None = None) -> None:
    config, args = load(  # the checkpoint's weights, if it read one, are dropped
        argv,
        description=__doc__ or "",
        kind=SuperResConfig,
        sections=("model", "diffusion", "data", "train"),
        checkpoint=("train", "resume_checkpoint"),
    )[:2]
    from fastdiff.training.run import train

    train(config, default_name=default_name(args.config, SuperResConfig), dry_run=args.dry_run)


if __name__ == "__main__":
    run_script(main, "super_res_train.py")
