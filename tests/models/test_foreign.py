"""Weights as other programs save them are taken where that is safe; everything else is named for what it is."""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.tiny import info_for, unet
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fastdiff
from fastdiff.errors import UserError
from fastdiff.models import build_model, weights
from fastdiff.models.unet import UNet

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> UNet:
    return unet()


@pytest.fixture(scope="module")
def state(model: UNet) -> State:
    return dict(model.state_dict())


def other(state: State) -> State:
    """Weights of the same network that must not be taken."""
    return {name: value + 1 for name, value in state.items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def compiled_inside(state: State) -> State:
    """The names of a network of which single blocks were compiled and wrapped."""
    return {
        re.sub(r"^out\.", "_fsdp_wrapped_module.out.", name.replace("middle_block.", "middle_block._orig_mod.")): value
        for name, value in state.items()
    }


WRAPPED: dict[str, Callable[[State], Any]] = {
    "DDP": lambda s: prefixed("module.", s),
    "compile": lambda s: prefixed("_orig_mod.", s),
    "compiled DDP": lambda s: prefixed("_orig_mod.module.", s),
    "DDP of a compiled one": lambda s: prefixed("module._orig_mod.", s),
    "compiled parts": compiled_inside,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "state_dict of DDP": lambda s: {"epoch": 3, "state_dict": prefixed("module.", s), "best": 0.5, "arch": "unet"},
    "model and optimizer": lambda s: {
        "model": s,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "scaler": {"scale": torch.ones(())},
    },
    "ema preferred": lambda s: {"model": other(s), "ema": s, "step": torch.tensor(7)},
    "ema of DDP": lambda s: {"net": other(s), "model_ema": prefixed("module.", s), "args": {"lr": 1e-4}},
    "Lightning": lambda s: {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**prefixed("net.", s), "loss.weight": torch.ones(3), "betas": torch.ones(5)},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-4},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x.ckpt"}},
    },
    "Lightning with an average": lambda s: {"state_dict": {**prefixed("unet.", other(s)), **prefixed("ema_unet.", s)}},
    "deep": lambda s: {"trainer": {"networks": {"generator": OrderedDict(s)}}},
    "numbers beside the tensors": lambda s: {**s, "epoch": 3},
}


@pytest.mark.parametrize("way", WRAPPED)
def test_weights_are_found(way: str, state: State, tmp_path: Path) -> None:
    torch.save(WRAPPED[way](state), tmp_path / "w.pt")
    found = weights.read_state_dict(tmp_path / "w.pt")
    assert isinstance(found, OrderedDict)
    assert found.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.items())


def test_an_averaged_model_of_torch(model: UNet, state: State, tmp_path: Path) -> None:
    torch.save(AveragedModel(model).state_dict(), tmp_path / "w.pt")
    assert weights.read_state_dict(tmp_path / "w.pt").keys() == state.keys()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_safetensors(prefix: str, dtype: torch.dtype, model: UNet, state: State, tmp_path: Path) -> None:
    halves = {prefix + name: value.to(dtype) for name, value in state.items()}
    safetensors.torch.save_file(halves, tmp_path / "net.safetensors", metadata={"format": "pt"})
    found = weights.read_state_dict(tmp_path / "net.safetensors")
    copy = build_model(model.settings)
    weights.load_into(copy, found, tmp_path / "net.safetensors")
    for name, value in copy.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].to(dtype).float())


def test_the_settings_stay_with_the_weights(model: UNet, state: State, tmp_path: Path) -> None:
    """A checkpoint of ours that was wrapped or prefixed can be drawn from without further settings."""
    ours = weights.with_info(state, info_for(model))
    torch.save({"state_dict": ours}, tmp_path / "wrapped.pt")
    ddp = OrderedDict(prefixed("module.", state))
    ddp._metadata = ours._metadata  # type: ignore[attr-defined]
    torch.save(ddp, tmp_path / "ddp.pt")
    for name in ("wrapped.pt", "ddp.pt"):
        loaded = fastdiff.load(tmp_path / name, device="cpu")
        assert loaded.settings == model.settings
        assert torch.equal(loaded.network.model.state_dict()["out.2.weight"], state["out.2.weight"])


