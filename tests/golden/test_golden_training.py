"""Training reproduces the losses, gradients, weights, averages and moments of recorded runs, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden_cases import DEVICE, Case, cases, diffusion_for, load_model
from helpers.scripted import ScriptedLoader, ScriptedTrainer, importance
from helpers.small_trainer import state_of
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import create_timestep_sampler
from fastdiff.training.checkpoints.format import Snapshot, read_snapshot
from fastdiff.training.deepspeed_engine import start_processes
from fastdiff.training.metrics import LossMeter, LossResult
from fastdiff.training.optimizer import learning_rate
from fastdiff.training.settings import TrainSettings
from fastdiff.training.step_plan import plan_step


def _settings(variant: dict[str, Any]) -> TrainSettings:
    """Convert improved-diffusion's trainer settings, without micro-batches, to TrainSettings."""
    names = ("batch_size", "lr", "weight_decay", "lr_anneal_steps", "ema_rate")
    sampler = variant["schedule_sampler"]
    return TrainSettings(
        max_steps=variant["steps"],
        schedule_sampler="uniform" if sampler == "scripted" else sampler,
        **{name: variant[name] for name in names},
    )


def _norms(state: dict[str, Tensor], order: list[str]) -> list[float]:
    return [state[name].double().norm().item() for name in order]


