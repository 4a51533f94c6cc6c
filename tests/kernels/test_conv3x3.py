"""The fused 3x3 convolution against float64, at odd shapes and with every combination of what surrounds it."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastdiff.kernels import conv3x3 as module
from fastdiff.kernels.conv3x3 import conv3x3, pack_weight, plan, supported
from fastdiff.kernels.launch import IMPLEMENTATIONS, record
from helpers.kernel_checks import DEVICE, DTYPES, LOW, assert_no_worse, channels_last, normal
from torch import Tensor

PARTS = ("skip", "norm", "residual", "moments")
EVERYTHING = frozenset(PARTS)
# PyTorch adds in pairs, as a GPU's reduction does; the interpreter adds one row after the other.
MOMENTS_SLACK = 2.0 if DEVICE == "cuda" else 8.0

# B, C1, C2, C_out, H, W
SHAPES = {
    "one pixel, several images per tile": (3, 8, 8, 8, 1, 1),
    "one row": (2, 16, 8, 24, 1, 9),
    "one column, fewer images than a tile holds": (1, 8, 16, 16, 7, 1),
    "map no power of two, last tile of an image short": (2, 24, 8, 16, 9, 11),
    "channels no multiple of the block, inputs of different width": (1, 40, 8, 72, 5, 6),
}
# Tiled without a remainder: read through tensor maps where the GPU has them.
BOXES = {
    "several images per tile, the last tile short": (3, 32, 32, 64, 4, 4),
    "several tiles per image, not square": (1, 32, 64, 64, 8, 16),
    "output channels no multiple of the block": (1, 64, 32, 72, 8, 8),
}
needs_boxes = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9,
    reason="tensor maps need compute capability 9.0",
)


@pytest.fixture(autouse=True)
def poisoned() -> Any:
    """torch.empty comes filled with NaN, so that an element which a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(before)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, parts: frozenset[str], mean: float = 3.0
) -> dict[str, Tensor | None]:
    """Arguments of conv3x3 with the weight as Conv2d has it: maps of mean 3, a norm that takes it away."""
    B, C1, C2, C_out, H, W = shape
    C2 = C2 if "skip" in parts else 0
    given: dict[str, Tensor | None] = {
        "x": channels_last(normal(B, C1, H, W, seed=1, mean=mean, dtype=dtype)),
        "weight": normal(C_out, C1 + C2, 3, 3, seed=2, std=(9 * (C1 + C2)) ** -0.5, dtype=dtype),
        "bias": normal(C_out, seed=3, dtype=dtype),
    }
    if "skip" in parts:
        given["skip"] = channels_last(normal(B, C2, H, W, seed=4, mean=mean, dtype=dtype))
    if "norm" in parts:
        given["mean"] = normal(B, C1 + C2, seed=5, mean=mean, std=0.3)
        given["gain"] = normal(B, C1 + C2, seed=6, mean=1.0, std=0.3)
        given["offset"] = normal(B, C1 + C2, seed=7)
    if "residual" in parts:
        given["residual"] = channels_last(normal(B, C_out, H, W, seed=8, mean=mean, dtype=dtype))
    return given


def unfused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None = None,
    mean: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, each step in x's dtype but the norm, which is float32 as group norms are."""
    h = x if skip is None else torch.cat([x, skip], dim=1)
    if mean is not None and gain is not None and offset is not None:
        wide = h.to(mean.dtype) - mean[:, :, None, None]
        h = F.silu(wide * gain[:, :, None, None] + offset[:, :, None, None]).to(x.dtype)
    y = F.conv2d(h, weight, bias, padding=1)
    return y if residual is None else y + residual


def moments_of(y: Tensor) -> Tensor:
    """[B, C, 2] from a map, in its dtype."""
    mean = y.mean((2, 3))
    return torch.stack([mean, (y - mean[:, :, None, None]).square().sum((2, 3))], dim=-1)


def check(shape: tuple[int, ...], dtype: torch.dtype, parts: frozenset[str], **kwargs: Any) -> None:
    given = arguments(shape, dtype, parts)
    doubles = {name: None if value is None else value.double() for name, value in given.items()}
    exact, torchs = unfused(**doubles), unfused(**given)  # type: ignore[arg-type]
    packed = given | {"weight": pack_weight(given["weight"])}  # type: ignore[arg-type]
    got = conv3x3(**packed, moments="moments" in parts, **kwargs)
    y, moments = got if "moments" in parts else (got, None)
    assert_no_worse(y, torchs, exact)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if moments is not None:  # of the map as stored: what the next norm will read
        for i, what in enumerate(("mean", "squared deviations")):
            truth = moments_of(y.double())[..., i]
            assert_no_worse(moments[..., i], moments_of(y.float())[..., i], truth, what, MOMENTS_SLACK)


