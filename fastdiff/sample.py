"""Draw images from a checkpoint.

    python fastdiff/sample.py --model_path runs/NAME --num_samples 64 --use_ddim True --timestep_respacing ddim50
    torchrun --nproc_per_node 8 fastdiff/sample.py --model_path ema_0.9999_500000.pt $MODEL_FLAGS $DIFFUSION_FLAGS

Writes samples_NxHxWxC.npz (arr_0 images, arr_1 labels) and a PNG grid. A checkpoint of fastdiff needs no flags.
"""

from __future__ import annotations

from fastdiff.config import load
from fastdiff.processes import run_script


def main(argv: list[str] | None = None) -> None:
    config, _ = load(
        argv,
        description=__doc__ or "",
        sections=("model", "diffusion", "sample"),
        checkpoint=("sample", "model_path"),
    )
    from fastdiff.diffusion import create_diffusion
    from fastdiff.kernel_choice import choose_kernels
    from fastdiff.processes import current, join, make_writable, output_folder
    from fastdiff.sampling.draw import class_labels, load_model
    from fastdiff.sampling.job import run_job
    from fastdiff.settings import UserError

    settings = config.sample
    kernels = choose_kernels(settings.kernels, current().device, settings.fused_convolutions)
    model, info = load_model(config.model, settings.model_path, settings.precision, current().device)
    if settings.classes and not config.model.class_cond:
        raise UserError("--classes: the model is not class-conditional")
    # A model with room for 1000 classes, trained on 10, only knows those.
    known = len(info.get("class_names", [])) or config.model.num_classes
    chosen = class_labels(settings.classes, info.get("class_names", []), known)
    folder = make_writable(output_folder(settings.out_dir, "runs/samples"), "--out_dir")
    diffusion = create_diffusion(config.diffusion, config.model.learn_sigma)
    model_settings = config.model.model_copy(update={"num_classes": known})
    processes = join()
    if processes.is_main:
        print("\n".join(kernels))
    run_job(
        model,
        diffusion,
        model_settings,
        settings,
        processes,
        folder,
        chosen=chosen,
        count=settings.num_samples,
    )


if __name__ == "__main__":
    run_script(main, "sample.py")
