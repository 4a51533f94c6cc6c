"""Every setting with which a run takes CUDA graphs by itself can be captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.small_trainer import small_trainer

from fastdiff.training.device_step import WARM_UP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "fp16, clipped": {"precision": "fp16", "grad_clip": 1.0},
    "tf32": {"allow_tf32": True},
    "rates and moments": {"ema_rate": "0.9,0.99,0.999", "weight_decay": 0.1},
    "learning rate": {"lr_warmup_steps": 3, "lr_anneal_steps": 100},
    "importance": {"schedule_sampler": "loss-second-moment"},
    "one micro-batch": {"microbatch": -1},
    "compiled": {"compile": True},
    "compiled, recomputed": {"compile": True, "model": {"use_checkpoint": True}},
    "recomputed": {"model": {"use_checkpoint": True}},
    "PyTorch only": {"kernels": "reference"},
    "classes, guidance": {"model": {"class_cond": True, "num_classes": 2, "null_class": True}, "label_dropout": 0.5},
    "added embedding": {"model": {"use_scale_shift_norm": False}},
    "fixed variance": {"model": {"learn_sigma": False}, "diffusion": {"sigma_small": True}},
    "bound": {"diffusion": {"use_kl": True}},
    "x_start": {"diffusion": {"predict_xstart": True, "rescale_learned_sigmas": True}},
    "min-snr": {"diffusion": {"min_snr_gamma": 5.0, "rescale_timesteps": True}},
    "super-resolution": {"model": {"large_size": 16, "small_size": 8}},
    "gray": {"model": {"in_channels": 1}},
    "ZeRO 1": {"zero_stage": 1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_can_be_captured_gpu(settings: dict[str, Any]) -> None:
    trainer = small_trainer(**{**settings, "cuda_graph": True})
    for _ in range(WARM_UP + 2):
        trainer.take_step()
    assert trainer.stepper._graphs.enabled
    assert torch.isfinite(torch.tensor(trainer.read_metrics()["loss"]))
