"""Cases of settings: JSON files and command lines, drawn from the settings' own fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fastdiff.config import load as config
from fastdiff.config.load import load
from fastdiff.config.sections import Config, EvaluateConfig, SuperResConfig
from fastdiff.errors import UserError
from fuzz.cases import READ, Case, generator
from fuzz.damage import damage

T = TypeVar("T")
_BLOCK = 50
SECTIONS = ("model", "diffusion", "data", "train", "sample", "nll", "evaluate")
# Script → its sections, its kind of settings, and the setting that names a checkpoint.
SCRIPTS: dict[str, tuple[tuple[str, ...], type[Config], tuple[str, str]]] = {
    "train": (("model", "diffusion", "data", "train"), Config, ("train", "resume_checkpoint")),
    "super_res_train": (("model", "diffusion", "data", "train"), SuperResConfig, ("train", "resume_checkpoint")),
    "sample": (("model", "diffusion", "sample"), Config, ("sample", "model_path")),
    "super_res_sample": (("model", "diffusion", "sample"), SuperResConfig, ("sample", "model_path")),
    "nll": (("model", "diffusion", "data", "nll"), Config, ("nll", "model_path")),
    "evaluate": (("model", "diffusion", "sample", "evaluate"), EvaluateConfig, ("sample", "model_path")),
}


def _fields() -> dict[str, tuple[str, ...]]:
    """Section → its settings, of all kinds."""
    found: dict[str, dict[str, None]] = {section: {} for section in SECTIONS}
    for kind in (Config, SuperResConfig, EvaluateConfig):
        for section in SECTIONS:
            settings = kind.model_fields[section].annotation
            found[section] |= dict.fromkeys(settings.model_fields)  # type: ignore[union-attr]
    return {section: tuple(names) for section, names in found.items()}


FIELDS = _fields()
_NAMES = tuple(name for names in FIELDS.values() for name in names)
_ODD = (
    *("", " ", "auto", "True", "none", "null", "nan", "inf", "-inf", "1e999", "1e-400", "0x10", "1_000", "٣", "½"),
    *("16,8", "1,2,,4", ",", "64x96", "64x", "x", "0x0", "9" * 5000, "-" * 50, "ddim50", "ddim0", "10,15,20", "a\nb"),
    *("30min", "2h", "0min", "1e9h", "\x1b[2J", "..", "/", "/dev/null", "/proc/self/mem", "a" * 5000, "ä€😀", "%s%n"),
    *("{}", "[]", '"', "--", "-1", "cifar10_uncond", "upsample_256", "no\u2028line", "1,0.5", "0.2,5", "fp16"),
)

texts = st.one_of(st.sampled_from(_ODD), st.text(max_size=20))
numbers = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from([2**31, 2**32, 2**63, -(2**63) - 1, 10**30, 10**400]),
    st.floats(),
    st.floats(0, 2),
)
plain = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def _section(names: tuple[str, ...]) -> SearchStrategy[dict[str, Any]]:
    known = st.sampled_from(names)
    return st.dictionaries(st.one_of(known, known, known, known, texts), values, max_size=3)


deepspeed = st.dictionaries(
    st.one_of(
        texts,
        st.sampled_from(
            ["fp16", "bf16", "zero_optimization", "train_batch_size", "optimizer", "gradient_clipping", "amp"]
            + ["train_micro_batch_size_per_gpu", "steps_per_print"]
        ),
    ),
    st.one_of(values, st.dictionaries(st.sampled_from(["enabled", "stage", "loss_scale"]), values)),
    max_size=3,
)
files = st.one_of(
    st.fixed_dictionaries({}, optional={name: _section(fields) for name, fields in FIELDS.items()}),
    st.fixed_dictionaries({}, optional={name: _section(fields) for name, fields in FIELDS.items()}),
    st.fixed_dictionaries({"deepspeed": deepspeed}),
    st.dictionaries(st.one_of(st.sampled_from([*SECTIONS, "deepspeed"]), texts), values, max_size=3),
    values,
)
argv_text = texts.map(lambda text: text.replace("\0", ""))  # no command line can hold it
flags = st.one_of(
    st.sampled_from(_NAMES).map("--{}".format),
    st.sampled_from(_NAMES).map("--{}".format),
    st.sampled_from(["--config", "--deepspeed", "--dry_run", "--print_config", "--local_rank", "--out", "--help", "-"]),
    argv_text,
)
pairs = st.tuples(flags, st.one_of(argv_text, st.integers(-2, 999).map(str), st.none()), st.booleans())
lines = st.lists(pairs, max_size=4).map(
    lambda found: [
        word
        for flag, value, joined in found
        for word in ([flag] if value is None else [f"{flag}={value}"] if joined else [flag, value])
    ]
)


def drawn(strategy: SearchStrategy[T], seed: int, start: int, stop: int) -> Iterator[T]:
    """Examples start to stop - 1 of a seed, drawn by hypothesis a block at a time."""
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        found = _examples(strategy, seed * 100_003 + block)
        for index in range(block * _BLOCK, (block + 1) * _BLOCK):
            if start <= index < stop:
                yield found[index % _BLOCK % len(found)]


def _examples(strategy: SearchStrategy[T], seed: int) -> list[T]:
    found: list[T] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=_BLOCK,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(example: T) -> None:
        found.append(example)

    collect()
    return found


def _load(script: str, argv: list[str]) -> tuple[str, str]:
    sections, kind, checkpoint = SCRIPTS[script]
    try:
        load(argv, description="", sections=sections, kind=kind, checkpoint=checkpoint)
    except SystemExit as end:
        if end.code:
            raise
    return READ, ""


def _no_network() -> None:
    def refuse(preset: Any, *_: Any, **__: Any) -> Path:
        raise UserError(f"--preset {preset.name}: no network here")

    config.download = refuse


def settings(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """JSON files whose values are of any type."""
    _no_network()
    file = folder / "settings.json"
    names = (str(file), "--", "deepspeed", *_NAMES)
    for index, content in enumerate(drawn(files, seed, start, stop), start):
        file.write_text(json.dumps(content))
        script = list(SCRIPTS)[index % len(SCRIPTS)]
        argv = ["--config", str(file)] + ["--print_config"] * (index % 3 == 0)
        yield Case(f"json for {script}", lambda script=script, argv=argv: _load(script, argv), names)


def words(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """Command lines."""
    _no_network()
    for index, argv in enumerate(drawn(lines, seed, start, stop), start):
        script = list(SCRIPTS)[index % len(SCRIPTS)]
        yield Case(f"words for {script}", lambda script=script, argv=argv: _load(script, argv))


_WHOLE = json.dumps(
    {
        "model": {"image_size": 32, "num_channels": 64, "attention_resolutions": "16,8", "dropout": 0.1},
        "diffusion": {"diffusion_steps": 100, "noise_schedule": "cosine"},
        "data": {"data_dir": "images", "random_flip": True},
        "train": {"lr": 1e-4, "batch_size": 8, "ema_rate": "0.9999"},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    },
    indent=1,
)
_TEXTS: tuple[bytes, ...] = (
    b"",
    b"null",
    b"NaN",
    b"[" * 100_000,
    b'{"deepspeed":' * 3000 + b"1" + b"}" * 3000,
    b'{"deepspeed": {"a": ' + b"[" * 60 + b"]" * 60 + b"}}",
    b'{"train": {"lr": 1' + b"0" * 5000 + b"}}",
    b'{"train": {"lr": 1e999}}',
    b'{"deepspeed": {"a": -Infinity}}',
    b'{"train": {"lr": 1, "lr": 2}}',
    b'{"train": {}, "train": {}}',
    b'{"train": {"lr": "\xff\xfe"}}',
    b'{"train": {"lr": "\\ud800"}}',
    b'{"\\ud800\\n": {}}',
    b'{"train": {"\\u0000": 1}}',
    b"\xef\xbb\xbf{}",
    '{"train": {}}'.encode("utf-16"),
    b"\xff\xfe\x00",
    b"{" + b" " * (2 << 20) + b"}",
    b"[" + b"[]," * 340_000 + b"[]]",
)


def json_texts(folder: Path, seed: int, start: int, stop: int) -> Iterator[Case]:
    """Files of settings with damaged text, and texts that are hard for parsers."""
    _no_network()
    file = folder / "text.json"
    for index in range(start, stop):
        rng = generator(seed, "json", index)
        if index % 8 == 0:
            name, data = "hard", _TEXTS[index // 8 % len(_TEXTS)]
        else:
            name, data = damage(_WHOLE.encode(), rng)
        file.write_bytes(data)
        script = rng.choice(["train", "sample", "nll"])
        flag = "--deepspeed" if script == "train" and rng.random() < 0.1 else "--config"
        case = f"{name} text for {script}"
        yield Case(case, lambda s=script, f=flag: _load(s, [f, str(file)]), (str(file), "deepspeed", *_NAMES))
