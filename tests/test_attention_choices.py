"""The table of measured choices of attention: reading it, following it, and compiling what it chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastdiff.kernels import reference
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from fastdiff import attention_choices, ops
from fastdiff.attention_choices import Entry, Key
from fastdiff.errors import UserError
from fastdiff.runtime.machine import compile_kwargs

GPU = torch.device("cuda", 0)
NAME = "NVIDIA H100 80GB HBM3"


def entry(way: str, D: int = 144, work: str = "training", gpu: str = NAME) -> Entry:
    """Return an entry with made-up figures."""
    return Entry(Key(gpu, "bfloat16", D, 256, work), way, {way: [1.0, 2.0, 3.0]}, "2026-01-02", "2.13.0", "3.6.0")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | list[Entry]], Path]:
    """Return a function that puts a table of these entries, or a file of this text, in the place of the package's."""

    def make(content: str | list[Entry]) -> Path:
        file = tmp_path / "choices.json"
        if isinstance(content, str):
            file.write_text(content)
        else:
            attention_choices.write(file, content)
        monkeypatch.setattr(attention_choices, "FILE", file)
        attention_choices._table.cache_clear()
        return file

    monkeypatch.setattr(attention_choices, "device_name", lambda device: NAME)
    return make


def on_gpu(dtype: torch.dtype = torch.bfloat16, requires_grad: bool = True) -> Any:
    """Return what `attention_way` reads of a CUDA tensor."""
    return SimpleNamespace(is_cuda=True, device=GPU, dtype=dtype, requires_grad=requires_grad)


def test_the_package_has_a_table() -> None:
    assert attention_choices.read(attention_choices.FILE).keys() >= set()
    assert attention_choices.FILE.name in (Path(__file__).parents[1] / "setup.py").read_text()


def test_table_on_disk(table: Any) -> None:
    """What is written is read again, with one entry a line."""
    entries = [entry("cudnn"), entry("ours", 64), entry("flash", work="drawing")]
    file = table(entries)
    assert attention_choices.read(file) == {each.key: each for each in entries}
    assert len(file.read_text().splitlines()) == len(entries) + 2
    assert json.loads(file.read_text())[0]["D"] == 64
    attention_choices.write(file, [])
    assert attention_choices.read(file) == {}


def test_an_entry_is_followed_where_it_fits(table: Any) -> None:
    table([entry("cudnn"), entry("flash", work="drawing"), entry("ours", 64), entry("efficient", 96, gpu="another")])
    assert ops.attention_way(on_gpu(), 256, 144) == "cudnn"
    assert ops.attention_way(on_gpu(requires_grad=False), 256, 144) == "flash"
    assert ops.attention_way(on_gpu(), 256, 64) == "ours", "where the rule says sdpa"
    assert ops.attention_way(on_gpu(), 256, 96) == "sdpa", "the entry is of another GPU"
    assert ops.attention_way(on_gpu(torch.float16), 256, 144) == "ours", "the entry is of another dtype"
    assert ops.attention_way(on_gpu(), 64, 144) == "ours", "the entry is of another length"
    for mode in ("triton", "reference"):
        with ops.using(mode, anywhere=True):  # type: ignore[arg-type]
            assert ops.attention_way(on_gpu(), 256, 144) == "ours", "only auto follows measurements"