def test_what_is_left_out_is_logged(state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": other(state), "ema": state}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        weights.read_state_dict(tmp_path / "w.pt")
    assert f"the weights are those of ['ema'], among 2 networks; other tensors left out: {len(state)}" in caplog.text
    caplog.clear()
    torch.save({"state_dict": prefixed("module.", state)}, tmp_path / "w.pt")
    weights.read_state_dict(tmp_path / "w.pt")
    assert not caplog.text


def test_two_networks_are_not_chosen_from(state: State, tmp_path: Path) -> None:
    for content in (
        {"best": state, "last": state},
        {"ema_0.99": state, "ema_0.999": state, "model": state},
        {"state_dict": {**prefixed("a.", state), **prefixed("b.", state)}},
        {**state, **prefixed("_orig_mod.", state)},
    ):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"holds [23] networks .*save one of them alone"):
            weights.read_state_dict(tmp_path / "w.pt")


class Plain(nn.Module):
    """Named as the networks of other programs are."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def state(self) -> State:
        return {name: torch.zeros(2) for name in self.names}


KEYS: dict[str, tuple[tuple[str, ...], str]] = {
    "Stable Diffusion": (
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
            "first_stage_model.encoder.conv_in.weight",
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
        ),
        "Stable Diffusion",
    ),
    "its network alone": (("input_blocks.0.0.weight", "input_blocks.1.1.proj_in.weight"), "Stable Diffusion's kind"),
    "diffusers": (("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.bias"), "diffusers"),
    "LoRA": (("lora_unet_down_blocks_0.lora_up.weight",), "LoRA"),
    "EDM": (("model.map_layer0.weight", "model.enc.64x64_conv.weight"), "EDM"),
    "DiT": (("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight"), "transformer"),
    "lucidrains": (("init_conv.weight", "downs.0.0.block1.proj.weight"), "denoising-diffusion-pytorch"),
    "DDIM": (("temb.dense.0.weight", "down.0.block.0.norm1.weight"), "DDIM"),
    "score_sde": (("module.all_modules.0.weight",), "score_sde"),
}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, None], ids=["", "wrapped", "safetensors"])
@pytest.mark.parametrize("whose", KEYS)
def test_networks_of_other_programs(whose: str, wrap: Any, tmp_path: Path) -> None:
    names, word = KEYS[whose]
    file = tmp_path / "net.ckpt"
    if wrap is None:
        safetensors.torch.save_file(Plain(*names).state(), file)
    else:
        torch.save(wrap(Plain(*names).state()), file)
    with pytest.raises(UserError, match="fastdiff reads weights of improved-diffusion's network") as found:
        weights.read_state_dict(file)
    assert f"{file} holds " in str(found.value)
    assert word in str(found.value)


def zipped(entries: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(name: str, mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.zeros((2, 4, 4, 3), np.uint8))
    return file.getvalue()


FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty.pt": (b"", ("is empty", "download it again")),
    "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", ("Git LFS", "git lfs pull")),
    "page.pt": (b"\r\n<!DOCTYPE html><html><title>404", ("web page", "download it again")),
    "page with a mark.pt": (b"\xef\xbb\xbf<html>", ("web page",)),
    "denied.pt": (b'<?xml version="1.0"?><Error><Code>AccessDenied', ("XML", "AccessDenied", "download it again")),
    "answer.pt": (b'{"error": "Repository not found"}', ("text", "Repository not found", "download it again")),
    "long.pt": (("é" * 400).encode(), ("text",)),
    "net.h5": (b"\x89HDF\r\n\x1a\n" + bytes(90), ("HDF5", "Keras")),
    "net.keras": (zipped({"config.json": b"{}", "model.weights.h5": b""}), ("Keras",)),
    "net.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(99), ("ONNX",)),
    "unnamed onnx.bin": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(99), ("ONNX",)),
    "saved_model.pb": (b"\x0a\x01\x02", ("TensorFlow",)),
    "net.gguf": (b"GGUF\x03\0\0\0", ("GGUF",)),
    "samples.npz": (arrays(), ("npz",)),
    "one.npy": (b"\x93NUMPY\x01\0v\0{'descr'", ("NumPy",)),
    "cat.pt": (b"\x89PNG\r\n\x1a\n", ("picture",)),
    "a net.zip": (zipped({"nets/model.pt": b"PK"}), ("zip archive of model.pt", "unzip '", "a net.zip' -d FOLDER")),
    "other.zip": (zipped({"readme": b""}), ("zip archive",)),
    "net.tar": (tarred("model.pt", "w"), ("tar archive", "tar -xf")),
    "net.tar.gz": (tarred("model.pt", "w:gz"), ("gzip", "tar -xf")),
    "net.pt.xz": (b"\xfd7zXZ\0\0", ("xz",)),
    "mp_rank_00_model_states.pt": (b"PK", ("DeepSpeed", "zero_to_fp32.py")),
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": (b"PK", ("DeepSpeed", "zero_to_fp32.py")),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds(name: str, tmp_path: Path) -> None:
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as found:
        fastdiff.load(tmp_path / name)
    assert str(found.value).startswith(f"load: {tmp_path / name} is ")
    assert all(word in str(found.value) for word in words), found.value


def test_truncated_files(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pt")
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    for name in ("net.pt", "net.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for size in (1, 9, 700, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(UserError, match="is not a checkpoint"):
                weights.read_state_dict(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "net.pt"))
    with pytest.raises(UserError, match=r"TorchScript archive.*torch.jit.load\('.*net.pt'\).state_dict"):
        weights.read_state_dict(tmp_path / "net.pt")


@pytest.mark.filterwarnings("ignore")
def test_states_of_training(state: State, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    optimizer.step()
    contents = {
        "opt000004.pt": (optimizer.state_dict(), "holds no state_dict but an optimizer's state"),
        "deepspeed.pt": ({"module": state, "ds_version": "0.19", "ds_config": {}}, "DeepSpeed.*zero_to_fp32"),
        "state.pt": ({"updates": 3, "loader": {}, "meter": {"sums": torch.zeros(3)}}, "but the state of a run; give"),
        "gradients.pt": ({"means": {"a": torch.zeros(3)}}, "but tensors such as 'a'; give a file of its weights"),
        "lists.pt": ({"shadow_params": list(state.values())}, "holds no state_dict"),
        "text.pt": ({"model": {"input_blocks.0.0.weight": "none"}}, "holds no state_dict"),
    }
    for name, (content, words) in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=words):
            weights.read_state_dict(tmp_path / name)


def test_pickles_with_objects_say_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a pickle is executed, and EDM's are recognised by the module that they name."""
    module = types.ModuleType("torch_utils.persistence")
    ran: list[int] = []

    def _reconstruct_persistent_obj(meta: object) -> None:
        ran.append(1)

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Persistent:
        def __reduce__(self) -> tuple[Any, ...]:
            return module._reconstruct_persistent_obj, ({"type": "class"},)

    (tmp_path / "network-snapshot-002000.pkl").write_bytes(pickle.dumps({"ema": Persistent()}))
    with pytest.raises(UserError, match="it is refused.*EDM"):
        weights.read_state_dict(tmp_path / "network-snapshot-002000.pkl")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "whole.pt")
    with pytest.raises(UserError, match=r"it is refused.*save its weights alone: torch.save\(model.state_dict"):
        weights.read_state_dict(tmp_path / "whole.pt")
    assert not ran


FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "pipeline": (("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"), "diffusers"),
    "part of one": (("config.json", "diffusion_pytorch_model.bin"), "diffusers"),
    "no index": (("unet/config.json",), "diffusers"),
    "run of DeepSpeed": (("latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"), "zero_to_fp32.py"),
    "without its script": (("global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt",), "zero_to_fp32.py"),
    "step": (("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"), "zero_to_fp32.py"),
    "job": (("job.json", "samples_4x8x8x3.npz"), "sampling job"),
    "TensorFlow": (("checkpoint", "model.ckpt-9.index", "model.ckpt-9.data-00000-of-00001"), "TensorFlow"),
    "others": (("epoch=3.ckpt", "pytorch_model.bin"), "name one of its files: epoch=3.ckpt, pytorch_model.bin"),
    "folder of runs": (("a/checkpoints/log", "b/checkpoints/log"), "name one of its runs: a, b"),
    "nothing": (("readme",), "holds no checkpoint"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_other_programs(kind: str, tmp_path: Path) -> None:
    names, words = FOLDERS[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(UserError, match="holds no checkpoint") as found:
        weights.find(str(tmp_path))
    assert words in str(found.value)
