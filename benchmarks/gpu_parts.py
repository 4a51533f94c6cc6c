"""The parts of benchmarks/gpu_proof.py, in order of value: the correctness of results, then the most valuable figures.

With `tiny` every part runs on any machine in seconds, which shows that the parts themselves work. Its networks and
inputs are so small that their figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.proof_checks import CIFAR10, chaos, golden, gpu_tests, kernels, machine, same_losses, sanitizer, train
from benchmarks.proof_part import Part
from benchmarks.proof_speed import (
    dali,
    evaluation,
    figures,
    from_files,
    in_one_go,
    levers,
    other_kernels,
    saving,
    throughput,
)

IMAGENET64 = "imagenet64_270M"


def _train(name: str, seconds: float, config: str, batches: Sequence[int], variant: str, **more: Any) -> Part:
    return Part(name, seconds, throughput(config, batches, variant, **more))


def _draw(name: str, seconds: float, config: str, batch: int, variant: str, **more: Any) -> Part:
    return Part(f"draw {name}", seconds, throughput(config, [batch], variant, draw=True, **more))


# Max-autotune compiles and times candidates for minutes, on the GPU itself: those parts come last.
# The reference keeps 356 MB of activations per image of the 270M network, so that 128 need not fit in 80 GB.
PARTS = (
    Part("machine", 15, machine),
    Part("kernels", 120, kernels, alone=False),
    Part("train", 90, train, alone=False),
    _train("cifar10 ours", 25, CIFAR10, [256], "ours", profile=True),
    _train("cifar10 ours plain", 25, CIFAR10, [256], "ours -cuda graph"),
    _train("270M ours", 40, IMAGENET64, [128], "ours", profile=True),
    _train("270M reference", 30, IMAGENET64, [128, 64], "reference"),
    _train("270M reference compiled", 45, IMAGENET64, [128, 64], "reference+compile", profile=True),
    _train("cifar10 reference", 15, CIFAR10, [256], "reference"),
    _train("cifar10 reference compiled", 30, CIFAR10, [256], "reference+compile"),
    _draw("270M ours", 30, IMAGENET64, 256, "ours", profile=True),
    _draw("270M reference", 25, IMAGENET64, 256, "reference"),
    Part("golden", 40, golden, alone=False),
    Part("same losses", 30, same_losses, alone=False),
    figures("norms", 70),
    _train("270M diffusers", 45, IMAGENET64, [128, 64], "diffusers"),
    _train("cifar10 reference channels-last", 15, CIFAR10, [256], "reference+channels-last"),
    _train("270M reference channels-last", 30, IMAGENET64, [128, 64], "reference+channels-last"),
    _train("270M ours plain", 40, IMAGENET64, [128], "ours -cuda graph"),
    figures("convolutions", 50),
    _draw("270M diffusers", 35, IMAGENET64, 256, "diffusers"),
    _draw("cifar10 ours", 25, CIFAR10, 512, "ours"),
    _draw("cifar10 reference", 20, CIFAR10, 512, "reference"),
    _train("cifar10 diffusers", 30, CIFAR10, [256], "diffusers"),
    _train("270M ours fp16", 40, IMAGENET64, [128], "ours", precision="fp16"),
    _train("cifar10 ours fp16", 25, CIFAR10, [256], "ours", precision="fp16"),
    figures("attention", 50),
    Part("gpu tests", 100, gpu_tests, alone=False),
    Part("sanitizer", 90, sanitizer, alone=False),
    Part("chaos", 90, chaos, alone=False),
    Part("other kernels", 60, other_kernels),
    Part("saving", 60, saving),
    Part("dali", 60, dali),
    Part("evaluation", 120, evaluation),
    Part("cifar10 from files", 45, from_files(CIFAR10, 256)),
    _draw("270M reference compiled", 35, IMAGENET64, 256, "reference+compile"),
    _draw("270M reference channels-last", 25, IMAGENET64, 256, "reference+channels-last"),
    _draw("cifar10 reference compiled", 25, CIFAR10, 512, "reference+compile"),
    _draw("270M ours one", 20, IMAGENET64, 1, "ours"),
    _draw("270M reference one", 15, IMAGENET64, 1, "reference"),
    _draw("270M ours sixteen", 20, IMAGENET64, 16, "ours"),
    _draw("270M reference sixteen", 15, IMAGENET64, 16, "reference"),
    _train("uncond ours", 40, "imagenet64_uncond", [128], "ours"),
    _train("uncond reference", 25, "imagenet64_uncond", [128, 64], "reference"),
    _train("lsun ours", 40, "lsun_bedroom_lr1e-4", [32], "ours"),
    _train("lsun reference", 30, "lsun_bedroom_lr1e-4", [32, 16, 8], "reference"),
    _train("upsample ours", 45, "upsample_256", [16], "ours"),
    _train("upsample reference", 35, "upsample_256", [16, 8, 4], "reference"),
    _train("guided64 ours", 50, "64x64_diffusion", [64], "ours", profile=True),
    Part("cifar10 in one go", 90, in_one_go(CIFAR10, 256)),
    Part("270M in one go", 105, in_one_go(IMAGENET64, 128)),
    _train("cifar10 reference max-autotune", 600, CIFAR10, [256], "reference+max-autotune"),
    _train("cifar10 diffusers max-autotune", 600, CIFAR10, [256], "diffusers+max-autotune"),
    Part("levers", 420, levers("imagenet64_uncond", 128)),
    _train("270M reference max-autotune", 900, IMAGENET64, [128, 64], "reference+max-autotune"),
    _draw("270M reference max-autotune", 600, IMAGENET64, 256, "reference+max-autotune"),
)