def subsets() -> list[frozenset[str]]:
    return [frozenset(chosen) for n in range(len(PARTS) + 1) for chosen in itertools.combinations(PARTS, n)]


# --- numbers ---


@pytest.mark.parametrize("parts", subsets(), ids=lambda parts: "+".join(sorted(parts)) or "plain")
def test_every_combination(parts: frozenset[str]) -> None:
    check((2, 16, 8, 24, 5, 7), torch.bfloat16, parts, tma=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype, EVERYTHING, tma=False)


@needs_boxes
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", BOXES.values(), ids=BOXES)
def test_boxes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, C1, C2, C_out, H, W = shape
    assert plan(B, H, W, C1, C2, C_out, dtype, False, True).box is not None
    check(shape, dtype, EVERYTHING - {"norm"}, tma=True)


@needs_boxes
@pytest.mark.parametrize(
    "parts", [s for s in subsets() if "norm" not in s], ids=lambda s: "+".join(sorted(s)) or "plain"
)
def test_every_combination_of_boxes(parts: frozenset[str]) -> None:
    check((1, 32, 32, 64, 8, 8), torch.bfloat16, parts, tma=True)


def test_large_tiles() -> None:
    """The tiles of a full GPU: 128 x 128 and eight warps, of which only two programs are worth interpreting."""
    B, C, C_out, H, W = 2, 32, 128, 8, 8
    chosen = plan(256, 64, 64, 128, 0, C_out, torch.bfloat16, False, False)
    assert (chosen.BM, chosen.BN) == (128, 128)
    original, module.plan = module.plan, lambda *args: chosen._replace(BL=H * W, T=1)
    try:
        check((B, C, 0, C_out, H, W), torch.bfloat16, frozenset({"norm", "residual", "moments"}), tma=False)
    finally:
        module.plan = original


@pytest.mark.parametrize("tma", [False, pytest.param(True, marks=needs_boxes)])
def test_moments_far_from_zero(tma: bool) -> None:
    """Means of 100 with deviations of 0.1: E[y²] - E[y]² in float32 would keep no digit of the variance."""
    dtype = torch.float16 if tma else torch.float32
    given = arguments((2, 32, 0, 16, 16, 16), dtype, frozenset({"residual"}), mean=0.0)
    given["residual"] = channels_last((0.1 * given["residual"].float() + 100).to(dtype))  # type: ignore[union-attr]
    given["weight"], given["bias"] = 0.1 * given["weight"], None  # type: ignore[operator]
    packed = given | {"weight": pack_weight(given["weight"])}
    y, moments = conv3x3(**packed, moments=True, tma=tma)  # type: ignore[arg-type]
    truth = moments_of(y.double())
    assert truth[..., 0].min() > 99
    # Each part's mean is stored to 4e-6, and lies about 0.01 from the others': 2 * 4e-6 * 0.01 of a variance of 0.01.
    torch.testing.assert_close(moments.double(), truth, rtol=1e-5, atol=0)


def test_padding_is_of_the_normalised_map() -> None:
    """One pixel: eight of nine taps see zeros, not silu(offset)."""
    x = channels_last(normal(2, 8, 1, 1))
    weight = torch.zeros(8, 8, 3, 3, device=DEVICE)
    weight[:, :, 0, 0] = weight[:, :, 2, 1] = 1.0
    ones = torch.ones(2, 8, device=DEVICE)
    y = conv3x3(x, pack_weight(weight), None, mean=ones, gain=ones, offset=5 * ones)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("tma", [False, pytest.param(True, marks=needs_boxes)])
def test_images_are_independent(tma: bool) -> None:
    """A tile of several images: a NaN in one stays there, and the others are as without it."""
    given = arguments((3, 32, 0, 16, 4, 4), torch.float16, frozenset())
    packed = given | {"weight": pack_weight(given["weight"])}  # type: ignore[arg-type]
    y, moments = conv3x3(**packed, moments=True, tma=tma)  # type: ignore[arg-type]
    x = given["x"].clone()  # type: ignore[union-attr]
    x[1] = torch.nan
    spoilt, spoilt_moments = conv3x3(**(packed | {"x": x}), moments=True, tma=tma)  # type: ignore[arg-type]
    for before, after in ((y, spoilt), (moments, spoilt_moments)):
        assert torch.equal(before[::2], after[::2])
        assert after[1].isnan().all()


