"""Resuming and going back are exact at any step, ZeRO stage and precision, with both loaders, on one rank and two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import HELPERS, resume_checks
from helpers.ranks import run_ranks

from fastdiff import ops
from fastdiff.training.checkpoints.format import read_snapshot

pytestmark = pytest.mark.slow

CASES = [f"{stage}:{precision}:pillow:2" for precision in ("fp32", "bf16") for stage in range(4)]
# The learning rate is still warming up after step 1, epochs end in steps 2 and 4, and from step 3 on the timestep
# sampler uses the losses.
CASES = [
    *(case.replace(":2", ":1,2,3,4") if case in ("0:fp32:pillow:2", "2:bf16:pillow:2") else case for case in CASES),
    *("0:fp32:dali:1,3", "1:bf16:dali:3"),
]
BACK = ["0:fp32", "1:bf16", "2:fp32", "3:bf16"]


@pytest.mark.parametrize("case", CASES)
def test_one_process(case: str, data: Path, tmp_path: Path) -> None:
    resume_checks.check_exact_resume(data, tmp_path, *resume_checks.parts_of(case))


@pytest.fixture(scope="module")
def two_processes(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every case with two processes; returns the folder with their checkpoints and final states."""
    work = tmp_path_factory.mktemp("two")
    back = [f"back:{case}" for case in BACK]
    run_ranks([str(HELPERS / "resume_checks.py"), str(data), str(work), *CASES, *back])
    return work


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, two_processes: Path) -> None:
    name = case.rpartition(":")[0].replace(":", "-")
    final = torch.load(two_processes / f"final-{name}.pt", weights_only=True)
    assert int(final["updates"]) == 5


@pytest.mark.parametrize("case", BACK)
def test_going_back_alone(case: str, data: Path, tmp_path: Path) -> None:
    stage, precision = case.split(":")
    resume_checks.check_roll_back(data, tmp_path, int(stage), precision)


@pytest.mark.parametrize("case", BACK)
def test_going_back_in_two_processes(case: str, two_processes: Path) -> None:
    folder = two_processes / f"back{case.replace(':', '-')}-2"
    assert read_snapshot(folder / "step_000005", ["0.9"]).state["rollbacks"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_agree(precision: str, two_processes: Path) -> None:
    """ZeRO stages store tensors differently and sum in another order, but compute the same."""
    finals = [
        torch.load(two_processes / f"final-{stage}-{precision}-pillow.pt", weights_only=True) for stage in range(4)
    ]
    # The first moment is linear in the gradients; bf16 ones are rounded (2^-8) where micro-batches and ranks add up.
    bound = 1e-5 if precision == "fp32" else 2.0**-7

    def moments(final: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([value.flatten() for name, value in final.items() if name.startswith("exp_avg/")])

    for final in finals[1:]:
        assert (moments(final) - moments(finals[0])).norm() <= bound * moments(finals[0]).norm()


@pytest.mark.parametrize("case", ["2:fp32", "3:bf16", "0:fp32"])
def test_checkpoint_of_two_resumes_on_one(case: str, data: Path, two_processes: Path) -> None:
    """Checkpoints don't depend on the world size: one process loads the weights, averages and moments unchanged."""
    stage, precision = case.split(":")
    folder = two_processes / f"zero{stage}-{precision}-pillow-2" / "step_000002"
    snapshot = read_snapshot(folder, ["0.9", "0.99"])
    trainer = resume_checks.make_trainer(data, snapshot, zero_stage=1, precision=precision)
    state = resume_checks.state(trainer)
    for name, value in snapshot.model.items():
        assert torch.equal(state[f"model/{name}"], value)
        assert torch.equal(state[f"0.9/{name}"], snapshot.ema["0.9"][name])
        assert torch.equal(state[f"exp_avg/{name}"], snapshot.exp_avg[name])
    assert trainer.step == 2
    assert trainer.loader.state_dict()["position"] == 16
    resume_checks.steps(trainer, 1)
    trainer.loader.close()


def test_number_of_processes_does_not_change_images_timesteps_and_noise(data: Path, two_processes: Path) -> None:
    """Without dropout one process and two see the same batches, so their losses agree to rounding."""
    one = resume_checks.make_trainer(data)
    batch = next(one.loader)
    t, _ = one.draw_timesteps(batch)
    noise = ops.image_noise(one.noise_of(batch).seed, batch.positions, 0, (3, 8, 8))
    halves = [slice(0, None, 2), slice(1, None, 2)]
    for half in halves:
        part = type(batch)(batch.images[half], batch.labels[half], batch.positions[half])
        assert torch.equal(one.draw_timesteps(part)[0], t[half])
        assert torch.equal(
            ops.image_noise(one.noise_of(part).seed, one.noise_of(part).index, 0, (3, 8, 8)), noise[half]
        )
    one.loader.close()
