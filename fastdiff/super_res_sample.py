"""Enlarge images with a super-resolution checkpoint.

    python fastdiff/super_res_sample.py --model_path runs/super_res --base_samples samples_64x64x64x3.npz

The small images come from an npz as sample.py writes it, a folder of pictures, whose names the results keep with
--save_as png, or a single picture. Writes samples_NxHxWxC.npz and a PNG grid. The same command again goes on where it
was stopped.
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
from fastdiff.config.sections import SuperResConfig
from fastdiff.runtime.script import run_script


def main(argv: list[str] | None = None) -> None:
    config, _, checkpoint = load(
        argv,
        description=__doc__ or "",
        sections=("model", "diffusion", "sample"),
        kind=SuperResConfig,
        checkpoint=("sample", "model_path"),
    )
    from fastdiff.config.checkpoint import named
    from fastdiff.ops import choose_kernels
    from fastdiff.runtime.processes import current, join
    from fastdiff.sampling.build import build_upsampler, run

    assert isinstance(config, SuperResConfig)
    settings, processes = config.sample, current()
    kernels = choose_kernels(settings.kernels, processes.device)
    sampler, base = build_upsampler(config, named(checkpoint), processes.device, processes.world_size)
    del checkpoint  # its weights are in the network
    count = settings.num_samples if "num_samples" in settings.model_fields_set else len(base)
    identity = {"base_samples": base.digest}
    note = f", enlarged from the {len(base)} in {base.path}"
    run(
        sampler,
        settings,
        join(group=False),
        notes=[*base.notes, *kernels],
        count=count,
        identity=identity,
        names=base.names,
        note=note,
    )


if __name__ == "__main__":
    run_script(main, "super_res_sample.py")
