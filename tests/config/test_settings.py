"""Settings come from defaults, checkpoints, JSON files and flags, and the scripts' help explains them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import DIFFUSION, MODEL, flags, refusal, save, super_res, unet

from fastdiff import evaluate, nll, sample, super_res_sample, super_res_train, train
from fastdiff.config.load import load
from fastdiff.config.sections import Config, SuperResConfig
from fastdiff.models import SuperResSettings, UNetSettings
from fastdiff.settings import Settings

TRAINING = ("model", "diffusion", "data", "train")
SAMPLING = ("model", "diffusion", "sample")
SCRIPTS: dict[str, tuple[Any, tuple[str, ...], type[Config]]] = {
    "train": (train.main, TRAINING, Config),
    "super_res_train": (super_res_train.main, TRAINING, SuperResConfig),
    "sample": (sample.main, ("model", "diffusion", "classifier", "sample"), Config),
    "super_res_sample": (super_res_sample.main, SAMPLING, SuperResConfig),
    "nll": (nll.main, ("model", "diffusion", "data", "nll"), Config),
}
CHECKPOINTS = {"train": "resume_checkpoint", "sample": "model_path", "nll": "model_path"}
by_script = pytest.mark.parametrize("script", SCRIPTS)


def read(script: str, *argv: object) -> Config:
    """Return the settings that a script would use."""
    _, sections, kind = SCRIPTS[script]
    checkpoint = (sections[-1], CHECKPOINTS[sections[-1]])
    return load([str(word) for word in argv], description="", sections=sections, kind=kind, checkpoint=checkpoint)[0]


def section_class(kind: type[Config], section: str) -> type[Settings]:
    annotation = kind.model_fields[section].annotation
    assert annotation is not None
    return annotation


def json_file(folder: Path, content: Any) -> Path:
    path = folder / "settings.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- paths ---

PATHS = re.compile(r".*(_dir|_path|_from|_file)|resume_checkpoint|base_samples")


@by_script
def test_paths_are_expanded(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In flags and in JSON files, and in the names of those files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FD_PLACE", str(tmp_path / "place"))
    save(super_res() if "super_res" in script else unet(), tmp_path / "model000001.pt")
    _, sections, kind = SCRIPTS[script]
    for section in sections:
        for name in section_class(kind, section).model_fields:
            if not PATHS.fullmatch(name):
                continue
            is_checkpoint = name == CHECKPOINTS.get(section)
            more = {"guidance": 2.0} if name == "guide_model_path" else {}
            for given in ("~/model000001.pt", "$HOME/model000001.pt", "${FD_PLACE}/../model000001.pt"):
                want = given.replace("~", str(tmp_path)).replace("$HOME", str(tmp_path))
                want = want.replace("${FD_PLACE}", str(tmp_path / "place"))
                if is_checkpoint and "PLACE" in given:
                    (tmp_path / "place").mkdir(exist_ok=True)
                json_file(tmp_path, {section: {name: given, **more}})
                for words in (flags({name: given, **more}), ["--config", "~/settings.json"]):
                    assert getattr(getattr(read(script, *words), section), name) == want
            message = refusal(SCRIPTS[script][0], flags({name: "$FD_NONE/x"}))
            assert message.startswith(f"--{name}: $FD_NONE/x: the environment variable FD_NONE is not set")


@by_script
def test_paths_of_json_files(script: str, tmp_path: Path) -> None:
    message = refusal(SCRIPTS[script][0], ["--config", "$FD_NONE/x.json"])
    assert message.startswith("--config: $FD_NONE/x.json: the environment variable FD_NONE is not set")


def test_paths_of_deepspeeds_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.json").write_text('{"gradient_clipping": 2.0}')
    assert read("train", "--deepspeed", "~/d.json").train.grad_clip == 2


# --- layers ---


def test_defaults_checkpoint_json_flags(tmp_path: Path) -> None:
    """Each of four settings is set by another layer, and later layers override earlier ones."""
    checkpoint = save(unet(num_res_blocks=3), tmp_path / "model000001.pt", diffusion_steps=50, predict_xstart=True)
    assert read("sample").diffusion.diffusion_steps == 1000
    config = read("sample", "--model_path", checkpoint)
    assert config.diffusion.diffusion_steps == 50
    assert config.model.num_res_blocks == 3
    file = json_file(tmp_path, {"diffusion": {"diffusion_steps": 60, "sigma_small": True}, "sample": {"seed": 4}})
    config = read("sample", "--config", file, "--model_path", checkpoint)
    assert (config.diffusion.diffusion_steps, config.sample.seed) == (60, 4)
    config = read("sample", "--diffusion_steps", 70, "--config", file, "--model_path", checkpoint)
    assert config.diffusion.diffusion_steps == 70  # flag
    assert config.diffusion.sigma_small  # JSON
    assert config.diffusion.predict_xstart  # checkpoint
    assert config.diffusion.rescale_timesteps  # default


def test_checkpoint_named_in_json(tmp_path: Path) -> None:
    checkpoint = save(unet(), tmp_path / "model000001.pt")
    file = json_file(tmp_path, {"sample": {"model_path": str(checkpoint)}})
    assert read("sample", "--config", file).model.num_channels == 32
    other = save(unet(num_channels=64), tmp_path / "model000002.pt")
    assert read("sample", "--config", file, "--model_path", other).model.num_channels == 64


def test_one_file_for_every_script(tmp_path: Path) -> None:
    """A section that a script doesn't use is accepted there, and checked."""
    content = {
        "model": MODEL,
        "diffusion": DIFFUSION,
        "data": {"random_flip": True},
        "train": {"batch_size": 12},
        "sample": {"batch_size": 3},
        "nll": {"batch_size": 5},
        "deepspeed": {"wall_clock_breakdown": False},
    }
    file = json_file(tmp_path, content)
    for script in ("train", "sample", "nll"):
        config = read(script, "--config", file)
        assert (config.train.batch_size, config.sample.batch_size, config.nll.batch_size) == (12, 3, 5)
        assert config.model.size_hw == (8, 8)
    content["train"] = {"batch_size": 0}
    assert "train.batch_size" in refusal(sample.main, ["--config", json_file(tmp_path, content)])


