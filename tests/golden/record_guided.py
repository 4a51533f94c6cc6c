"""Records the cases guided_* from guided-diffusion's own modules, on a CPU in float32.

    git clone https://github.com/openai/guided-diffusion
    python tests/golden/record_guided.py guided-diffusion

writes the folders beside this file, or under --out. The same commit and the same version of PyTorch give the same
numbers. The commit recorded is 22e0df8. The modules need PyTorch, NumPy and Pillow; blobfile and mpi4py, which only
their training uses, are replaced by empty modules. The file has one function for each kind of case, hence its length.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from recording import Arithmetic, Result, normal, randomise, record
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

FAMILY = {"family": "guided"}
GRADIENT_OF = "gradient of out_loss with respect to the parameter of that state_dict key"
# Parameters whose gradients are stored, where a network has them. Others are compared by the norms of their gradients.
STORED_GRADIENTS = (
    "time_embed.0.bias",
    "time_embed.2.bias",
    "label_emb.weight",
    "input_blocks.0.0.weight",
    "input_blocks.1.0.in_layers.0.weight",
    "input_blocks.2.0.op.bias",
    "input_blocks.2.0.in_layers.0.weight",
    "input_blocks.2.0.out_layers.3.bias",
    "input_blocks.3.0.emb_layers.1.bias",
    "input_blocks.3.1.qkv.bias",
    "middle_block.1.norm.bias",
    "middle_block.1.qkv.bias",
    "output_blocks.0.0.skip_connection.bias",
    "output_blocks.0.1.qkv.bias",
    "output_blocks.1.1.in_layers.0.weight",
    "output_blocks.1.2.in_layers.0.weight",
    "output_blocks.1.2.out_layers.3.bias",
    "output_blocks.1.2.conv.bias",
    "out.0.weight",
    "out.0.bias",
    "out.1.weight",
    "out.2.weight",
    "out.2.bias",
    "out.2.positional_embedding",
    "out.2.qkv_proj.bias",
    "out.2.c_proj.bias",
    "out.3.weight",
    "out.3.bias",
)
LARGEST_STORED = 4000  # entries of a gradient
UNET = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "dropout": 0.0,
    "channel_mult": [1, 2],
    "conv_resample": True,
    "dims": 2,
    "num_classes": None,
    "use_checkpoint": False,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
# As create_classifier gives them, but for a smaller picture and fewer classes.
CLASSIFIER = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 10,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 4],
    "channel_mult": [1, 2, 2],
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "pool": "attention",
}
DIFFUSION = {
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "5",
    "learn_sigma": True,
    "sigma_small": False,
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}


def import_original(checkout: Path) -> None:
    """Make guided_diffusion importable from a checkout."""
    for name in ("blobfile", "mpi4py"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["mpi4py"].MPI = None
    sys.path.insert(0, str(checkout))


def build(spec: dict[str, Any]) -> nn.Module:
    """Return the original's network for a builder's name with its flags or constructor arguments."""
    from guided_diffusion import script_util, unet

    if "flags" not in spec:
        kwargs = spec["kwargs"]
        needs_size = {} if "image_size" in kwargs else {"image_size": 0}  # a UNet only remembers it
        return getattr(unet, spec["builder"])(**needs_size, **kwargs)
    made = getattr(script_util, spec["builder"])(**spec["flags"])
    return made[0] if isinstance(made, tuple) else made


def record_unet(
    folder: Path,
    seed: int,
    description: str,
    spec: dict[str, Any],
    hw: tuple[int, int],
    *,
    batch: int = 2,
    low_res: tuple[int, int] | None = None,
    small: bool = False,
    stride: int = 1,
) -> None:
    """Record outputs and gradients of a UNet; `small` adds an input whose variances are near the norms' epsilon."""
    generator = torch.Generator().manual_seed(seed)
    model = build(spec)
    state = randomise(model, generator)
    labels = getattr(model, "num_classes", None)
    inputs = {
        "x": (normal(generator, batch, 3, *hw), "model input, NCHW"),
        "t_int": (torch.randint(1000, (batch,), generator=generator), "integer timesteps, one per image"),
        "t_frac": (1000 * torch.rand(batch, generator=generator), "fractional float timesteps, one per image"),
    }
    if small:
        text = "a second input of very small amplitude: the first group norms then see variances near their epsilon"
        inputs["x_small"] = normal(generator, batch, 3, *hw) / 50, text
    if labels:
        inputs["y"] = torch.randint(labels, (batch,), generator=generator), "class labels"
    if low_res:
        inputs["low_res"] = normal(generator, batch, 3, *low_res), "low-resolution conditioning images"
    text = "R in the scalar loss sum(R * model(in_x, in_t_frac))"
    inputs["loss_weight"] = normal(generator, batch, model.out_channels, *hw), text

    def compute(arithmetic: Arithmetic) -> dict[str, Result]:
        network = arithmetic.network(model)
        given = {name: arithmetic.tensor(value) for name, (value, _) in inputs.items()}
        extra = {name: given[name] for name in ("y", "low_res") if name in given}
        results = {}
        with torch.no_grad():
            results["int"] = Result(network(given["x"], given["t_int"], **extra), "model(in_x, in_t_int)")
            if small:
                out = network(given["x_small"], given["t_frac"], **extra)
                results["small"] = Result(out, "model(in_x_small, in_t_frac)")
        x = given["x"].requires_grad_()
        out = network(x, given["t_frac"], **extra)
        results["frac"] = Result(out, "model(in_x, in_t_frac)")
        loss = (given["loss_weight"] * out).sum()
        text = "sum(in_loss_weight * out_frac), before any thinning of out_frac"
        results["loss"] = Result(loss, text, "element")
        loss.backward()
        results["grad_x"] = Result(x.grad, "gradient of out_loss with respect to in_x", "all")
        for name in {"int", "frac", "grad_x"} if stride > 1 else ():
            results[name] = results[name]._replace(value=results[name].value[..., ::stride, ::stride])
        return results | gradients(network)

    config = {"model": {**FAMILY, **spec}, "image_hw": list(hw), "batch": batch, "grad_params": stored_gradients(model)}
    record(
        folder,
        kind="unet_forward",
        description=description,
        seed=seed,
        config=config | ({"store_stride": stride} if stride > 1 else {}),
        compute=compute,
        inputs=inputs,
        weights={"weights.pt": (state, "state_dict of the model")},
        expected={"grad_norms_order": [name for name, _ in model.named_parameters()]},
    )


