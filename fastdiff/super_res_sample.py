"""Enlarge images with a super-resolution checkpoint.

    python fastdiff/super_res_sample.py --model_path runs/super_res --base_samples samples_64x64x64x3.npz

The small images come from an npz as sample.py writes it, or from a folder of pictures. Writes samples_NxHxWxC.npz and
a PNG grid.
"""

from __future__ import annotations

from fastdiff.config import SuperResConfig, load
from fastdiff.processes import run_script


def main(argv: list[str] | None = None) -> None:
    config, _ = load(
        argv,
        description=__doc__ or "",
        sections=("model", "diffusion", "sample"),
        kind=SuperResConfig,
        checkpoint=("sample", "model_path"),
    )
    from fastdiff.diffusion import create_diffusion
    from fastdiff.kernel_choice import choose_kernels
    from fastdiff.models import SuperResSettings
    from fastdiff.processes import current, join, make_writable, output_folder
    from fastdiff.sampling.draw import load_model
    from fastdiff.sampling.inputs import BaseImages
    from fastdiff.sampling.job import run_job
    from fastdiff.sampling.settings import SuperResSampleSettings
    from fastdiff.settings import UserError

    settings = config.sample
    assert isinstance(settings, SuperResSampleSettings)
    assert isinstance(config.model, SuperResSettings)
    if settings.classes:
        raise UserError("--classes: the labels come with the small images")
    kernels = choose_kernels(settings.kernels, current().device, settings.fused_convolutions)
    model, info = load_model(config.model, settings.model_path, settings.precision, current().device)
    base = BaseImages(settings.base_samples, config.model, info.get("class_names", []))
    count = settings.num_samples if "num_samples" in settings.model_fields_set else len(base)
    folder = make_writable(output_folder(settings.out_dir, "runs/super_res_samples"), "--out_dir")
    diffusion = create_diffusion(config.diffusion, config.model.learn_sigma)
    processes = join()
    if processes.is_main:
        print("\n".join(kernels))
    run_job(
        model,
        diffusion,
        config.model,
        settings,
        processes,
        folder,
        chosen=[],
        count=count,
        inputs=base,
        note=f", enlarged from {len(base)}",
    )


if __name__ == "__main__":
    run_script(main, "super_res_sample.py")