def test_deepspeed_file_is_laid_over_the_section(tmp_path: Path) -> None:
    """Settings that only DeepSpeed's JSON gives become settings of training."""
    file = json_file(tmp_path, {"deepspeed": {"zero_optimization": {"stage": 1, "overlap_comm": False}}})
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 6}))
    config = read("train", "--config", file, "--deepspeed", ds)
    assert config.deepspeed["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert (config.train.zero_stage, config.train.batch_size) == (2, 6)


# --- flags ---


@by_script
def test_every_leaf_is_a_flag(script: str) -> None:
    """Giving the default of any setting as a flag gives the default settings."""
    _, sections, kind = SCRIPTS[script]
    default = read(script)
    for section in sections:
        for name, value in getattr(default, section).model_dump(mode="json").items():
            given = read(script, f"--{name}={value}")
            assert given == default, name
            assert name in getattr(given, section).model_fields_set, name


@by_script
def test_no_flag_means_two_things(script: str) -> None:
    _, sections, kind = SCRIPTS[script]
    names = [name for section in sections for name in section_class(kind, section).model_fields]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("words", "value"),
    [
        *[(["--learn_sigma", word], True) for word in ("True", "true", "1", "yes", "on")],
        *[(["--learn_sigma", word], False) for word in ("False", "false", "0", "no", "off")],
        (["--learn_sigma=True"], True),
        (["--learn_sigma"], True),
        (["--learn_sigma", "--num_heads", "2"], True),
        ([], False),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_booleans(words: list[str], value: bool) -> None:
    assert read("sample", *words).model.learn_sigma is value


@pytest.mark.parametrize("form", ["16,8", " 16, 8 ", [16, 8], ["16", "8"]], ids=repr)
def test_lists(form: Any, tmp_path: Path) -> None:
    file = json_file(tmp_path, {"model": {"attention_resolutions": form}})
    assert read("sample", "--config", file).model.attention_resolutions == (16, 8)
    if isinstance(form, str):
        assert read("sample", "--attention_resolutions", form).model.attention_resolutions == (16, 8)


def test_lists_of_one_or_none(tmp_path: Path) -> None:
    assert read("train", "--ema_rate", "0.5").train.ema_rate == (0.5,)
    assert read("train", "--config", json_file(tmp_path, {"train": {"ema_rate": 0.5}})).train.ema_rate == (0.5,)
    assert read("train", "--attention_resolutions", "").model.attention_resolutions == ()
    model = read("train", "--channel_mult", "0.5,1,1.5", "--num_channels", 64).model
    assert model.level_channels == (32, 64, 96)


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("64", (64, 64)),
        ("64x96", (64, 96)),
        ("64X96", (64, 96)),
        (64, (64, 64)),
        ([64, 96], (64, 96)),
        ([64], (64, 64)),
    ],
    ids=repr,
)
def test_sizes(form: Any, size: tuple[int, int], tmp_path: Path) -> None:
    mult = {"channel_mult": "1,2"}
    file = json_file(tmp_path, {"model": {"image_size": form, **mult}})
    assert read("sample", "--config", file).model.size_hw == size
    if isinstance(form, str):
        assert read("sample", "--image_size", form, *flags(mult)).model.size_hw == size
        assert UNetSettings(image_size=form, **mult).model_dump(mode="json")["image_size"] in (64, "64x96")


