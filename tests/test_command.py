"""The command `fastdiff` runs each script under its own name, and its completion works in the shells."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, tiny
from helpers.pictures_folder import make_pictures

import fastdiff
from fastdiff.command_table import FASTDIFF, SHELLS, Command, Group

COMMAND = [sys.executable, "-m", "fastdiff"]


def scripts(group: Group = FASTDIFF, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Command]]:
    """Yield the words that start each script, and the command."""
    for name, command in group.commands.items():
        if isinstance(command, Group):
            yield from scripts(command, (*above, name))
        elif importlib.util.find_spec(command.module):
            yield (*above, name), command


SCRIPTS = dict(scripts())


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    more = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*COMMAND, *words], env={**os.environ, **more}, capture_output=True, text=True, timeout=120)


@pytest.fixture
def no_torch(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which PyTorch can't be imported."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch is imported')\n")
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["prepare"], ["prepare", "--help"], ["--version"]], ids=str)
def test_help_needs_no_torch(words: list[str], no_torch: dict[str, str]) -> None:
    done = run(*words, **no_torch)
    assert (done.returncode, done.stderr) == (0, "")
    group = FASTDIFF.commands["prepare"] if words[:1] == ["prepare"] else FASTDIFF
    assert isinstance(group, Group)
    if words == ["--version"]:
        assert done.stdout == f"fastdiff {fastdiff.__version__}\n"
        return
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert {name: listed[name] for name in group.commands} == {
        name: command.summary for name, command in group.commands.items()
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trian", "fastdiff: error: trian is not a command; did you mean train?"),
        (
            "super_res_sample.py",
            "fastdiff: error: super_res_sample.py is not a command; did you mean super-res-sample?",
        ),
        ("''", "fastdiff: error: an empty word is not a command; fastdiff --help lists them"),
        ("qqq", "fastdiff: error: qqq is not a command; fastdiff --help lists them"),
        ("prepare cifar", "fastdiff prepare: error: cifar is not a command; did you mean cifar10?"),
        (
            "--config demo train",
            "fastdiff: error: --config is no flag of fastdiff itself; give it after a command, as in fastdiff train "
            "--config",
        ),
        ("--completion", "fastdiff: error: --completion takes one of bash, zsh, fish, not nothing"),
        ("--completion csh", "fastdiff: error: --completion takes one of bash, zsh, fish, not csh"),
    ],
)
def test_wrong_words(words: str, sentence: str, no_torch: dict[str, str]) -> None:
    done = run(*shlex.split(words), **no_torch)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{sentence}\n")


@pytest.mark.slow
@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_each_script_has_its_name(words: tuple[str, ...]) -> None:
    """In its usage line, in its messages, and where the launcher's flag comes first."""
    name = f"fastdiff {' '.join(words)}"
    helped = run(*words, "--help")
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith(f"usage: {name} [-h] ")
    prepares = words[0] == "prepare"
    wrong = run(*([] if prepares else ["--local_rank=0"]), *words, "--no_such_flag", "1")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    (line,) = wrong.stderr.splitlines()
    assert line.startswith(f"{name}: error: ")


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_ctrl_c_during_the_imports(words: tuple[str, ...], tmp_path: Path) -> None:
    for module in ("torch", "numpy", "pydantic"):
        (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt\n")
    done = run(*words, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    sentence = f"fastdiff {' '.join(words)}: stopped by Ctrl-C; the same command starts again\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", sentence)


@pytest.mark.slow
def test_a_run_from_preparing_to_drawing(tmp_path: Path) -> None:
    made = run(
        "prepare", "folder", "--source", str(make_pictures(tmp_path / "source")), "--out", str(tmp_path / "data")
    )
    assert made.returncode == 0, made.stderr
    assert "to train on them: deepspeed --module fastdiff train --data_dir " in made.stdout
    folder = tmp_path / "run"
    flags = tiny.flags({**tiny.MODEL, **tiny.DIFFUSION, "data_dir": tmp_path / "data", "run_dir": folder, "lr": 1e-3})
    trained = run("train", *flags, "--max_steps", "1", "--batch_size", "2", "--loader", "pillow", "--compile", "False")
    assert trained.returncode == 0, trained.stderr
    drawn = run("sample", "--model_path", str(folder), "--num_samples", "2", "--out_dir", str(tmp_path / "drawn"))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "drawn" / "samples_2x8x8x3.npz").is_file()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would share a GPU")
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fastdiff"],
        ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--log_level", "error", "--module", "fastdiff"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_launchers(launcher: list[str], tmp_path: Path) -> None:
    folder, data = tmp_path / "run", make_pictures(tmp_path / "pictures")
    flags = tiny.flags({**tiny.MODEL, **tiny.DIFFUSION, "data_dir": data, "run_dir": folder, "lr": 1e-3})
    more = ["--max_steps", "2", "--batch_size", "4", "--loader", "pillow", "--compile", "False"]
    done = subprocess.run(
        [sys.executable, *launcher, "train", *flags, *more],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 = 2 processes x 2 images" in (folder / "log.txt").read_text()


# --- completion ---

# Line → the words that are offered for its last word, among others.
OFFERED = {
    "fastdiff sup": {"super-res-train", "super-res-sample"},
    "fastdiff prepare c": {"cifar10"},
    "fastdiff sample --sol": {"--solver"},
    "fastdiff sample --solver dpmpp_3": {"dpmpp_3m", "dpmpp_3m_sde"},
    "fastdiff sample --out_dir here --precision b": {"bf16"},
    "fastdiff evaluate --model_path a_f": {"a_file.pt"},
    "fastdiff train --config c": {"cifar10_uncond", "cifar10_uncond_vlb", "chosen.json"},
    "fastdiff sample --preset cifar": {"cifar10_uncond", "cifar10_uncond_50M_500K"},
    "fastdiff prepare folder --format ": {"jpg", "png"},
    "fastdiff convert --to d": {"diffusers"},
    "fastdiff --completion ": set(SHELLS),
}
ASK = {
    "bash": """
        source {script}
        for line in {lines}; do
          read -ra COMP_WORDS <<< "$line"; [[ $line == *' ' ]] && COMP_WORDS+=("")
          COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
          _shtab_fastdiff fastdiff "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
          echo "${{COMPREPLY[*]}}"
        done""",
    "fish": """
        source {script}
        for line in {lines}
          echo (complete -C "$line" | string split -f1 \\t)
        end""",
    # zsh completes only in a terminal; what it shows there goes to the end of the line's file.
    "zsh": """
        zmodload zsh/zpty
        zpty z zsh -f -i
        zpty -w z 'PS1=; autoload -Uz compinit; compinit -u -D; eval "$(cat {script})"; echo REA""DY'
        zpty -r -m z shown '*READY*'
        for line in {lines}; do
          zpty -n -w z "$line"$'\\t\\t'
          sleep 0.7
          zpty -n -w z $'\\x15'
          zpty -w z 'echo DO""NE'
          zpty -r -m z shown '*DONE*'
          print -r -- "${{shown//[$'\\r\\n']/ }}"
        done
        zpty -d z""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts and some files to complete."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        done = run("--completion", shell)
        assert done.returncode == 0, done.stderr
        (folder / f"script.{shell}").write_text(done.stdout)
    for name in ("a_file.pt", "chosen.json"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("words", [[], ["--version"], ["--completion", "bash"]])
def test_a_reader_that_leaves(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "fastdiff", *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell: str, folder: Path) -> None:
    program = shutil.which(shell)
    if not program:
        pytest.skip(f"{shell} is not installed")
    lines = " ".join(f"'{line}'" for line in OFFERED)
    asked = ASK[shell].format(script=folder / f"script.{shell}", lines=lines)
    done = subprocess.run([program, "-c", asked], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    offered = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", done.stdout).split("\n")[:-1]  # without the terminal's codes
    assert len(offered) == len(OFFERED), done.stdout
    for (line, wanted), words in zip(OFFERED.items(), offered, strict=True):
        assert wanted <= set(words.split()), f"{line}: {words}"
