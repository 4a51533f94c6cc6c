"""Schedules, posteriors, losses, samplers and bounds reproduce recorded numbers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdiff.kernels import reference_diffusion
from helpers.golden_cases import Case, cases, class_conditional, diffusion_for

from fastdiff import ops
from fastdiff.diffusion import samplers
from fastdiff.diffusion.process import GaussianDiffusion, ModelMeanType, ModelVarType
from fastdiff.diffusion.schedules import Schedule, named_betas, space_timesteps
from fastdiff.diffusion.solvers import solver_table
from fastdiff.diffusion.timesteps import LossSecondMomentSampler


@cases("schedules")
def test_schedules(case: Case) -> None:
    for kind, steps in case.config["schedules"]:
        case.check(f"out_{kind}{steps}__betas", named_betas(kind, steps))
    checked = 0
    for name in case.data:
        prefix, _, rest = name.removeprefix("out_").partition("__")
        kind = prefix.rstrip("0123456789")
        steps = int(prefix[len(kind) :])
        if rest.startswith("respace_"):
            respacing, _, table = rest.removeprefix("respace_").partition("__")
            respacing = "" if respacing == "none" else respacing.replace("_", ",")
            schedule = Schedule.create(kind, steps, respacing)
        else:
            table = rest
            schedule = Schedule(named_betas(kind, steps), np.arange(steps), steps)
        case.check(name, getattr(schedule, table))
        checked += 1
    assert checked
    for key, kept in case.expected["space_timesteps"].items():
        steps, respacing = key.split("|")
        assert space_timesteps(int(steps), respacing) == kept, key
    for steps, respacing in case.config["space_timesteps_errors"]:
        with pytest.raises(ValueError, match="timestep_respacing"):
            space_timesteps(steps, respacing)


@cases("gaussian_math")
def test_gaussian_math(case: Case) -> None:
    mean_types = {"epsilon": ModelMeanType.EPSILON, "xstart": ModelMeanType.START_X}
    var_types = {v.name.lower(): v for v in ModelVarType}
    x_start, x_t, noise = (case.tensor(f"in_{name}") for name in ("x_start", "x_t", "noise"))
    for name, flags in case.config["schedules"].items():
        t = case.tensor(f"in_{name}__t")
        diffusion = diffusion_for({**case.config["flag_defaults"], **flags})
        case.check(f"out_{name}__q_sample", diffusion.q_sample(x_start, t, noise))
        for field, got in zip(("mean", "variance", "log_variance"), diffusion.q_mean_variance(x_start, t), strict=True):
            case.check(f"out_{name}__q_{field}", got)
        posterior = diffusion.q_posterior_mean_variance(x_start, x_t, t)
        for field, got in zip(("mean", "variance", "log_variance"), posterior, strict=True):
            case.check(f"out_{name}__posterior_{field}", got)
        case.check(f"out_{name}__prior_bpd", diffusion.prior_bpd(x_start))
        for rescale, word in ((True, "rescaled"), (False, "plain")):
            diffusion.rescale_timesteps = rescale
            got = diffusion.model_timesteps(t)
            assert got.dtype == case.tensor(f"out_{name}__model_timesteps_{word}").dtype
            case.check(f"out_{name}__model_timesteps_{word}", got)
        for array in case.data:
            if not array.startswith(f"out_{name}__") or "__clip" not in array:
                continue
            mean_type, var_type, clip, field = array.removeprefix(f"out_{name}__").split("__")
            diffusion.mean_type, diffusion.var_type = mean_types[mean_type], var_types[var_type]
            channels = x_t.shape[1] * (2 if diffusion.learns_variance else 1)
            output = case.tensor(f"in_model_output_{channels}ch")
            p = diffusion.p_mean_variance(lambda *_, output=output: output, x_t, t, clip_denoised=clip == "clip1")
            case.check(array, getattr(p, field))


@cases("likelihoods")
def test_likelihoods(case: Case) -> None:
    mean1, logvar1, mean2, logvar2 = (case.tensor(f"in_kl_{n}") for n in ("mean1", "logvar1", "mean2", "logvar2"))
    case.check("out_kl", ops.normal_kl(mean1, logvar1, mean2, logvar2))
    case.check("out_kl_standard_prior", ops.normal_kl(mean1, logvar1, 0.0, 0.0))
    case.check("out_cdf", reference_diffusion.approx_standard_normal_cdf(case.tensor("in_cdf_x")))
    x, means, scales = (case.tensor(f"in_ll_{n}") for n in ("x", "means", "log_scales"))
    case.check("out_ll_float32", ops.discretized_gaussian_log_likelihood(x, means=means, log_scales=scales))
    got = ops.discretized_gaussian_log_likelihood(x.double(), means=means.double(), log_scales=scales.double())
    case.check("out_ll_float64", got)


@cases("losses")
def test_training_losses(case: Case) -> None:
    x_start, noise = case.tensor("in_x_start"), case.tensor("in_noise")
    for run in case.config["runs"]:
        name = run["name"]
        model = case.run_model(run["weights"], tuple(x_start.shape[2:]))
        diffusion = diffusion_for(run["flags"])
        t = case.tensor(run["t"])
        case.check(f"out_{name}__model_timesteps", diffusion.model_timesteps(t))
        terms = diffusion.training_losses(model, x_start, t, case.conditioning(model), noise)
        for term in ("loss", "mse", "vb"):
            assert (term in terms) == case.has(f"out_{name}__{term}"), (name, term)
            if term in terms:
                case.check(f"out_{name}__{term}", terms[term])
        terms["loss"].mean().backward()
        parameters = dict(model.named_parameters())
        for parameter in case.config["grad_params"]:
            case.check(f"out_{name}__grad__{parameter}", parameters[parameter].grad)
        norm = torch.stack([p.grad.double().norm() for p in parameters.values() if p.grad is not None]).norm()
        case.check(f"out_{name}__grad_norm", norm)


def _loop(case: Case, run: dict) -> Iterator[tuple[int, samplers.Step]]:
    hw = tuple(case.tensor("in_noise_init").shape[2:])
    model = case.run_model(run["weights"], hw)
    diffusion = diffusion_for(run["flags"])
    kwargs = {"clip_denoised": run["clip_denoised"], "model_kwargs": case.conditioning(model)}
    if scale := run.get("classifier_scale"):
        kwargs["gradient"] = _gradient(case, diffusion, scale)
    if run["sampler"] == "ddim_reverse_sample":
        for t in range(diffusion.num_timesteps):
            yield t, samplers.ddim_reverse_step(diffusion, model, case.tensor("in_reverse_x"), t, **kwargs)
        return
    recorded = case.tensor(run["noise"])
    last = diffusion.num_timesteps - 1
    loop = samplers.p_sample_loop
    if run["sampler"] == "ddim_sample_loop":
        loop, kwargs["eta"] = samplers.ddim_sample_loop, run["eta"]
    steps = loop(diffusion, model, case.tensor("in_noise_init"), lambda t: recorded[last - t], **kwargs)
    yield from enumerate(steps)


def _gradient(case: Case, diffusion: GaussianDiffusion, scale: float) -> samplers.Gradient:
    """Return the gradient that guides a run, of the case's classifier for the case's labels."""
    from fastdiff.sampling.classifier_gradient import ClassifierGradient, ClassifierGuidance

    table, y = solver_table(diffusion, "ddpm"), case.tensor("in_y")  # DDIM's has the same steps
    gradient = ClassifierGradient(ClassifierGuidance(case.run_classifier(), scale), table, diffusion)
    rows = {step: torch.tensor([row], device=y.device) for row, step in enumerate(table.steps.tolist())}
    # A classifier in plain torch returns NCHW, of which the kernels would make a copy with a warning.
    return lambda x, step: gradient(x, rows[step], y).contiguous(memory_format=torch.channels_last)


@cases("samplers")
def test_samplers(case: Case) -> None:
    from fastdiff.sampling.pictures import to_uint8

    stride = case.config.get("store_stride", 1)
    for run in case.config["runs"]:
        name, diffusion = run["name"], diffusion_for(run["flags"])
        assert diffusion.num_timesteps == case.expected[name]["num_timesteps"]
        assert diffusion.schedule.timestep_map.tolist() == case.expected[name]["timestep_map"]
        steps = [step for _, step in _loop(case, run)]
        for field in ("sample", "pred_xstart"):
            got = torch.stack([getattr(step, field) for step in steps])
            case.check(f"out_{name}__{field}", got[..., ::stride, ::stride])
        shown = [diffusion.model_timesteps(torch.full((len(steps[0].sample),), step.t)) for step in steps]
        case.check(f"out_{name}__model_timesteps", torch.stack(shown))
        if case.has(f"out_{name}__final_uint8"):
            case.check(f"out_{name}__final_uint8", to_uint8(steps[-1].sample))


@cases("guided_sampler")
def test_guided_samplers(case: Case) -> None:
    test_samplers(case)


@cases("nll")
def test_bits_per_dimension(case: Case) -> None:
    x_start = case.tensor("in_x_start")
    for run in case.config["runs"]:
        model = case.run_model(run["weights"], tuple(x_start.shape[2:]))
        diffusion = diffusion_for(run["flags"])
        recorded, last = case.tensor(run["noise"]), diffusion.num_timesteps - 1
        kwargs = {"clip_denoised": run["clip_denoised"], "model_kwargs": case.conditioning(model)}
        result = diffusion.calc_bpd_loop(model, x_start, noise=lambda t, r=recorded, n=last: r[n - t], **kwargs)
        for term, got in result.items():
            case.check(f"out_{run['name']}__{term}", got)


@cases("losses")
def test_training_losses_with_labels(case: Case, tmp_path: Path) -> None:
    test_training_losses(class_conditional(case, len(case.data["in_x_start"]), tmp_path))


@cases("samplers")
def test_samplers_with_labels(case: Case, tmp_path: Path) -> None:
    test_samplers(class_conditional(case, len(case.data["in_noise_init"]), tmp_path))


@cases("nll")
def test_bits_per_dimension_with_labels(case: Case, tmp_path: Path) -> None:
    test_bits_per_dimension(class_conditional(case, len(case.data["in_x_start"]), tmp_path))


@cases("timestep_sampler")
def test_loss_aware_timesteps(case: Case) -> None:
    num_timesteps = case.config["num_timesteps"]
    depth = case.data["out_history_final"].shape[1]
    sampler = LossSecondMomentSampler(num_timesteps, history_per_term=depth, uniform_prob=_uniform_prob(case))
    weights, warm = [sampler.weights()], [sampler.warmed_up()]
    _check_drawn(case, sampler, "before")
    for t, losses in zip(case.tensor("in_ts"), case.tensor("in_losses"), strict=True):
        sampler.update(t, losses)
        weights.append(sampler.weights())
        warm.append(sampler.warmed_up())
    case.check("out_weights", torch.stack(weights))
    case.check("out_warmed_up", torch.stack(warm))
    case.check("out_counts_final", sampler.counts)
    case.check("out_history_final", sampler.history)
    _check_drawn(case, sampler, "after")


def _uniform_prob(case: Case) -> float:
    return case.config.get("uniform_prob", 0.001)


def _check_drawn(case: Case, sampler: LossSecondMomentSampler, when: str) -> None:
    """Check that recorded draws have the importance weight 1 / (T p), and our own draws the same weights."""
    p = sampler.weights() / sampler.weights().sum()
    recorded = case.tensor(f"out_sample_{when}_indices")
    case.check(f"out_sample_{when}_weights", (1 / (len(p) * p[recorded])).float())
    uniform = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    t, weights = sampler.sample(uniform)
    torch.testing.assert_close(weights, (1 / (len(p) * p[t])).float())
    torch.testing.assert_close(t.bincount(minlength=len(p)) / 10000, p.float(), atol=2e-4, rtol=0)


@cases("ema")
def test_ema(case: Case) -> None:
    names = [name.removeprefix("in_target_") for name in case.data if name.startswith("in_target_")]
    for rate in case.config["rates"]:
        averages = [case.tensor(f"in_target_{name}").clone() for name in names]
        history: list[list[torch.Tensor]] = [[] for _ in names]
        for step in range(len(case.data[f"in_source_{names[0]}"])):
            ops.update_ema(averages, [case.tensor(f"in_source_{name}")[step] for name in names], rate)
            for kept, average in zip(history, averages, strict=True):
                kept.append(average.clone())
        for name, kept in zip(names, history, strict=True):
            case.check(f"out_rate{rate}__{name}", torch.stack(kept))
