"""The group norm with a sum agrees with float64, with torch at the same dtype and with the norm of the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastdiff.kernels import group_norm_silu_eager, launch, reference
from fastdiff.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu
from functorch.compile import make_boxed_func
from helpers.kernel_checks import DEVICE, DTYPES, assert_no_worse, channels_last, error, normal
from helpers.norm_plans import WAYS, planned
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from fastdiff import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Inputs = dict[str, Any]


def inputs(
    B: int, C1: int, C2: int, H: int, W: int, dtype: torch.dtype, *, affine: bool = True, offset: bool = True,
    b_bias: bool = True, mean: float = 3.0, std: float = 1.0,
) -> Inputs:  # fmt: skip
    C = C1 + C2
    made: Inputs = {
        "a": channels_last(normal(B, C1, H, W, mean=mean, std=std, dtype=dtype)),
        "b": channels_last(normal(B, C1, H, W, seed=1, mean=-0.5, std=std, dtype=dtype)),
        "weight": normal(C, seed=2, mean=1.0),
        "bias": normal(C, seed=3),
    }
    if C2:
        made["skip"] = channels_last(normal(B, C2, H, W, seed=4, mean=-mean, std=2 * std, dtype=dtype))
    if affine:
        made["scale"], made["shift"] = normal(B, 2 * C, seed=5).chunk(2, dim=1)
    if offset:
        made["offset"] = normal(B, C, seed=6)
    if b_bias:
        made["b_bias"] = normal(C1, seed=7)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter cuts bf16 off: sums that are exact in it
        for name in {"a", "b", "b_bias"} & made.keys():
            made[name] = (made[name] * 16).round() / 16
    return made


def upstream(given: Inputs) -> tuple[Tensor, Tensor]:
    """Make gradients of total and of y."""
    B, C1, H, W = given["a"].shape
    C, dtype = given["weight"].shape[0], given["a"].dtype
    return (
        channels_last(normal(B, C1, H, W, seed=8, mean=-0.3, dtype=dtype)),
        channels_last(normal(B, C, H, W, seed=9, mean=0.5, dtype=dtype)),
    )


def run(
    function: Any, given: Inputs, gradients: tuple[Tensor | None, Tensor | None], dtype: torch.dtype | None = None,
    **settings: Any,
) -> Inputs:  # fmt: skip
    """Return results and gradients by name; a result whose gradient is None takes no part in the backward pass."""
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in given.items()}
    total, y = function(**{"b": None, **leaves}, **settings)
    used = [(z, gradient) for z, gradient in zip((total, y), gradients, strict=True) if gradient is not None]
    upstream = [gradient.to(z.dtype) for z, gradient in used]
    made = torch.autograd.grad([z for z, _ in used], list(leaves.values()), upstream)
    return {"total": total.detach(), "y": y.detach(), **dict(zip(leaves, made, strict=True))}


def check(given: Inputs, *, alone: bool = False, **settings: Any) -> Inputs:
    """Assert that results and gradients err at most twice as much as torch's at the same dtype.

    With `alone` nothing but the norm reads the sum, which then has no gradient of its own.
    """
    dtotal, dy = upstream(given)
    gradients = (None if alone else dtotal, dy)
    exact = run(reference.add_group_norm_silu, given, gradients, torch.float64, **settings)
    theirs = run(reference.add_group_norm_silu, given, gradients, **settings)
    ours = run(add_group_norm_silu, given, gradients, **settings)
    for name in exact:
        assert_no_worse(ours[name], theirs[name], exact[name], name)
    assert torch.equal(ours["total"], theirs["total"]), "one rounding of one sum"
    assert torch.equal(ours["a"], ours.get("b", ours["a"]))
    assert ours["total"].is_contiguous(memory_format=torch.channels_last)
    return ours


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_through_memory(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """5x3 pixels fill no block in any way, and groups contain channels of both maps."""
    planned(monkeypatch, **WAYS[way])
    check(inputs(2, 64, 32, 5, 3, dtype))


@pytest.mark.parametrize("size", [(1, 1), (6, 6), (7, 7)], ids=str)
@pytest.mark.parametrize("way", ["whole", "parts"])
def test_a_block_longer_than_the_map(way: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows of the block have no pixel; their empty sums must not reach the result as 0 / 0."""
    planned(monkeypatch, **{**WAYS[way], "rows": 64, "block_l": 64})
    check(inputs(2, 64, 32, *size, torch.float32))


