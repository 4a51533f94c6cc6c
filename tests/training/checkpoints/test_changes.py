"""A run goes on with the network and process that its weights were trained with, unless allow_change names a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.tiny import nothing_written, refusal

from fastdiff import super_res_train, train
from fastdiff.config.presets import Preset
from fastdiff.training.checkpoints import resume

pytestmark = pytest.mark.slow

PROCESS: dict[str, Any] = {"diffusion_steps": 100, "noise_schedule": "cosine", "learn_sigma": True}
CHANGES: dict[str, tuple[Any, Any]] = {
    "noise_schedule": ("cosine", "linear"),
    "diffusion_steps": (100, 120),
    "predict_xstart": (False, True),
    "rescale_timesteps": (True, False),
    "rescale_learned_sigmas": (True, False),
    "timestep_respacing": ("''", "25"),
    "use_kl": (False, True),
    "min_snr_gamma": (0.0, 5.0),
    "num_heads": (4, 2),
    "num_head_channels": (-1, 32),
    "dropout": (0.0, 0.25),
}


def words(data: Path, run: Path, **settings: Any) -> list[str]:
    given = {"data_dir": data, "run_dir": run, "batch_size": 4, "loader": "pillow", "max_steps": 2}
    return tiny.flags({**tiny.MODEL, **PROCESS, **given, **settings})


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train.main(words(data, run, max_steps=1))
    return run


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_process_is_refused(name: str, data: Path, trained: Path, tmp_path: Path) -> None:
    then, now = CHANGES[name]
    step = trained / "checkpoints" / "step_000001"
    with nothing_written(trained):
        for source in (trained, step, step / "model000001.pt", step / "ema_0.9999_000001.pt"):
            message = refusal(train.main, words(data, tmp_path / "new", resume_checkpoint=source, **{name: now}))
            assert message == (
                f"--{name} {now}: {source} is of a run with {name} {then}; keep that, or give --allow_change {name} to "
                "change it"
            )
        message = refusal(train.main, words(data, trained, **{name: now}))
        assert f"--run_dir: {trained} holds a run with " in message
        assert f".{name} " in message
        assert f"now it is {now}" in message
        assert f"or give --allow_change {name} to go on" in message
    assert not (tmp_path / "new").exists()


def test_all_changes_are_named_at_once(data: Path, trained: Path, tmp_path: Path) -> None:
    changed = {"noise_schedule": "linear", "num_heads": 2, "seed": 3, "batch_size": 2}
    message = refusal(train.main, words(data, tmp_path / "new", resume_checkpoint=trained, **changed))
    assert message.startswith("--num_heads 2, --noise_schedule linear, --batch_size 2, --seed 3: ")
    assert message.endswith("give --allow_change num_heads,noise_schedule,batch_size,seed to change them")
    changed["allow_change"] = "seed,num_heads"
    message = refusal(train.main, words(data, tmp_path / "new", resume_checkpoint=trained, **changed))
    assert message.startswith("--noise_schedule linear, --batch_size 2: ")


def test_permitted_changes_are_logged_and_made(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {name: now for name, (_, now) in CHANGES.items() if name not in ("use_kl", "num_head_channels")}
    allowed = {**changed, "allow_change": ",".join(changed)}
    free = {"lr": 3e-4, "random_flip": True, "num_workers": 1}
    fresh = tmp_path / "fresh"
    train.main(words(data, fresh, max_steps=1))
    for again in ({"run_dir": fresh}, {"run_dir": tmp_path / "new", "resume_checkpoint": trained}):
        capsys.readouterr()
        train.main(words(data, tmp_path, **{**again, **allowed, **free}))
        out = capsys.readouterr().out
        for name, (then, now) in CHANGES.items():
            assert (f"{name} is {now} from here on; it was {then}" in out) == (name in changed)
        assert "lr is 0.0003 from here on; it was 0.0001" in out
        assert "random_flip is True from here on; it was False" in out
        assert "num_workers" not in out
        train.main(words(data, tmp_path, **{**again, **allowed, **free, "max_steps": 3}))
        assert "from here on" not in capsys.readouterr().out.replace("lr is", "")


def test_settings_that_are_not_given_are_the_checkpoints(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"data_dir": data, "run_dir": tmp_path / "new", "batch_size": 4, "loader": "pillow", "max_steps": 2}
    train.main(tiny.flags({**given, "resume_checkpoint": trained}))
    assert "from here on" not in capsys.readouterr().out


def test_another_size_where_the_shapes_allow_it(data: Path, trained: Path, tmp_path: Path) -> None:
    larger = {"image_size": 16, "attention_resolutions": 8, "resume_checkpoint": trained}
    message = refusal(train.main, words(data, tmp_path / "new", **larger))
    assert message.startswith("--image_size 16: ")
    train.main(words(data, tmp_path / "new", **larger, allow_change="image_size"))
    assert (tmp_path / "new" / "checkpoints" / "step_000002").is_dir()


def test_changed_shapes_are_not_offered(data: Path, trained: Path) -> None:
    message = refusal(train.main, words(data, trained, num_channels=64, num_heads=2))
    assert "model.num_channels 32 (now it is 64)" in message
    assert "allow_change" not in message


def test_a_run_without_its_config_file(data: Path, trained: Path, tmp_path: Path) -> None:
    """The checkpoint's own settings count then."""
    run = tmp_path / "run"
    train.main(words(data, run, max_steps=1))
    (run / "config.json").unlink()
    message = refusal(train.main, words(data, run, noise_schedule="linear"))
    assert "is of a run with noise_schedule cosine" in message


def test_files_without_settings(data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of such a file, unless its name is that of a released one."""
    state = torch.load(trained / "checkpoints" / "step_000001" / "model000001.pt", weights_only=True)
    bare = tmp_path / "model000001.pt"
    torch.save(dict(state), bare)
    changed = {"noise_schedule": "linear", "resume_checkpoint": bare}
    train.main(words(data, tmp_path / "one", **changed))
    content = resume.read_json(trained / "config.json")
    preset = Preset("tiny", "model000001", "", "unet", content["model"], content["diffusion"])
    monkeypatch.setattr(resume, "preset_for_file", lambda file: preset if Path(file) == bare else None)
    message = refusal(train.main, words(data, tmp_path / "two", **changed))
    assert message.startswith(f"--noise_schedule linear: {bare} is of a run with noise_schedule cosine")


def test_super_resolution(data: Path, tmp_path: Path) -> None:
    given = {"data_dir": data, "batch_size": 4, "loader": "pillow", **tiny.SUPER_RES, **PROCESS}
    super_res_train.main(tiny.flags({**given, "run_dir": tmp_path / "run", "max_steps": 1}))
    other = {**given, "small_size": 4, "num_heads": 2, "max_steps": 2}
    resumed = {**other, "resume_checkpoint": tmp_path / "run", "run_dir": tmp_path / "new"}
    message = refusal(super_res_train.main, tiny.flags(resumed))
    assert message.startswith("--num_heads 2, --small_size 4: ")
    message = refusal(super_res_train.main, tiny.flags({**other, "run_dir": tmp_path / "run"}))
    assert "model.small_size 8 (now it is 4)" in message
    super_res_train.main(tiny.flags({**resumed, "allow_change": "small_size,num_heads"}))
