"""Score images by a checkpoint: the variational bound on their likelihood, in bits per dimension.

    python fastdiff/nll.py --model_path runs/NAME --data_dir DIR --num_samples 1000 --batch_size 16

Writes vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz (means per timestep, the largest first). The same command
again goes on where it was stopped.
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
        sections=("model", "diffusion", "data", "nll"),
        checkpoint=("nll", "model_path"),
    )
    from fastdiff.config.checkpoint import named, open_network
    from fastdiff.diffusion import create_diffusion
    from fastdiff.errors import INTERRUPTED, StopWith, UserError, blaming
    from fastdiff.images.labels import check_classes, describe_classes
    from fastdiff.images.open import open_images
    from fastdiff.images.unreadable import STEM, naming_all
    from fastdiff.models.settings import as_before
    from fastdiff.ops import choose_kernels
    from fastdiff.runtime.machine import tf32
    from fastdiff.runtime.processes import current, join, make_writable, output_folder
    from fastdiff.scoring import Kept, NonFiniteBound, save_terms, score

    settings = config.nll
    processes = current()
    if not config.data.data_dir:
        raise UserError("--data_dir is missing: give the folder of images to score")
    chosen = choose_kernels(settings.kernels, processes.device)
    with blaming("--model_path"):
        frozen = settings.kernels != "reference"
        network = open_network(
            config.model, config.diffusion, named(checkpoint), settings.precision, processes.device, frozen
        )
    del checkpoint  # its weights are in the network
    loader = open_images(
        config.data,
        size_hw=config.model.size_hw,
        channels=config.model.in_channels,
        batch_size=settings.batch_size * processes.world_size,
        rank=processes.rank,
        world_size=processes.world_size,
        device=processes.device,
        class_cond=config.model.class_cond,
        class_names=network.class_names or None,
        limit=settings.num_samples,
    )
    if config.model.class_cond:
        check_classes(loader.listing, network.class_names, config.model.num_classes)
        chosen = [describe_classes(loader.listing), *chosen]
    with blaming("--out_dir"):
        folder = make_writable(output_folder(settings.out_dir, "runs/nll"))
    diffusion = create_diffusion(config.diffusion, config.model.learn_sigma)
    processes = join()
    if processes.is_main:
        print("\n".join(chosen))
    describes = config.model_dump(mode="json", include={"model", "diffusion", "data", "nll"})
    describes["model"] = as_before(describes["model"])
    describes |= {"checkpoint": network.digest, "listing": loader.state_dict()}
    kept = Kept(folder, processes, describes)
    try:
        with tf32(settings.allow_tf32), naming_all(folder / STEM):
            totals, terms = score(
                network.model,
                diffusion,
                loader,
                processes,
                class_cond=config.model.class_cond,
                clip_denoised=settings.clip_denoised,
                seed=settings.seed,
                kept=kept,
            )
    except NonFiniteBound as error:
        kept.path.unlink(missing_ok=True)
        advice = "" if settings.precision == "fp32" else ", or --precision fp32"
        raise UserError(
            f"--model_path: {error}, and nothing is written; try another checkpoint or average of its weights{advice}"
        ) from None
    except KeyboardInterrupt:
        share = f"{-(-loader.num_images // processes.world_size)} images{' of rank 0' * (processes.world_size > 1)}"
        rest = f"{kept.done} of {share} are scored, and the same command goes on with the others"
        reason = f"stopped by Ctrl-C; {rest if kept.done else 'the same command starts again'}"
        raise StopWith(INTERRUPTED, reason) from None
    if processes.is_main:
        files = save_terms(folder, terms)
        print(f"{len(totals)} images: {totals.mean():.4f} bits/dim (standard error {_standard_error(totals):.4f})")
        print(f"terms per timestep in {', '.join(map(str, files))}")
    kept.path.unlink(missing_ok=True)
    loader.close()


def _standard_error(values) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    run_script(main, "nll.py")
