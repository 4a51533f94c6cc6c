"""Cases of .pt files: damaged ones, forged ones, and pickles that would run code."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import random
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import info_for, unet
from torch import Tensor

from fastdiff import sample
from fastdiff.config.checkpoint import open_checkpoint, open_network, settings_of
from fastdiff.config.load import describe
from fastdiff.models import weights
from fuzz.cases import MARKER, READ, Case, generator
from fuzz.damage import damage

State = dict[str, Any]


def saved(content: Any, **options: Any) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Sets(OrderedDict):
    """A dictionary that is pickled with attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), self.attributes, None, iter(self.items())


def code(rng: random.Random) -> Any:
    """An object whose unpickling runs code, in one of several ways."""
    write = f"open({MARKER!r}, 'w').close()"
    return rng.choice(
        [
            Calls(os.system, f"touch {MARKER}"),
            Calls(builtins.eval, f"open({MARKER!r}, 'w')"),
            Calls(builtins.exec, write),
            Calls(subprocess.getoutput, f"touch {MARKER}"),
            Calls(Path.touch, Path(MARKER)),
            Calls(os.mkdir, MARKER),
            Calls(builtins.getattr, 1, "real"),
            Calls(pickle.loads, pickle.dumps(Calls(builtins.exec, write))),
            Calls(torch.load, "other.pt", None, None),
            Calls(builtins.open, MARKER, "w"),
            Calls(builtins.bytearray, 2_000_000_000),
        ]
    )


class World:
    """Valid checkpoints to start from."""

    def __init__(self) -> None:
        model = unet()
        self.state: State = {name: value.clone() for name, value in model.state_dict().items()}
        self.info = info_for(model)
        self.whole = saved(weights.with_info(self.state, self.info))
        self.bare = saved(self.state)
        self.legacy = saved(self.state, _use_new_zipfile_serialization=False)


def damaged(world: World, rng: random.Random) -> tuple[str, bytes]:
    base = rng.choice([world.whole, world.whole, world.bare, world.legacy])
    if rng.random() < 0.3:  # near the end, where a zip keeps its list of parts
        at = len(base) - rng.randrange(min(20_000, len(base)))
        name, tail = damage(base[at:], rng)
        return f"{name} the end", base[:at] + tail
    if rng.random() < 0.3 and base is not world.legacy:
        return repacked(world, rng)
    name, data = damage(base, rng)
    return f"{name} all", data


def repacked(world: World, rng: random.Random) -> tuple[str, bytes]:
    """A zip with changed members and valid checksums."""
    source = zipfile.ZipFile(io.BytesIO(world.whole))
    buffer = io.BytesIO()
    way = rng.choice(["pickle", "part", "missing", "deflated", "bomb", "empty", "twice", "byteorder", "numel"])
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if way == "deflated" else zipfile.ZIP_STORED) as target:
        names = source.namelist()
        chosen = rng.choice(names)
        for name in names:
            data = source.read(name)
            is_pickle = name.endswith("data.pkl")
            if way == "pickle" and is_pickle:
                data = damage(data, rng)[1]
            elif way == "numel" and is_pickle:
                data = _declare_more(data, rng)
            elif way == "byteorder" and name.endswith("byteorder"):
                data = rng.choice([b"big", b"middle", b""])
            elif way == "part" and name == chosen:
                data = damage(data, rng)[1]
            elif way == "missing" and name == chosen:
                continue
            elif way == "empty" and "/data/" in name:
                data = b""
            elif way == "bomb" and name == chosen:
                target.writestr(name, bytes(50_000_000), zipfile.ZIP_DEFLATED, 1)
                continue
            target.writestr(name, data)
        if way == "twice":
            target.writestr("archive/data.pkl", b"other")
    return f"repacked {way}", buffer.getvalue()