@pytest.mark.parametrize(
    "form", ["", "64x", "64xab", "64x64x64", "6.5", None, 6.5, [64.5, 64], [[1], [2]], {}, True], ids=repr
)
def test_sizes_that_are_none(form: Any, tmp_path: Path) -> None:
    message = refusal(sample.main, ["--config", json_file(tmp_path, {"model": {"image_size": form}})])
    assert "model.image_size" in message
    assert "64x96" in message


def test_a_number_where_text_is_meant(tmp_path: Path) -> None:
    file = json_file(tmp_path, {"diffusion": {"timestep_respacing": 250}, "sample": {"classes": 5}})
    config = read("sample", "--config", file)
    assert (config.diffusion.timestep_respacing, config.sample.classes) == ("250", "5")


@by_script
def test_the_launchers_flag(script: str) -> None:
    assert read(script, "--local_rank=1") == read(script)
    assert read(script, "--local_rank", 1) == read(script)


# --- use_fp16, improved-diffusion's name ---


@pytest.mark.parametrize("script", ["train", "sample", "nll"])
@pytest.mark.parametrize(
    "words", [["--use_fp16", "True"], ["--use_fp16"], ["--use_fp16", "on"], ["--precision", "fp16"]]
)
def test_use_fp16(script: str, words: list[str]) -> None:
    config = read(script, *words)
    assert getattr(config, SCRIPTS[script][1][-1]).precision == "fp16"


def test_use_fp16_agrees_or_is_refused(tmp_path: Path) -> None:
    assert read("train", "--use_fp16", "False", "--precision", "bf16").train.precision == "bf16"
    assert read("train", "--use_fp16", "True", "--precision", "fp16").train.precision == "fp16"
    for script in ("train", "sample", "nll"):
        message = refusal(SCRIPTS[script][0], ["--use_fp16", "True", "--precision", "bf16"])
        assert "--use_fp16 True contradicts precision bf16" in message
    file = json_file(tmp_path, {"train": {"use_fp16": True, "precision": "bf16"}})
    assert "train.use_fp16 True contradicts precision bf16" in refusal(train.main, ["--config", file])


def test_use_fp16_in_layers(tmp_path: Path) -> None:
    """A flag overrides the file under either name."""
    file = json_file(tmp_path, {"train": {"use_fp16": True}})
    assert read("train", "--config", file).train.precision == "fp16"
    assert read("train", "--config", file, "--precision", "fp32").train.precision == "fp32"
    file = json_file(tmp_path, {"train": {"precision": "bf16"}})
    assert read("train", "--config", file, "--use_fp16").train.precision == "fp16"


# --- use_ddim, improved-diffusion's name, and second names of flags ---


@pytest.mark.parametrize("script", ["sample", "super_res_sample"])
@pytest.mark.parametrize("words", [["--use_ddim", "True"], ["--use_ddim"], ["--use_ddim", "1"], ["--solver", "ddim"]])
def test_use_ddim(script: str, words: list[str]) -> None:
    config = read(script, *words, "--eta", 0.5)
    assert (config.sample.solver, config.sample.eta) == ("ddim", 0.5)


def test_use_ddim_agrees_or_is_refused(tmp_path: Path) -> None:
    assert read("sample", "--use_ddim", "False", "--solver", "unipc").sample.solver == "unipc"
    assert read("sample", "--use_ddim", "True", "--solver", "ddim").sample.solver == "ddim"
    message = refusal(sample.main, ["--use_ddim", "True", "--solver", "heun"])
    assert message == "--use_ddim True contradicts solver heun; give one of them"
    file = json_file(tmp_path, {"sample": {"use_ddim": True, "solver": "heun"}})
    assert f"{file}: sample.use_ddim True contradicts solver heun" in refusal(sample.main, ["--config", file])
    file = json_file(tmp_path, {"model": {"use_ddim": True}})
    assert "model.use_ddim is not a setting; it belongs in section sample" in refusal(sample.main, ["--config", file])