def stored_gradients(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradients are stored whole."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return [name for name in STORED_GRADIENTS if sizes.get(name, LARGEST_STORED) < LARGEST_STORED]


def gradients(network: nn.Module) -> dict[str, Result]:
    """Return gradients after a backward pass: those of some parameters, and the norms of all."""
    parameters = dict(network.named_parameters())
    results = {f"grad__{name}": Result(parameters[name].grad, GRADIENT_OF, "all") for name in stored_gradients(network)}
    norms = [parameter.grad.double().norm().item() for parameter in parameters.values()]
    text = "L2 norm of the gradient of out_loss for every parameter, in the order of expected.grad_norms_order"
    return results | {"grad_norms": Result(norms, text, "element")}


def log_prob_gradient(classifier: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(y | x_t) [B] and its gradient by x_t [B, C, H, W]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        chosen = F.log_softmax(classifier(x, t), dim=-1).gather(1, y[:, None])[:, 0]
        return chosen.detach(), torch.autograd.grad(chosen.sum(), x)[0]


def record_classifier(folder: Path, seed: int, description: str, spec: dict[str, Any], batch: int, stride: int) -> None:
    """Record logits of a classifier and the gradients of log p(y | x_t) and of the cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    model = build(spec)
    state = randomise(model, generator)
    size, classes = spec.get("kwargs", spec.get("flags"))["image_size"], model.out_channels
    inputs = {
        "x": (normal(generator, batch, 3, size, size), "noised images x_t, NCHW"),
        "t_int": (torch.randint(1000, (batch,), generator=generator), "integer timesteps, one per image"),
        "t_frac": (1000 * torch.rand(batch, generator=generator), "fractional float timesteps, one per image"),
        "y": (torch.randint(classes, (batch,), generator=generator), "class labels"),
    }

    def compute(arithmetic: Arithmetic) -> dict[str, Result]:
        network = arithmetic.network(model)
        x, t_int, t_frac, y = (arithmetic.tensor(value) for value, _ in inputs.values())
        with torch.no_grad():
            results = {"int": Result(network(x, t_int), "logits for (in_x, in_t_int)")}
        chosen, gradient = log_prob_gradient(network, x, t_frac, y)
        results["log_prob"] = Result(chosen, "log p(in_y | in_x) at in_t_frac, nats, one per image", "element")
        text = "gradient of the sum of out_log_prob with respect to in_x"
        results["grad_x"] = Result(gradient[..., ::stride, ::stride], text)
        logits = network(x, t_frac)
        results["frac"] = Result(logits, "logits for (in_x, in_t_frac)")
        loss = F.cross_entropy(logits, y)
        results["loss"] = Result(loss, "mean over the images of the cross-entropy at in_t_frac", "element")
        loss.backward()
        return results | gradients(network)

    record(
        folder,
        kind="classifier_forward",
        description=description,
        seed=seed,
        config={"model": {**FAMILY, **spec}, "batch": batch, "grad_params": stored_gradients(model)}
        | ({"store_stride": stride} if stride > 1 else {}),
        compute=compute,
        inputs=inputs,
        weights={"weights.pt": (state, "state_dict of the classifier")},
        expected={"grad_norms_order": [name for name, _ in model.named_parameters()]},
    )


def guided_runs() -> Iterator[dict[str, Any]]:
    """Yield the runs of the sampling case."""

    def run(name: str, scale: float, *, fixed: bool = False, clip: bool = True, **flags: Any) -> dict[str, Any]:
        loop = "ddim_sample_loop" if name.startswith("ddim_") else "p_sample_loop"
        eta = {"eta": flags.pop("eta", 0.0)} if loop == "ddim_sample_loop" else {}
        return {
            "name": f"{name}_{scale:g}",
            "sampler": loop,
            "clip_denoised": clip,
            "classifier_scale": scale,
            "flags": {**DIFFUSION, **flags, "learn_sigma": not fixed},
            "noise": "in_noise_steps5",
            "weights": "weights_fixed_sigma.pt" if fixed else "weights.pt",
            **eta,
        }

    for scale in (0.0, 1.0, 4.0):
        yield run("p_5_learned_scale", scale)
    yield run("p_5_learned_noclip_scale", 4.0, clip=False)
    yield run("p_ddim5_rescaled_t_scale", 1.0, timestep_respacing="ddim5", rescale_timesteps=True, diffusion_steps=4000)
    yield run("p_5_cosine_scale", 4.0, noise_schedule="cosine")
    yield run("p_5_xstart_scale", 1.0, predict_xstart=True)
    yield run("p_5_fixed_large_scale", 0.0, fixed=True)
    yield run("p_5_fixed_large_scale", 4.0, fixed=True)
    yield run("p_5_fixed_small_scale", 1.0, fixed=True, sigma_small=True)
    for scale in (0.0, 1.0, 4.0):
        yield run("ddim_ddim5_scale", scale, timestep_respacing="ddim5")
    yield run("ddim_ddim5_noclip_scale", 1.0, timestep_respacing="ddim5", clip=False)
    yield run("ddim_5_eta0.5_scale", 1.0, eta=0.5)
    yield run("ddim_5_rescaled_t_scale", 1.0, rescale_timesteps=True, diffusion_steps=4000)
    yield run("ddim_ddim5_xstart_scale", 1.0, timestep_respacing="ddim5", predict_xstart=True)
    yield run("ddim_ddim5_fixed_scale", 4.0, timestep_respacing="ddim5", fixed=True)


def record_guided_sampler(folder: Path, seed: int, stride: int) -> None:
    """Record whole sampling trajectories with and without the gradient of a classifier."""
    generator = torch.Generator().manual_seed(seed)
    updown = {"resblock_updown": True, "num_head_channels": 16, "channel_mult": [1, 1]}
    specs = {
        "weights.pt": {**updown, "use_new_attention_order": True, "num_classes": 10, "attention_resolutions": [4]},
        "weights_fixed_sigma.pt": {**updown, "out_channels": 3, "attention_resolutions": []},
    }
    specs = {name: {"builder": "UNetModel", "kwargs": {**UNET, **kwargs}} for name, kwargs in specs.items()}
    specs["weights_classifier.pt"] = {"builder": "EncoderUNetModel", "kwargs": CLASSIFIER}
    models = {name: build(spec) for name, spec in specs.items()}
    # Gains: variances near the range between the two fixed ones, and a classifier that knows what it sees.
    gains = {"out.2.weight": 0.5, "out.2.c_proj.weight": 16.0}
    states = {name: randomise(model, generator, gains) for name, model in models.items()}
    batch, size, steps = 2, CLASSIFIER["image_size"], 5
    doc = (
        "noise per step in the order of the steps (first entry: largest timestep); one draw per step, also where unused"
    )
    inputs = {
        "noise_init": (normal(generator, batch, 3, size, size), "x_T, the start of the loop"),
        "noise_steps5": (normal(generator, steps, batch, 3, size, size), doc),
        "y": (torch.tensor([3, 7]), "class labels, of the classifier and of the class-conditional network"),
    }
    runs = list(guided_runs())
    processes = {run["name"]: create_diffusion(run["flags"]) for run in runs}

    def compute(arithmetic: Arithmetic) -> dict[str, Result]:
        networks = {name: arithmetic.network(model) for name, model in models.items()}
        given = {name: arithmetic.tensor(value) for name, (value, _) in inputs.items()}
        results = {}
        for run in runs:
            network, scale, times = networks[run["weights"]], run["classifier_scale"], []

            def model_fn(x: Tensor, t: Tensor, y: Tensor, network: Any = network, times: list = times) -> Tensor:
                times.append(t)
                return network(x, t, y if network.num_classes else None)

            def gradient(x: Tensor, t: Tensor, y: Tensor, scale: float = scale) -> Tensor:
                return scale * log_prob_gradient(networks["weights_classifier.pt"], x, t, y)[1]

            loop = getattr(processes[run["name"]], run["sampler"] + "_progressive")
            shape, noise = given["noise_init"].shape, iter(given["noise_steps5"])
            with mock.patch.object(torch, "randn_like", lambda x, noise=noise: next(noise)):
                done = list(
                    loop(
                        model_fn,
                        shape,
                        noise=given["noise_init"],
                        clip_denoised=run["clip_denoised"],
                        cond_fn=gradient if scale else None,
                        model_kwargs={"y": given["y"]},
                        device="cpu",
                        **({"eta": run["eta"]} if "eta" in run else {}),
                    )
                )
            for field, text in (("sample", "x after every step, first step first"), ("pred_xstart", "predicted x_0")):
                value = torch.stack([step[field] for step in done])[..., ::stride, ::stride]
                results[f"{run['name']}__{field}"] = Result(value, text)
            text = "timesteps the network and the classifier were called with at every step"
            results[f"{run['name']}__model_timesteps"] = Result(torch.stack(times), text)
        return results

    docs = ("state_dict of the network with 6 output channels", "of that with 3", "of the classifier")
    record(
        folder,
        kind="guided_sampler",
        description="sampling trajectories with and without a classifier's gradient, the noise of every step given",
        seed=seed,
        config={
            "models": {name: {**FAMILY, **spec} for name, spec in specs.items() if name != "weights_classifier.pt"},
            "classifier": {"weights_classifier.pt": {**FAMILY, **specs["weights_classifier.pt"]}},
            "runs": runs,
            "store_stride": stride,
        },
        compute=compute,
        inputs=inputs,
        weights={name: (state, doc) for (name, state), doc in zip(states.items(), docs, strict=True)},
        expected={
            name: {"num_timesteps": process.num_timesteps, "timestep_map": process.timestep_map}
            for name, process in processes.items()
        },
    )


def create_diffusion(flags: dict[str, Any]) -> Any:
    """Return the original's process for the flags of a run."""
    from guided_diffusion.script_util import create_gaussian_diffusion

    return create_gaussian_diffusion(
        steps=flags["diffusion_steps"], **{k: v for k, v in flags.items() if k != "diffusion_steps"}
    )


def released() -> dict[str, dict[str, Any]]:
    """Return builder and flags of every released file, by the file's name, as the original's README gives them."""
    common = {"diffusion_steps": 1000, "learn_sigma": True, "num_res_blocks": 2, "resblock_updown": True}
    common |= {"use_fp16": True, "use_scale_shift_norm": True, "attention_resolutions": "32,16,8", "class_cond": True}
    common |= {"noise_schedule": "linear", "num_channels": 256}
    headed = common | {"num_head_channels": 64}
    small = {"noise_schedule": "cosine", "num_channels": 192, "num_res_blocks": 3, "dropout": 0.1}
    upsampler = {**common, "num_channels": 192}
    lsun = {**headed, "image_size": 256, "class_cond": False, "dropout": 0.1}
    diffusion = {
        "64x64_diffusion": {**headed, **small, "image_size": 64, "use_new_attention_order": True},
        "128x128_diffusion": {**common, "image_size": 128, "num_heads": 4},
        "256x256_diffusion": {**headed, "image_size": 256},
        "256x256_diffusion_uncond": {**headed, "image_size": 256, "class_cond": False},
        "512x512_diffusion": {**headed, "image_size": 512, "use_fp16": False},
        "64_256_upsampler": {**upsampler, "large_size": 256, "small_size": 64, "num_heads": 4},
        "128_512_upsampler": {
            **upsampler,
            "large_size": 512,
            "small_size": 128,
            "num_head_channels": 64,
            "attention_resolutions": "32,16",
        },
        "lsun_bedroom": lsun,
        "lsun_cat": lsun,
        "lsun_horse": lsun,
        "lsun_horse_nodropout": {**lsun, "dropout": 0.0},
    }
    classifiers = {
        "64x64_classifier": {"image_size": 64, "classifier_depth": 4},
        "128x128_classifier": {"image_size": 128},
        "256x256_classifier": {"image_size": 256},
        "512x512_classifier": {"image_size": 512},
    }
    from guided_diffusion import script_util

    defaults = {
        "create_model_and_diffusion": script_util.model_and_diffusion_defaults(),
        "sr_create_model_and_diffusion": script_util.sr_model_and_diffusion_defaults(),
        "create_classifier": script_util.classifier_defaults(),
    }
    specs = {}
    for name, flags in (diffusion | classifiers).items():
        builder = "sr_create_model_and_diffusion" if "large_size" in flags else "create_model_and_diffusion"
        builder = "create_classifier" if name in classifiers else builder
        assert flags.keys() <= defaults[builder].keys()
        specs[name] = {**FAMILY, "builder": builder, "flags": {**defaults[builder], **flags}}
    return specs


def record_reference_configs(folder: Path, checkout: Path) -> None:
    """Record keys, shapes, sizes and work of the released networks, and the defaults of the scripts' flags."""
    specs, shapes, configs = released(), {}, {}
    for name, spec in specs.items():
        flags = spec["flags"]
        with torch.device("meta"):
            model = build(spec).eval()
        model.dtype = torch.float32  # use_fp16 converts the weights after they are loaded
        shapes[name] = {key: list(value.shape) for key, value in model.state_dict().items()}
        size = flags.get("image_size") or flags["large_size"]
        inputs = [torch.empty(1, 3, size, size, device="meta"), torch.zeros(1, device="meta")]
        extra = {"y": torch.zeros(1, dtype=torch.int64, device="meta")} if flags.get("class_cond") else {}
        if "small_size" in flags:
            extra["low_res"] = torch.empty(1, 3, flags["small_size"], flags["small_size"], device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = model(*inputs, **extra)
        configs[name] = {
            "param_count": sum(parameter.numel() for parameter in model.parameters()),
            "num_tensors": len(list(model.parameters())),
            "forward_flops_per_image": counter.get_total_flops(),
            "output_shape": list(out.shape),
        }
    defaults = {path.stem: script_defaults(path) for path in sorted((checkout / "scripts").glob("*.py"))}
    record(
        folder,
        kind="reference_configs",
        description="state_dict keys and shapes, parameter counts and forward FLOPs of the released networks and "
        "classifiers; default value of every command-line flag",
        seed=0,
        config={**FAMILY, "configs": specs},
        expected={
            "configs": configs,
            "script_flag_defaults": defaults,
            "shapes_file": "state_dict_shapes.json.xz",
        },
    )
    (folder / "state_dict_shapes.json.xz").write_bytes(lzma.compress(json.dumps(shapes).encode()))


def script_defaults(path: Path) -> dict[str, Any]:
    """Return the default of every flag of one of the original's scripts."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module.create_argparser().parse_args([]))


def unet(**kwargs: Any) -> dict[str, Any]:
    return {"builder": "UNetModel", "kwargs": {**UNET, **kwargs}}


def record_all(out: Path, checkout: Path) -> None:
    """Write every case."""
    from guided_diffusion.script_util import model_and_diffusion_defaults

    updown = {"resblock_updown": True}
    ours = {"use_new_attention_order": True}
    record_unet(
        out / "guided_unet_updown_new_order",
        201,
        "UNet whose residual blocks resample, new attention order, heads of 16 channels, attention at both levels",
        unet(**updown, **ours, num_head_channels=16, attention_resolutions=[1, 2]),
        (8, 8),
        small=True,
    )
    record_unet(
        out / "guided_unet_updown_legacy_order",
        202,
        "class-conditional UNet whose residual blocks resample, old attention order, 2 heads down, 4 up, 8 x 16 pixels",
        unet(**updown, num_heads=2, num_heads_upsample=4, num_classes=10),
        (8, 16),
    )
    record_unet(
        out / "guided_unet_new_order_additive",
        203,
        "class-conditional UNet whose time embedding is added, convolutions resample, new attention order, wide heads",
        unet(**ours, num_head_channels=32, num_classes=7, use_scale_shift_norm=False, out_channels=3),
        (8, 8),
    )
    record_unet(
        out / "guided_unet_updown_additive",
        204,
        "UNet of three levels of two residual blocks, which resample and add the time embedding",
        unet(
            **updown,
            **ours,
            num_heads=2,
            num_res_blocks=2,
            channel_mult=[2, 1, 2],
            attention_resolutions=[2, 4],
            use_scale_shift_norm=False,
            out_channels=3,
        ),
        (16, 8),
    )
    record_unet(
        out / "guided_unet_half_stem",
        205,
        "UNet with channel_mult 0.5, 1, 2 as for 512 pixels: the first and the last convolution have half the channels",
        unet(**updown, num_head_channels=64, model_channels=64, channel_mult=[0.5, 1, 2], attention_resolutions=[2, 4]),
        (16, 16),
    )
    flags = {
        **model_and_diffusion_defaults(),
        "image_size": 32,
        "num_channels": 32,
        "num_res_blocks": 1,
        "num_head_channels": 32,
        "attention_resolutions": "16,8",
        "channel_mult": "1,2,2",
        "class_cond": True,
        "learn_sigma": True,
        "resblock_updown": True,
        "use_new_attention_order": True,
    }
    record_unet(
        out / "guided_unet_flags32",
        206,
        "class-conditional UNet built from command-line flags at image_size 32",
        {"builder": "create_model_and_diffusion", "flags": flags},
        (32, 32),
        stride=2,
    )
    record_unet(
        out / "guided_superres_updown",
        207,
        "class-conditional super-resolution UNet whose residual blocks resample, 2 heads",
        {"builder": "SuperResModel", "kwargs": {**UNET, **updown, "num_heads": 2, "num_classes": 10}},
        (16, 16),
        low_res=(4, 4),
    )
    wide = {"model_channels": 64, "image_size": 8, "channel_mult": [1, 2], "attention_resolutions": [1, 2]}
    for name, seed, kwargs in (
        ("attention", 211, wide),
        ("attention_conv_down", 212, {"resblock_updown": False, "num_res_blocks": 2}),
        ("adaptive", 213, {"pool": "adaptive"}),
        ("adaptive_conv_down", 214, {"pool": "adaptive", "resblock_updown": False, "use_scale_shift_norm": False}),
        ("spatial", 215, {"pool": "spatial", "use_scale_shift_norm": False}),
        ("spatial_v2_conv_down", 216, {"pool": "spatial_v2", "resblock_updown": False}),
    ):
        kwargs = {**CLASSIFIER, **kwargs}
        how = "residual blocks" if kwargs["resblock_updown"] else "convolutions"
        record_classifier(
            out / f"guided_classifier_{name}",
            seed,
            f"classifier with {kwargs['pool']} pooling, downsampling by {how}",
            {"builder": "EncoderUNetModel", "kwargs": kwargs},
            batch=2,
            stride=1,
        )
    flags = {
        "image_size": 64,
        "classifier_use_fp16": False,
        "classifier_width": 32,
        "classifier_depth": 1,
        "classifier_attention_resolutions": "32,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    }
    record_classifier(
        out / "guided_classifier_flags64",
        217,
        "classifier of 1000 classes built from command-line flags at image_size 64",
        {"builder": "create_classifier", "flags": flags},
        batch=1,
        stride=4,
    )
    record_guided_sampler(out / "guided_sampler", 221, stride=2)
    record_reference_configs(out / "guided_reference_configs", checkout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a clone of guided-diffusion")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the folders are written")
    args = parser.parse_args()
    import_original(args.checkout.resolve())
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    record_all(args.out, args.checkout)


if __name__ == "__main__":
    main()