def _declare_more(data: bytes, rng: random.Random) -> bytes:
    """A pickle whose storages and tensors claim to have far more elements than the file."""
    numbers = [i for i in range(len(data) - 2) if data[i : i + 1] in b"KM" and rng.random() < 0.02]
    changed = bytearray(data)
    for at in reversed(numbers):
        width = 2 if changed[at : at + 1] == b"K" else 3
        changed[at : at + width] = b"J" + rng.choice([2**31 - 1, 2**24, 2**30, -1]).to_bytes(4, "little", signed=True)
    return bytes(changed)


def hostile(world: World, rng: random.Random) -> tuple[str, bytes]:
    """Code at the top, among the tensors, among the settings, and in other formats of files."""
    content: Any = code(rng)
    place = rng.choice(["top", "value", "key", "nested", "metadata", "attribute"])
    if place == "value":
        content = {**world.state, "out.2.bias": content}
    elif place == "key":
        content = {**world.state, 1: content}
    elif place == "nested":
        content = {**world.state, "more": {"deep": [{"deeper": (content,)}]}}
    elif place == "metadata":
        carrier = OrderedDict(world.state)
        carrier._metadata = {"fastdiff": content}  # type: ignore[attr-defined]
        content = carrier
    elif place == "attribute":
        tensor = torch.nn.Parameter(torch.ones(2))
        tensor.more = content  # type: ignore[attr-defined]
        content = {**world.state, "x": tensor}
    form = rng.choice(["zip", "legacy", "pickle", "protocol 0"])
    if form == "zip":
        return f"code {place}", saved(content)
    if form == "legacy":
        return f"code {place} legacy", saved(content, _use_new_zipfile_serialization=False)
    if place in ("top", "nested"):
        return "code pickle", pickle.dumps({"a": code(rng)}, protocol=0 if form == "protocol 0" else 4)
    return "code pickle", pickle.dumps(code(rng), protocol=0 if form == "protocol 0" else 2)


def forged(world: World, rng: random.Random) -> tuple[str, bytes]:
    """Valid files whose contents are not those of a network."""
    state: State = dict(world.state)
    name = rng.choice(list(state))
    value: Tensor = state[name]
    looped: State = {}
    looped["a"] = [looped]
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    laughs: Any = [1]
    for _ in range(40):
        laughs = [laughs, laughs]
    shadow = Sets(state)
    shadow.attributes = {"values": 1, "items": 2, "keys": 3, "_metadata": rng.choice([7, {"fastdiff": 5}])}
    ways: dict[str, Callable[[], Any]] = {
        "missing": lambda: {k: v for k, v in state.items() if k != name},
        "extra": lambda: {**state, "more": torch.ones(3)},
        "renamed": lambda: {f"module.{k}": v for k, v in state.items()},
        "dtype": lambda: {**state, name: value.to(rng.choice([torch.int8, torch.bool, torch.complex64, torch.half]))},
        "nan": lambda: {**state, name: value * float("nan")},
        "transposed": lambda: {**state, name: value.flatten()[None]},
        "scalar": lambda: {**state, name: torch.tensor(1.0)},
        "empty": lambda: {**state, name: torch.empty(0)},
        "huge": lambda: {**state, name: torch.ones(1).expand(10**12)},
        "wide": lambda: {**state, "input_blocks.0.0.weight": torch.ones(1).expand(2**20, 3, 3, 3)},
        "broad": lambda: {k: torch.ones(1).expand(2**12 * max(v.shape[0], 1), *v.shape[1:]) for k, v in state.items()},
        "meta": lambda: {**state, name: torch.empty(10**9, device="meta")},
        "sparse": lambda: {**state, name: torch.ones(3).to_sparse()},
        "quantized": lambda: {**state, name: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)},
        "nothing": lambda: {},
        "none": lambda: None,
        "number": lambda: 5,
        "list": lambda: [torch.ones(1)],
        "tensor": lambda: torch.ones(1),
        "texts": lambda: {"a": "b"},
        "numbered": lambda: {1: torch.ones(1)},
        "loop": lambda: looped,
        "deep": lambda: {"a": deep},
        "laughs": lambda: {"a": laughs},
        "shadow": lambda: shadow,
        "optimizer": lambda: {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []},
    }
    way = rng.choice(list(ways))
    return f"forged {way}", saved(ways[way](), _use_new_zipfile_serialization=rng.random() < 0.8)