@pytest.mark.parametrize("alone", [True, False], ids=["norm only", "read elsewhere"])
@pytest.mark.parametrize("b_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("way", WAYS)
def test_bias_and_gradient_of_the_sum(way: str, b_bias: bool, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, **WAYS[way])
    check(inputs(2, 32, 0, 3, 3, torch.float32, affine=False, offset=False, b_bias=b_bias), alone=alone)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_of_a_map_and_a_bias(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what a convolution without its bias leaves to the norm that follows."""
    planned(monkeypatch, **WAYS[way])
    given = inputs(2, 64, 32, 5, 3, dtype)
    del given["b"]
    check({"a": given.pop("a"), "b_bias": given.pop("b_bias"), **given})


SHAPES = {
    "one pixel": (2, 128, 0, 1, 1),
    "18 channels per group": (1, 384, 192, 1, 2),
    "a group across both maps": (1, 40, 24, 3, 2),
    "not square": (1, 64, 0, 2, 9),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    check(inputs(*SHAPES[shape], torch.bfloat16))


def test_vectors_with_gaps() -> None:
    """Vectors per channel need not lie close together."""
    given = inputs(2, 64, 0, 4, 3, torch.float32)
    given["b_bias"], given["weight"] = normal(128, seed=7)[::2], normal(1, seed=8, mean=1.0).expand(64)
    check(given)


def test_plain_norm_of_other_groups() -> None:
    """Without SiLU it is the norm before attention."""
    check(inputs(1, 64, 0, 3, 3, torch.float32, affine=False), silu=False, num_groups=16, eps=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_far_off_centre(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mean 100 and spread 0.1, E[x²] - E[x]² in float32 would leave one digit of the variance."""
    planned(monkeypatch, **WAYS[way])
    given = inputs(1, 64, 0, 4, 5, torch.float32, affine=False, offset=False, mean=100.0, std=0.1)
    check(given, silu=False)


@pytest.mark.parametrize("way", WAYS)
def test_same_as_the_norm_of_the_sum(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are bit-identical, also with dropout; the sum's own gradient is added before rounding."""
    planned(monkeypatch, **WAYS[way])
    given = inputs(2, 32, 32, 3, 5, torch.float32)
    settings = {"dropout": 0.3, "seed": torch.tensor([123456789123], device=DEVICE)}
    dtotal, dy = upstream(given)
    ours = run(add_group_norm_silu, given, (dtotal, dy), **settings)

    rest = {name: given[name] for name in given if name not in ("a", "b", "b_bias")}
    norm = lambda x, b, **rest: (x, group_norm_silu(x, **rest))
    alone = run(norm, {"x": ours["total"], **rest}, (None, dy), **settings)
    for name in ("y", *rest):
        assert torch.equal(ours[name], alone[name]), name
    assert torch.equal(ours["a"], alone["x"] + dtotal)
    assert error(ours["b_bias"], ours["a"].double().sum(dim=(0, 2, 3))) < 2e-5
    assert 0.2 < (ours["y"] == 0).double().mean().item() < 0.4


def test_bias_gradient_is_summed_before_rounding() -> None:
    """The map of gradients has 8 bits of each gradient, but the bias gets the sum in float32."""
    given = inputs(2, 32, 0, 16, 16, torch.bfloat16, affine=False, offset=False)
    dtotal, dy = upstream(given)
    exact = run(reference.add_group_norm_silu, given, (dtotal, dy), torch.float64)["b_bias"]
    ours = run(add_group_norm_silu, given, (dtotal, dy))
    from_map = error(ours["a"].double().sum(dim=(0, 2, 3)), exact)
    assert ours["b_bias"].dtype == torch.float32
    # The norm reads a rounded sum, which makes both gradients differ from float64.
    rounded = {**given, "a": ours["total"].float(), "b": torch.zeros_like(given["b"]).float()}
    rounded["b_bias"] = torch.zeros_like(given["b_bias"])
    same_sum = run(reference.add_group_norm_silu, rounded, (dtotal, dy), torch.float64)["b_bias"]
    assert error(ours["b_bias"], same_sum) < 1e-2 * from_map


@pytest.mark.parametrize("way", WAYS)
def test_equal_results_twice(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, **WAYS[way])
    given = inputs(2, 64, 32, 3, 3, torch.bfloat16)
    first, second = (run(add_group_norm_silu, given, upstream(given)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_sum_is_used() -> None:
    """The gradient of the sum passes through, and the norm's parameters get zeros."""
    given = inputs(1, 32, 0, 2, 2, torch.bfloat16, affine=False)
    dtotal, _ = upstream(given)
    ours = run(add_group_norm_silu, given, (dtotal, None))
    assert torch.equal(ours["a"], dtotal)
    assert torch.equal(ours["b"], dtotal)
    assert not ours["weight"].any()
    assert not ours["offset"].any()


def test_gradients_that_accumulate_share_no_memory() -> None:
    """a and b get the same gradient, but accumulating into one must not change the other."""
    given = inputs(1, 32, 0, 2, 2, torch.float32, affine=False, offset=False)
    a, b = (given.pop(name).requires_grad_() for name in "ab")
    upstreams = [channels_last(normal(*a.shape, seed=seed)) for seed in (8, 9)]
    for _ in range(2):
        torch.autograd.backward(add_group_norm_silu(a, b, **given), upstreams)
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, b.grad)
    a.grad.zero_()
    assert b.grad.any()


def test_empty_batch() -> None:
    given = inputs(0, 64, 0, 2, 2, torch.float32)
    ours = run(add_group_norm_silu, given, upstream(given))
    assert ours["total"].shape == ours["y"].shape == ours["a"].shape == (0, 64, 2, 2)
    assert not ours["b_bias"].any()


def test_parameters_in_half_precision() -> None:
    """DeepSpeed keeps parameters like this in bf16 training."""
    given = inputs(2, 32, 0, 3, 3, torch.bfloat16)
    for name in ("weight", "bias", "offset", "b_bias"):
        given[name] = given[name].bfloat16()
    assert check(given)["b_bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("elements", [2**30, 3 * 2**30])
def test_offsets_beyond_2_31(elements: int) -> None:
    """No argument of a kernel exceeds 32 bits, because offsets are computed from an int64 image number."""
    B, C, side = elements // 2**16, 64, 32
    meta = torch.empty(B, side, side, C, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
    one = torch.empty(C, device="meta")
    stats = torch.empty(B, 3, C, device="meta")
    with launch.record() as launches:
        norm = (one, one, None, None)
        launch.IMPLEMENTATIONS["add_group_norm_silu"](meta, meta, one, None, *norm, None, None, 32, 1e-5, True, 0.0)
        launch.IMPLEMENTATIONS["group_norm_silu_backward"](
            meta, meta, meta, None, meta, one, None, *norm, None, None, stats, 32, True, 0.0
        )
    assert all(abs(arg) < 2**31 for each in launches for arg in each.args if isinstance(arg, int))


@pytest.mark.filterwarnings("ignore:.*another layout")  # opcheck's own gradients are channels-first
def test_torch_checks() -> None:
    """Schema, fake implementation and autograd registration agree with what the op does."""
    given = inputs(1, 32, 32, 2, 2, torch.float32)
    for name in given:
        given[name].requires_grad_()
    args = [given.get(n) for n in ("a", "b", "b_bias", "skip", "weight", "bias", "scale", "shift", "offset")]
    torch.library.opcheck(torch.ops.fastdiff.add_group_norm_silu.default, (*args, None, 32, 1e-5, True, 0.0))


@pytest.mark.parametrize("alone", [True, False], ids=["norm only", "read elsewhere"])
def test_compiles_whole(alone: bool) -> None:
    """The op compiles in one graph and gives the same results and gradients."""
    given = inputs(1, 64, 0, 2, 3, torch.float32)
    dtotal, dy = upstream(given)

    def network(**given: Any) -> tuple[Tensor, Tensor]:
        total, y = add_group_norm_silu(**given)
        return total * 3, y * 2

    whole = torch.compile(network, fullgraph=True, backend="aot_eager")
    ours, plain = (run(f, given, (None if alone else dtotal, dy)) for f in (whole, network))
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


def test_no_map_of_zeros_in_a_compiled_graph() -> None:
    """If nothing else reads the sum, the backward graph passes no gradient for it."""
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(f"{node.target}{node.args}" for node in graph.graph.nodes if "norm_silu_backward" in str(node))
        return make_boxed_func(graph.forward)

    given = inputs(1, 64, 0, 2, 3, torch.float32)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    whole = torch.compile(lambda **kw: (add_group_norm_silu(**kw)[1],) * 2, fullgraph=True, backend=backend)
    run(whole, given, (None, upstream(given)[1]))
    calls = [call for call in seen if call.startswith("fastdiff")]
    assert len(calls) == 1
    assert calls[0].split(", ")[1] == "None"


BAD: dict[str, tuple[Inputs, str]] = {
    "no summand": ({"b": None}, "add_group_norm_silu needs b or b_bias; group_norm_silu is the norm of a alone"),
    "b's shape": ({"b": torch.zeros(1, 64, 2, 1)}, r"b of the shape of a, \(1, 64, 2, 2\); got \(1, 64, 2, 1\)"),
    "b's dtype": ({"b": torch.zeros(1, 64, 2, 2).half()}, "b in the dtype of a, torch.float32; got torch.float16"),
    "b_bias": ({"b_bias": torch.zeros(1, 64)}, r"b_bias of shape \(64,\), one per channel; got \(1, 64\)"),
    "weight": ({"weight": torch.zeros(32)}, r"add_group_norm_silu needs weight of shape \(64,\)"),
    "sequence": (
        {"a": torch.zeros(1, 64, 4), "b": torch.zeros(1, 64, 4)},
        r"a map a \[B, C, H, W\]; got a \(1, 64, 4\)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    changes, message = BAD[what]
    given = {name: torch.zeros(1, 64, 2, 2, device=DEVICE) for name in "ab"}
    given |= {name: torch.ones(64, device=DEVICE) for name in ("weight", "bias")}
    with pytest.raises(ValueError, match=message):
        add_group_norm_silu(
            **given | {name: None if value is None else value.to(DEVICE) for name, value in changes.items()}
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_on_a_cpu(dtype: torch.dtype) -> None:
    given = {name: value.cpu() for name, value in inputs(2, 64, 32, 5, 3, dtype).items()}
    gradients = tuple(gradient.cpu() for gradient in upstream(given))
    exact = run(reference.add_group_norm_silu, given, gradients, torch.float64)  # type: ignore[arg-type]
    theirs = run(reference.add_group_norm_silu, given, gradients)  # type: ignore[arg-type]
    ours = run(group_norm_silu_eager.add_group_norm_silu, given, gradients)  # type: ignore[arg-type]
    for name in exact:
        assert_no_worse(ours[name], theirs[name], exact[name], name)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("left_out", ["", "scale", "offset", "skip"])
def test_eager_on_a_cpu_without_gradients(left_out: str, silu: bool) -> None:
    """Results are bit-identical to those with gradients, and no argument is overwritten."""
    given = {name: value.cpu() for name, value in inputs(2, 64, 32, 5, 3, torch.float32).items()}
    for name in ("scale", "shift") if left_out == "scale" else (left_out,):
        given.pop(name, None)
    if left_out == "skip":
        given = {name: value[..., :64] if value.dim() < 3 else value for name, value in given.items()}
    before = {name: value.clone() for name, value in given.items()}
    with torch.no_grad():
        plain = group_norm_silu_eager.add_group_norm_silu(**given, silu=silu)
    learned = {name: value.clone().requires_grad_() for name, value in given.items()}
    for ours, want in zip(plain, group_norm_silu_eager.add_group_norm_silu(**learned, silu=silu), strict=True):
        assert torch.equal(ours, want)
    for name, value in given.items():
        assert torch.equal(value, before[name]), name


def test_choice() -> None:
    """Each mode computes the kernel or the definition to the last bit, and an offset [C] applies to all images."""
    given = inputs(2, 32, 0, 2, 3, torch.float32)
    given["offset"] = given["offset"][0]
    wide = {**given, "offset": given["offset"].expand(2, -1)}
    definition = reference.add_group_norm_silu
    default = add_group_norm_silu if DEVICE == "cuda" else definition
    for mode, chosen in (("triton", add_group_norm_silu), ("reference", definition), ("auto", default)):
        with ops.using(mode):
            made = ops.add_group_norm_silu(**given)
        for ours, want in zip(made, chosen(**wide), strict=True):
            assert torch.equal(ours, want)
