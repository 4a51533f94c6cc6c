"""Draw images from a checkpoint.

    python fastdiff/sample.py --model_path runs/NAME --num_samples 64 --solver dpmpp_2m --steps 20
    torchrun --nproc_per_node 8 fastdiff/sample.py --model_path ema_0.9999_500000.pt --preset cifar10_uncond \\
        --num_samples 50000 --batch_size auto --precision bf16 --out_dir runs/fid
    python fastdiff/sample.py --model_path runs/base --classifier_path runs/classifier --classifier_scale 2
    python fastdiff/sample.py --model_path runs/base --sr_model_path runs/super_res --num_samples 64

Writes samples_NxHxWxC.npz (arr_0 images, arr_1 labels, seed, index) and a PNG grid. The same command again goes on
where it was stopped, and several of them share a job. A checkpoint of fastdiff needs no flags.
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
from fastdiff.runtime.script import run_script


def main(argv: list[str] | None = None) -> None:
    config, _, checkpoint = load(
        argv,
        description=__doc__ or "",
        sections=("model", "diffusion", "classifier", "sample"),
        checkpoint=("sample", "model_path"),
    )
    from fastdiff.config.checkpoint import named
    from fastdiff.ops import choose_kernels
    from fastdiff.runtime.processes import current, join
    from fastdiff.sampling.build import build_sampler, run

    settings, processes = config.sample, current()
    kernels = choose_kernels(settings.kernels, processes.device)
    share = -(-settings.num_samples // processes.world_size)
    sampler = build_sampler(config, named(checkpoint), processes.device, count=share)
    del checkpoint  # its weights are in the network
    run(sampler, settings, join(group=False), notes=kernels, count=settings.num_samples)


if __name__ == "__main__":
    run_script(main, "sample.py")