def test_use_ddim_in_layers(tmp_path: Path) -> None:
    """A flag overrides the file under either name."""
    file = json_file(tmp_path, {"sample": {"use_ddim": True}})
    assert read("sample", "--config", file, "--eta", 0.5).sample.solver == "ddim"
    assert read("sample", "--config", file, "--solver", "dpmpp_2m").sample.solver == "dpmpp_2m"
    file = json_file(tmp_path, {"sample": {"solver": "dpmpp_2m"}})
    assert read("sample", "--config", file, "--use_ddim").sample.solver == "ddim"


def test_second_names_of_flags() -> None:
    for script in ("sample", "super_res_sample"):
        settings = read(script, "--out", "here", "--grid", 9).sample
        assert (settings.out_dir, settings.grid_images) == ("here", 9)
        assert read(script, "--out_dir", "here", "--grid_images=9").sample == settings
    assert read("nll", "--out", "here").nll.out_dir == "here"
    assert refusal(sample.main, ["--h"]) == "--h is not a flag of this script; --help lists them"
    assert refusal(train.main, ["--dry_run", "True"]) == "--dry_run takes no value; leave True out"
    message = "pictures belongs to no flag; each takes one value, in quotes if it contains spaces"
    assert refusal(train.main, ["--data_dir", "my", "pictures"]) == message
    message = "recall belongs to no flag; several values are separated by commas: --metrics fid,recall"
    assert refusal(evaluate.main, ["--metrics", "fid", "recall"]) == message
    message = "a belongs to no flag; the images to judge are given as --samples, and what they are compared with as "
    assert refusal(evaluate.main, ["a", "b"]) == f"{message}--reference"
    assert "did you mean --grid?" in refusal(sample.main, ["--gridd", "3"])
    assert "--out is not a flag" in refusal(train.main, ["--out", "here"])


def test_a_flag_for_a_number_needs_its_value() -> None:
    """Only switches may be given without a value."""
    assert "--zero_stage" in refusal(train.main, ["--zero_stage"])
    assert read("train", "--compile").train.compile is True
    assert read("sample", "--cuda_graph").sample.cuda_graph is True


# --- label_dropout, which needs the null class ---


def test_label_dropout_switches_the_null_class_on(tmp_path: Path) -> None:
    assert not read("train", "--class_cond", "True").model.null_class
    for script in ("train", "super_res_train"):
        config = read(script, "--class_cond", "True", "--label_dropout", 0.1, "--num_classes", 5)
        assert config.model.null_class
        assert config.model.num_labels == 6
        assert config.train.label_dropout == 0.1
    old = save(unet(class_cond=True, num_classes=5), tmp_path / "model000001.pt")  # its settings have no null class
    assert read("train", "--resume_checkpoint", old, "--label_dropout", 0.1).model.num_labels == 6
    file = json_file(tmp_path, {"model": {"class_cond": True}, "train": {"label_dropout": 0.1}})
    assert read("train", "--config", file).model.null_class
    assert not read("sample", "--config", file).model.null_class  # for sampling the checkpoint decides


def test_label_dropout_that_cannot_be(tmp_path: Path) -> None:
    message = refusal(train.main, ["--label_dropout", "0.1"])
    assert message == "--label_dropout 0.1 needs a class-conditional model; give --class_cond True"
    words = ["--class_cond", "True", "--null_class", "False", "--label_dropout", "0.1"]
    assert "--label_dropout 0.1 contradicts null_class False" in refusal(train.main, words)
    file = json_file(tmp_path, {"model": {"class_cond": True, "null_class": False}})
    assert "contradicts null_class False" in refusal(train.main, ["--config", file, "--label_dropout", "0.1"])
    for script in ("train", "sample"):
        message = refusal(SCRIPTS[script][0], ["--null_class", "True"])
        assert message == "--null_class True needs class_cond True"


# --- --print_config and --help ---