def test_the_log_names_the_choices(table: Any) -> None:
    said = lambda: next(choice for choice in ops.choices(GPU) if choice.op == "attention")
    table([entry("efficient", gpu="another")])
    rule = "head sizes that flash attention pads or refuses; else SDPA"
    assert said() == ("attention", "Triton", rule)
    table([entry("cudnn"), entry("ours", 64), entry("cudnn", work="drawing")])
    assert said() == ("attention", "as measured", f"on this GPU (cudnn 2, ours 1); at other sizes Triton for {rule}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[{", "is not JSON"),
        ("{}", "must be a list of entries"),
        ("[3]", "3 must be an entry with gpu, dtype, D, L, work and a way"),
        (json.dumps([{"gpu": NAME, "way": "cudnn"}]), "must be an entry"),
        (json.dumps([{**entry("math").key._asdict(), **entry("math")._asdict(), "key": 0}]), "not 'math'"),
        (json.dumps([{**entry("ours").key._asdict(), **entry("ours")._asdict(), "key": 0, "L": [1]}]), "words and"),
    ],
)
def test_a_damaged_table(table: Any, text: str, reason: str) -> None:
    """The tool that writes tables refuses it; a run follows the rule, and its log says why."""
    file = table(text)
    with pytest.raises(UserError, match=reason):
        attention_choices.read(file)
    assert ops.attention_way(on_gpu(), 256, 144) == "ours"
    line = next(choice.reason for choice in ops.choices(GPU) if choice.op == "attention")
    assert "; measured choices are not used: " in line
    assert str(file) in line


def test_a_missing_table(table: Any) -> None:
    table([]).unlink()
    assert ops.attention_way(on_gpu(), 256, 64) == "sdpa"
    assert "measured choices are not used" in str(ops.choices(GPU))


@pytest.mark.parametrize("way", ["sdpa", "flash", "cudnn", "efficient"])
def test_only_the_wanted_backend_is_asked(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may use no other during the call; before and after it chooses among all, in its own order."""
    before, seen = _cur_sdpa_kernel_backends(with_priority=True), list[list[SDPBackend]]()
    attend = F.scaled_dot_product_attention

    def recorded(*args: Tensor) -> Tensor:
        seen.append(_cur_sdpa_kernel_backends())
        with sdpa_kernel(before):
            return attend(*args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(ops, "attention_way", lambda *_: way)
    qkv = torch.randn(2, 16, 3 * 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ops.attention(qkv, 2), reference.attention(qkv, 2))
    assert [set(found) for found in seen] == [set(before) if way == "sdpa" else {ops._BACKENDS[way]}]
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_deterministic_runs_follow_the_rule(table: Any) -> None:
    table([entry("cudnn")])
    torch.use_deterministic_algorithms(True)
    try:
        assert ops.attention_way(on_gpu(), 256, 144) == "ours"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_table_is_read_while_tracing(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph without breaks the chosen backend is a constant, and the table is no part of the graph."""
    table([entry("efficient", 16), entry("flash", 16, work="drawing")])
    monkeypatch.setitem(ops._BACKENDS, "efficient", SDPBackend.MATH)  # which a CPU has
    choose = lambda x, L, D: attention_choices.measured(GPU, torch.bfloat16, 256, D, x.requires_grad)
    monkeypatch.setattr(ops, "attention_way", choose)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    attend = torch.compile(lambda x: ops.attention(x, 2), backend=keep, fullgraph=True, dynamic=False)
    qkv = torch.randn(2, 16, 96, generator=torch.Generator().manual_seed(0))
    for x, backend in ((qkv, "FLASH_ATTENTION"), (qkv.clone().requires_grad_(), "MATH")):
        torch.testing.assert_close(attend(x), reference.attention(x, 2))
        named = [node.args[0] for node in graphs[-1].graph.nodes if "backend" in str(node.target)]
        assert named[0] == backend
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # Inductor's own
def test_compiled_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph with a chosen backend is found in PyTorch's cache, and one with another backend is another graph."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(ops._BACKENDS, "cudnn", SDPBackend.MATH)  # which a CPU has
    qkv = torch.randn(2, 16, 96, requires_grad=True)

    def found(way: str) -> int:
        monkeypatch.setattr(ops, "attention_way", lambda *_: way)
        torch.compiler.reset()
        counters.clear()
        torch.compile(lambda x: ops.attention(x, 2), **compile_kwargs(GPU))(qkv).sum().backward()
        assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
        return counters["aot_autograd"]["autograd_cache_hit"]

    assert [found(way) for way in ("flash", "flash", "cudnn", "cudnn")] == [0, 1, 0, 1]