@pytest.mark.parametrize("shape", [(3, 8, 0, 8, 1, 1), (1, 16, 0, 24, 5, 7)], ids=["tile of images", "tile of pixels"])
def test_nothing_is_written_beyond_the_results(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = []

    def within(exact: Tensor) -> Tensor:
        """The same shape and strides, in the middle of a buffer of sevens."""
        buffer = torch.full((exact.numel() + 8192,), 7.0, dtype=exact.dtype, device=exact.device)
        buffers.append((buffer, exact.numel()))
        return buffer[4096:].as_strided(exact.shape, exact.stride(), 4096)

    empty = module._empty
    monkeypatch.setattr(module, "_empty", lambda *args: tuple(within(result) for result in empty(*args)))
    check(shape, torch.float16, frozenset({"residual", "moments"}), tma=False)
    assert len(buffers) == 2
    for buffer, used in buffers:
        assert (buffer[:4096] == 7).all()
        assert (buffer[4096 + used :] == 7).all()


def test_equal_results_twice_and_no_image() -> None:
    given = arguments((2, 16, 8, 24, 9, 8), torch.float16, EVERYTHING)
    packed = given | {"weight": pack_weight(given["weight"])}  # type: ignore[arg-type]
    first, second = (conv3x3(**packed, moments=True) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    y, moments = conv3x3(given["x"][:0], packed["weight"][..., :16].contiguous(), None, moments=True)  # type: ignore[index]
    assert y.shape == (0, 24, 9, 8)
    assert moments.shape == (0, 24, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 9 GB")
def test_gpu_past_2_31_elements() -> None:
    B, C, H, W = 258, 8, 1024, 1024
    x = torch.zeros(B, H, W, C, device=DEVICE, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    x[-1] = normal(C, H, W, dtype=torch.bfloat16)
    weight = normal(C, C, 3, 3, seed=1, dtype=torch.bfloat16)
    y = conv3x3(x, pack_weight(weight), None)
    exact = F.conv2d(x[-1:].double(), weight.double(), padding=1)
    assert_no_worse(y[-1:], F.conv2d(x[-1:], weight, padding=1), exact)  # type: ignore[index]
    assert not y[:-1].any()  # type: ignore[index]


# --- the launch choices ---


def test_boxes_tile_exactly() -> None:
    for H, W, B, C in itertools.product((4, 8, 12, 24, 48, 64), (8, 12, 16, 64, 96), (1, 2, 64), (64, 192, 512)):
        p = plan(B, H, W, C, 0, C, torch.bfloat16, False, True)
        if p.box is not None:
            BB, BH, BW = p.box
            assert BB * BH * BW == p.BM
            assert H % BH == W % BW == 0
            assert BH * BW * p.T == H * W
            assert B > BB // 2
    for H, W in ((64, 64), (32, 32), (16, 16), (8, 8)):  # the maps of the shipped configurations
        assert plan(64, H, W, 128, 0, 128, torch.bfloat16, False, True).box is not None


def test_a_launch_can_be_recorded_without_data() -> None:
    x = torch.empty(64, 8, 8, 512, device="meta", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    weight = torch.empty(512, 3, 3, 512, device="meta", dtype=torch.bfloat16)
    for tma, names in ((False, ["_pointers"]), (True, ["_boxes"])):
        with record() as launches:
            IMPLEMENTATIONS["conv3x3"](x, weight, None, None, None, None, None, None, True, tma)
        assert [launch.kernel.__name__ for launch in launches] == names  # two images per tile: no parts to merge


# --- the op ---


def test_opcheck() -> None:
    given = arguments((1, 8, 8, 8, 2, 3), torch.float32, EVERYTHING)
    names = ("x", "weight", "bias", "skip", "mean", "gain", "offset", "residual")
    packed = given | {"weight": pack_weight(given["weight"])}  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.fastdiff.conv3x3.default, (*(packed[name] for name in names), True, False))
    torch.library.opcheck(
        torch.ops.fastdiff.conv3x3.default,
        (packed["x"], packed["weight"][..., :8].contiguous(), *[None] * 6, False, False),
    )


def test_compiled_in_one_graph() -> None:
    given = arguments((1, 8, 8, 8, 2, 3), torch.bfloat16, EVERYTHING)
    packed = given | {"weight": pack_weight(given["weight"])}  # type: ignore[arg-type]

    def block(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        assert supported(kwargs["x"], kwargs["weight"], kwargs["skip"]) == ""
        y, moments = conv3x3(**kwargs, moments=True)
        return y * 2, moments

    got, expected = torch.compile(block, fullgraph=True, backend="aot_eager")(packed), block(packed)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_other_layouts_are_copied_with_a_warning() -> None:
    given = arguments((1, 8, 0, 8, 2, 3), torch.float32, frozenset())
    weight, bias = pack_weight(given["weight"]), given["bias"]  # type: ignore[arg-type]
    expected = conv3x3(given["x"], weight, bias)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="conv3x3: x came in another layout"):
        got = conv3x3(given["x"].contiguous(), weight, bias)  # type: ignore[union-attr]
    assert torch.equal(got, expected)  # type: ignore[arg-type]


def test_pack_weight_is_free_for_a_channels_last_weight() -> None:
    weight = normal(8, 16, 3, 3)
    packed = pack_weight(weight)
    assert torch.equal(packed[3, 2, 1], weight[3, :, 2, 1])
    last = channels_last(weight)
    assert pack_weight(last).data_ptr() == last.data_ptr()


def wrong(**changes: Any) -> dict[str, Any]:
    given = arguments((2, 16, 8, 8, 3, 3), torch.bfloat16, frozenset({"skip", "norm", "residual"}))
    return given | {"weight": pack_weight(given["weight"])} | changes  # type: ignore[arg-type]


ERRORS = {
    "sequence": (lambda a: {"x": a["x"].flatten(2)}, r"a map x \[B, C, H, W\]"),
    "no pixels": (lambda a: {"x": a["x"][:, :, :0]}, "with pixels"),
    "weight not packed": (lambda a: {"weight": normal(8, 24, 3, 3, dtype=torch.bfloat16)}, "pass pack_weight"),
    "skip missing": (lambda a: {"skip": None}, "is skip missing"),
    "skip of another size": (lambda a: {"skip": a["skip"][:, :, :2]}, r"skip \(2, 8, 3, 3\) in"),
    "channels": (
        lambda a: {"x": a["x"][:, :12], "weight": a["weight"][..., :20].contiguous()},
        r"12 \+ 8 -> 8 are not all multiples of 8",
    ),
    "float64": (lambda a: {"x": a["x"].double()}, "float64 is none of"),
    "residual of another shape": (lambda a: {"residual": a["x"]}, "project it first"),
    "residual dtype": (
        lambda a: {"residual": a["residual"].float()},
        "residual .* in torch.bfloat16; got .* in torch.float32",
    ),
    "bias shape": (lambda a: {"bias": a["bias"][:4]}, "one value per output channel"),
    "bias dtype": (lambda a: {"bias": a["bias"].half()}, r"in torch.bfloat16 or torch.float32"),
    "norm incomplete": (lambda a: {"gain": None}, "mean, gain and offset together"),
    "norm per group": (lambda a: {"mean": a["mean"][:, :2]}, "expand groups to channels"),
    "norm in half": (lambda a: {"gain": a["gain"].bfloat16()}, r"gain \(2, 24\) in torch.float32"),
    "norm strided": (lambda a: {"offset": a["offset"].t().contiguous().t()}, "to be contiguous"),
    "weight on another device": (lambda a: {"weight": a["weight"].to("meta")}, "on the device of x"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case: str) -> None:
    change, message = ERRORS[case]
    given = wrong()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message) as raised:
            conv3x3(**(given | change(given)))
    assert str(raised.value).startswith("conv3x3 needs ")


def test_gradients_are_refused() -> None:
    given = wrong()
    given["x"].requires_grad_()
    conv3x3(**given)  # under no_grad
    with torch.enable_grad(), pytest.raises(ValueError, match="without gradients"):
        conv3x3(**given)
    with torch.enable_grad():
        assert "no backward" in supported(given["x"], given["weight"], given["skip"])
    with pytest.raises(ValueError, match="perhaps packed"):
        pack_weight(given["weight"])


def test_supported_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 16, 4, 4), torch.zeros(8, 16, 3, 3)
    assert "multiples of 8" in supported(x, weight[:3])
    assert "float64" in supported(x.double(), weight.double())
    big = torch.empty(1, 2048, 1024, 1024, device="meta")
    assert "2^31" in supported(big, torch.empty(8, 2048, 3, 3, device="meta"))
    monkeypatch.setattr(module, "INTERPRETED", False)
    assert "no NVIDIA GPU" in supported(x, weight)