def _part(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the tensors "KIND/NAME" of `state_of` under their bare names."""
    return {name.removeprefix(f"{kind}/"): value for name, value in state.items() if name.startswith(f"{kind}/")}


def _head4(state: dict[str, Tensor], order: list[str]) -> np.ndarray:
    heads = np.zeros((len(order), 4), dtype=np.float32)
    for row, name in zip(heads, order, strict=True):
        values = state[name].flatten()[:4].cpu().numpy()
        row[: len(values)] = values
    return heads


def _check_state(case: Case, prefix: str, state: dict[str, Tensor], kind: str) -> None:
    order = case.expected["param_order"]
    case.check(f"{prefix}__{kind}_norms", _norms(state, order))
    case.check(f"{prefix}__{kind}_head4", _head4(state, order))
    for name in case.config["full_params"]:
        case.check(f"{prefix}__{kind}__{name}", state[name])


def _variants(case: Case, microbatch: bool) -> list[dict[str, Any]]:
    return [v for v in case.config["variants"] if (v["microbatch"] not in (-1, v["batch_size"])) == microbatch]


def _script(case: Case, variant: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return the timesteps, and the importance weights if the case gives them."""
    name = variant["name"]
    t = case.tensor(variant["t"]) if "t" in variant else case.tensor(f"out_{name}__t")
    return t, case.tensor(variant["weights"]) if "weights" in variant else None


def _labels(case: Case) -> Tensor | None:
    return case.tensor("in_y") if case.has("in_y") else None


@pytest.fixture(autouse=True)
def _device() -> None:
    if torch.cuda.is_available() and DEVICE == "cpu":
        pytest.skip("a trainer runs on the GPU; FASTDIFF_DEVICE=cuda brings the numbers there")


class Trace:
    """Collects the values that a recorded trace holds, step by step, and compares them."""

    def __init__(self, case: Case, variant: dict[str, Any]) -> None:
        self.case, self.prefix = case, f"out_{variant['name']}"
        self.rows: dict[str, list[Any]] = {}

    def add(self, metrics: dict[str, float], **values: Any) -> None:
        quartiles = [metrics.get(f"loss_q{i}", np.nan) for i in range(4)]
        logged = {f"logged_{k}": metrics[k] for k in ("loss", "mse", "vb", "grad_norm", "samples") if k in metrics}
        for name, value in {**logged, "logged_loss_quartiles": quartiles, **values}.items():
            self.rows.setdefault(name, []).append(value.cpu() if isinstance(value, Tensor) else value)

    def compare(self) -> None:
        for name, rows in self.rows.items():
            if self.case.has(f"{self.prefix}__{name}"):
                self.case.check(f"{self.prefix}__{name}", np.stack([np.asarray(row) for row in rows]))
        compared = {n for n in self.rows if self.case.has(f"{self.prefix}__{n}")}
        assert {"per_sample_loss", "logged_loss", "logged_grad_norm", "lr", "logged_samples"} <= compared


class Recording(ScriptedTrainer):
    """Keeps the unweighted terms of the last micro-batch."""

    def losses(self, network: Any, batch: Any) -> LossResult:
        result = super().losses(network, batch)
        self.terms = {f"per_sample_{name}": term.detach().clone() for name, term in result.terms.items()}
        self.terms["weights"] = result.weights
        return result


def _trainer(case: Case, variant: dict[str, Any], snapshot: Snapshot | None = None) -> Recording:
    images = case.tensor("in_x")
    model = load_model(case.config["model"], case.weights(), tuple(images.shape[-2:]))
    processes = start_processes()
    plan = plan_step(_settings(variant), {}, processes)
    loader = ScriptedLoader(images, _labels(case))
    trainer = Recording(plan, model, diffusion_for(variant["flags"]), loader, processes, snapshot)
    trainer.t, trainer.weights = _script(case, variant)
    trainer.noise = case.tensor("in_noise")
    return trainer


@cases("training")
def test_trainer_follows_the_trace(case: Case, tmp_path: Path) -> None:
    for variant in _variants(case, microbatch=False):
        trainer = _trainer(case, variant)
        trace = Trace(case, variant)
        saves = {}
        if variant.get("run_loop"):
            files = case.expected[variant["name"]]["files"]
            saves = {
                files[n]["updates"]: n.removeprefix("opt").removesuffix(".pt") for n in files if n.startswith("opt")
            }
        for step in trainer.run():
            metrics = trainer.read_metrics()
            trace.add(metrics, lr=metrics["lr"], **trainer.terms)
            if step in saves:
                trainer.save(tmp_path / variant["name"], {})
        trace.compare()
        prefix = f"out_{variant['name']}"
        state, order = state_of(trainer), case.expected["param_order"]
        _check_state(case, prefix, _part(state, "model"), "param")
        for rate in trainer.ema:
            _check_state(case, prefix, _part(state, rate), f"ema{rate}")
        assert state["updates"] == case.expected[variant["name"]].get("optimizer_steps", variant["steps"])
        for key in ("exp_avg", "exp_avg_sq"):
            case.check(f"{prefix}__{key}_norms", _norms(_part(state, key), order))
        if case.has(f"{prefix}__sampler_weights_final"):
            case.check(f"{prefix}__sampler_weights_final", trainer.timestep_sampler.weights())
        for updates, name in saves.items():
            _check_files(case, variant, tmp_path / variant["name"] / f"step_{updates:06d}", updates, name)
        if "resume" in variant:
            _check_resume(case, variant, tmp_path / variant["name"])


def _check_files(case: Case, variant: dict[str, Any], folder: Path, updates: int, name: str) -> None:
    """Our files are named after the number of updates; the original's numbers are one lower, except for the last."""
    order = case.expected["param_order"]
    for kind in ("model", *(f"ema_{rate}_" for rate in variant["ema_rate"].split(","))):
        state = torch.load(folder / f"{kind}{updates:06d}.pt", weights_only=True)
        assert list(state) == order
        case.check(f"out_{variant['name']}__file__{kind}{name}.pt__norms", _norms(state, order))
    state = torch.load(folder / f"opt{updates:06d}.pt", weights_only=True)
    expected = case.expected[variant["name"]]["files"][f"opt{name}.pt"]
    assert sorted(state) == sorted(expected["top_level_keys"])
    assert len(state["state"]) == expected["num_params"]
    assert sorted(state["state"][0]) == sorted(expected["per_param_keys"])
    assert state["state"][0]["step"] == expected["updates"]
    assert state["param_groups"][0]["lr"] == pytest.approx(expected["lr"], rel=1e-12)


def _check_resume(case: Case, variant: dict[str, Any], folder: Path) -> None:
    """The original resumes one step early and at the first row; a trainer that does the same gets the same results."""
    step = int(variant["resume"]["file"].removeprefix("model").removesuffix(".pt"))
    updates = case.expected[variant["name"]]["files"][f"opt{step:06d}.pt"]["updates"]
    snapshot = read_snapshot(folder / f"step_{updates:06d}", variant["ema_rate"].split(","))
    assert not snapshot.notes
    snapshot.step = step
    snapshot.state["loader"] = {"position": 0}
    trainer = _trainer(case, variant, snapshot)
    prefix, losses, rates, steps = f"out_{variant['name']}__resumed", [], [], []
    for _ in range(variant["resume"]["steps"]):
        steps.append(trainer.step)
        trainer.take_step()
        metrics = trainer.read_metrics()
        losses.append(metrics.get("loss", np.nan))
        rates.append(metrics["lr"])
    case.check(f"{prefix}__logged_loss", losses)
    case.check(f"{prefix}__lr", rates)
    case.check(f"{prefix}__logged_step", steps)
    state, order = state_of(trainer), case.expected["param_order"]
    case.check(f"{prefix}__param_norms", _norms(_part(state, "model"), order))
    for rate in trainer.ema:
        case.check(f"{prefix}__ema{rate}_norms", _norms(_part(state, rate), order))


@cases("training")
def test_micro_batches_summed_as_the_original_does(case: Case) -> None:
    """The original adds up the gradients of micro-batches, of which the last may be smaller; only this test does so."""
    for variant in _variants(case, microbatch=True):
        settings, images = _settings(variant), case.tensor("in_x")
        model = load_model(case.config["model"], case.weights(), tuple(images.shape[-2:]))
        diffusion = diffusion_for(variant["flags"])
        sampler = create_timestep_sampler(settings.schedule_sampler, diffusion.num_timesteps, images.device)
        meter = LossMeter(diffusion.num_timesteps, images.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        parameters = list(model.parameters())
        ema = {str(rate): [p.detach().clone() for p in parameters] for rate in settings.ema_rate}
        (timesteps, given), labels = _script(case, variant), _labels(case)
        trace, noise, micro = Trace(case, variant), case.tensor("in_noise"), variant["microbatch"]
        for step, x in enumerate(images[: variant["steps"]]):
            optimizer.zero_grad()
            seen: dict[str, list[Tensor]] = {}
            logged = []
            for start in range(0, len(x), micro):
                part = slice(start, start + micro)
                t = timesteps[step][part]
                weights = importance(sampler, t) if given is None else given[step][part]
                kwargs = {} if labels is None else {"y": labels[step][part]}
                terms = diffusion.training_losses(model, x[part], t, kwargs, noise=noise[step][part])
                sampler.update(t, terms["loss"])
                meter.add(t, weights, terms)
                loss = (terms["loss"] * weights).mean()
                loss.backward()
                logged.append({name: (value * weights).mean().item() for name, value in terms.items()})
                for name, value in terms.items():
                    seen.setdefault(f"per_sample_{name}", []).append(value.detach())
            rate = learning_rate(settings, step)
            optimizer.param_groups[0]["lr"] = rate
            metrics = meter.read() | {k: float(np.mean([row[k] for row in logged])) for k in logged[0]}
            metrics["grad_norm"] = (
                torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None]).norm().item()
            )
            metrics["samples"] = (step + 1) * variant["batch_size"]
            optimizer.step()
            for name, averages in ema.items():
                ops.update_ema(averages, [p.detach() for p in parameters], float(name))
            trace.add(metrics, lr=rate, **{name: torch.cat(values) for name, values in seen.items()})
        trace.compare()
        prefix, names = f"out_{variant['name']}", [name for name, _ in model.named_parameters()]
        _check_state(case, prefix, {n: p.detach() for n, p in model.named_parameters()}, "param")
        for rate, averages in ema.items():
            _check_state(case, prefix, dict(zip(names, averages, strict=True)), f"ema{rate}")
        for key in ("exp_avg", "exp_avg_sq"):
            moments = {name: optimizer.state[p][key] for name, p in zip(names, parameters, strict=True)}
            case.check(f"{prefix}__{key}_norms", _norms(moments, case.expected["param_order"]))