_VALUES = (None, True, -1, 0, 1.5, 2**70, 10**12, 1e300, "", "x", "9" * 400, [], [1], {}, {"a": 1}, "1,2,2,2", "512")


def settings(world: World, rng: random.Random) -> tuple[str, bytes]:
    """Valid weights with invalid settings."""
    info = json.loads(json.dumps(world.info))
    for _ in range(rng.choice([1, 1, 3])):
        section = rng.choice(["model", "diffusion"])
        place = rng.random()
        if place < 0.6 and isinstance(info.get(section), dict):
            info[section][rng.choice([*info[section], "strange"])] = rng.choice(_VALUES)
        elif place < 0.8:
            info[rng.choice([*info, "strange"])] = rng.choice(_VALUES)
        else:
            info.pop(rng.choice(list(info)), None)
            info = info or {"kind": "unet"}
    carrier = weights.with_info(world.state, info)
    text = json.dumps(info)
    if rng.random() < 0.2:
        text = damage(text.encode(), rng)[1].decode(errors="replace")
    if rng.random() < 0.1:
        text = rng.choice(["[" * 5000, "null", "[]", "1", '{"kind": NaN}', '{"kind": ' + "1" * 5000 + "}"])
    carrier._metadata = {"fastdiff": text}  # type: ignore[attr-defined]
    return "settings", saved(carrier)


_SAFETENSORS = b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}      \0\0\0\0'


def other(world: World, rng: random.Random) -> tuple[str, bytes]:
    """Files of other kinds."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    return "other", rng.choice(
        [
            b"",
            b"\0" * 1000,
            b"text",
            _SAFETENSORS,
            buffer.getvalue(),
            b"PK\x03\x04",
            b"PK\x05\x06" + bytes(18),
            b"\x80\x02" + rng.randbytes(100),
            b"\x80\x04r\xff\xff\xff\xff.",
            b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
            rng.randbytes(3000),
            b"\x1f\x8b" + rng.randbytes(50),
            b"\x93NUMPY\x01\0v\0{}",
        ]
    )


MAKERS = (damaged, damaged, damaged, hostile, hostile, forged, forged, settings, settings, other)


def _make(folder: Path, kind: str, seed: int, start: int, stop: int) -> Iterator[tuple[str, Path]]:
    world = World()
    (folder / "other.pt").write_bytes(world.bare)
    for index in range(start, stop):
        rng = generator(seed, kind, index)
        makers = MAKERS if kind == "checkpoints" else (forged, settings, settings, damaged)
        name, data = rng.choice(makers)(world, rng)
        file = folder / "ema_0.9999_000001.pt"
        file.write_bytes(data)
        yield name, file


def cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """Read the file, determine its settings, and open the network."""

    def run(file: Path) -> tuple[str, str]:
        checkpoint = open_checkpoint(str(file))
        settings_of(checkpoint, super_res=False)
        config = describe(checkpoint)
        open_network(config.model, config.diffusion, checkpoint, "fp32", torch.device("cpu"))
        return READ, ""

    for name, file in _make(folder, "checkpoints", seed, start, stop):
        yield Case(name, lambda file=file: run(file), (str(file),))


def sampling_cases(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """Run sample.py with the file."""

    def run(file: Path) -> tuple[str, str]:
        words = f"--model_path {file} --num_samples 1 --batch_size 1 --timestep_respacing 2 --out_dir out"
        sample.main([*words.split(), "--overwrite", "True", "--diffusion_steps", "6"])
        return READ, ""

    for name, file in _make(folder, "sampling", seed, start, stop):
        yield Case(name, lambda file=file: run(file), (str(file), "--", "diffusion_steps", "model_path"))