UNLIKE_DEFAULTS = {
    "model": {"num_channels": 64, "channel_mult": "0.5,1,2", "attention_resolutions": "", "class_cond": True},
    "diffusion": {"noise_schedule": "cosine", "timestep_respacing": "ddim50", "use_kl": True},
    "data": {"labels": "folder", "num_workers": 3},
    "classifier": {"classifier_width": 64, "classifier_pool": "spatial", "classifier_resblock_updown": False},
    "train": {
        **{"ema_rate": "0.9,0.99", "lr": 3.3e-5, "batch_size": 8, "zero_stage": 1, "use_fp16": True},
        "label_dropout": 0.1,
    },
    "sample": {
        **{"use_ddim": True, "eta": 0.1, "precision": "bf16", "batch_size": "auto", "cuda_graph": False},
        **{"steps": 12, "spacing": "karras", "sigma_max": 80.5, "guidance": 2.5, "guidance_interval": "0.2,5.0"},
        **{"save_as": "png,zip", "trajectory": 3, "overwrite": True, "out_dir": "here"},
    },
    "nll": {"num_samples": 7, "clip_denoised": False},
}


@by_script
def test_print_config_round_trip(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, sections, kind = SCRIPTS[script]
    size = {"large_size": "64x96", "small_size": "16x24"} if kind is SuperResConfig else {"image_size": "64x96"}
    values = {name: value for section in sections for name, value in UNLIKE_DEFAULTS[section].items()} | size
    if script == "sample":
        values |= {"classifier_path": "guide.pt", "classifier_scale": 2.5}
        values |= {"classes": "1,2", "sr_model_path": "large.pt", "sr_steps": 7, "sr_batch_size": 5}
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"gradient_clipping": 1.5}))
    trains = "train" in sections
    argv = [*flags(values), *(["--deepspeed", str(ds)] if trains else [])]
    with pytest.raises(SystemExit) as end:
        main([*argv, "--print_config"])
    assert not end.value.code
    text = capsys.readouterr().out
    printed = json.loads(text)
    assert set(printed) == {*sections, *(["deepspeed"] if trains else [])}
    again = tmp_path / "printed.json"
    again.write_text(text)
    config = read(script, *argv)
    assert read(script, "--config", again) == config
    for name, value in values.items():
        shown = next(printed[section][name] for section in sections if name in printed[section])
        if not isinstance(value, str) and name not in (
            "use_fp16",
            "use_ddim",
        ):  # they show as others
            assert shown == value, name
    if trains:
        assert (config.train.grad_clip, config.train.precision) == (1.5, "fp16")
        assert config.model.null_class  # for label_dropout
    if "sample" in sections:
        assert config.sample.solver == "ddim"


def test_print_config_shows_the_checkpoints_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main, model in ((sample.main, unet()), (super_res_sample.main, super_res())):
        checkpoint = save(model, tmp_path / "model000001.pt", diffusion_steps=50)
        with pytest.raises(SystemExit):
            main(["--model_path", str(checkpoint), "--print_config"])
        printed = json.loads(capsys.readouterr().out)
        assert type(model.settings)(**printed["model"]) == model.settings
        assert printed["diffusion"]["diffusion_steps"] == 50


@by_script
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The help explains every flag and shows its default."""
    main, sections, kind = SCRIPTS[script]
    monkeypatch.setenv("COLUMNS", "5000")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"fastdiff/{script}.py" in text  # an example command
    for flag in ("--config", "--print_config", *(["--deepspeed", "--dry_run"] if "train" in sections else [])):
        assert re.search(rf"^  {flag}\b.* \w+", text, re.MULTILINE)
    assert ("--deepspeed" in text) == ("train" in sections)
    for section in sections:
        settings = section_class(kind, section)
        defaults = settings().model_dump(mode="json")
        for name in settings.model_fields:
            entry = re.search(rf"^  --{name}\b(.*(?:\n {{6,}}.*)*)", text, re.MULTILINE)
            assert entry, f"--{name} is not in the help of {script}"
            explained = re.search(r"\s{2,}(\S.*) \(default: (.*)\)$", entry[1], re.DOTALL)
            assert explained, f"--{name}: {entry[0]}"
            assert len(explained[1].split()) >= 2, f"--{name}: {entry[0]}"
            default = "empty" if defaults[name] == "" else str(defaults[name])
            assert explained[2] == default, f"--{name}: {entry[0]}"


def test_choices_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for choices in ("fp32|bf16|fp16", "linear|cosine", "uniform|loss-second-moment", "auto|dali|pillow"):
        assert choices in text
    for form in ("--image_size N|HxW", "--attention_resolutions A,B,..", "--ema_rate A,B,..", "--microbatch auto|N"):
        assert form in text
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    text = capsys.readouterr().out
    for form in ("--save_as A,B,..", "--batch_size auto|N", "--cuda_graph [auto|True|False]", "uniform|quadratic"):
        assert form in text


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        UNetSettings().num_channels = 64  # type: ignore[misc]
    assert SuperResSettings().size_hw == (256, 256)
