"""The ops that models and diffusion call, and the one place that chooses how each is computed.

Each has its definition, shapes and sources in `kernels/reference.py` or `kernels/reference_diffusion.py`. `use`
switches between those and the Triton kernels; with "auto", CUDA tensors that a kernel supports go to the kernel. The
file has one short function for each op, hence its length.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypedDict, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff import attention_choices
from fastdiff.errors import UserError
from fastdiff.kernels import convolutions, group_norm_silu_eager, reference, reference_diffusion
from fastdiff.kernels.convolutions import box_weight as upsample_taps  # noqa: F401

# Ops that are computed one way everywhere; callers find them here.
from fastdiff.kernels.reference import CounterNoise, grad_scale_and_overflow, update_ema  # noqa: F401
from fastdiff.kernels.reference_diffusion import (  # noqa: F401
    LOSS_COLUMNS,
    STEP_COLUMNS,
    discretized_gaussian_log_likelihood,
    log_variance,
    mean_flat,
    normal_kl,
    start_map,
    vb_terms_bpd,
)
from fastdiff.runtime.machine import use_free_cores

if TYPE_CHECKING:
    from typing_extensions import Unpack

HAVE_TRITON = importlib.util.find_spec("triton") is not None

if HAVE_TRITON:
    from fastdiff.kernels import attention as triton_attention
    from fastdiff.kernels import diffusion_loss as triton_loss
    from fastdiff.kernels import group_norm_silu as triton_norm
    from fastdiff.kernels import noise as triton_noise
    from fastdiff.kernels import norm_and_shortcut as triton_shortcut
    from fastdiff.kernels import output_layer as triton_output
    from fastdiff.kernels import q_sample as triton_q_sample
    from fastdiff.kernels import sampler_step as triton_step
    from fastdiff.kernels import timesteps as triton_timesteps
    from fastdiff.kernels.adamw_ema import Lists as AdamWLists  # noqa: F401
    from fastdiff.kernels.adamw_ema import squared_norm as triton_squared_norm
    from fastdiff.kernels.group_norm_silu_plan import MAX_GROUP

# --- the choice ---

Kernels = Literal["auto", "triton", "reference"]
_mode: Kernels = "auto"
_channels_last = False


def use(mode: Kernels, *, anywhere: bool = False) -> None:
    """Choose for the whole process: kernels where they run ("auto"), everywhere ("triton"), or never ("reference").

    Raises ValueError where kernels can't run at all: without Triton, or on a CPU outside Triton's interpreter. With
    `anywhere` that is no error, because launches can be recorded on any machine.
    """
    global _mode
    if mode not in get_args(Kernels):
        raise ValueError(f"kernels must be one of {', '.join(get_args(Kernels))}, not {mode!r}")
    if mode == "triton" and not anywhere:
        if not HAVE_TRITON:
            raise ValueError("kernels triton needs Triton, which is not installed; use auto or reference")
        if not torch.cuda.is_available() and not _interpreted():
            raise ValueError(
                "kernels triton needs a GPU (or TRITON_INTERPRET=1, very slow, to try them on a CPU); use auto"
            )
    _mode = mode


@contextmanager
def using(mode: Kernels, *, anywhere: bool = False) -> Iterator[None]:
    """`use` within a block; the previous mode is restored afterwards."""
    global _mode
    before = _mode
    use(mode, anywhere=anywhere)
    try:
        yield
    finally:
        _mode = before


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def uses_kernels(x: Tensor, unsupported: str = "") -> bool:
    """Whether an op on x is computed by its kernel; `unsupported` is the reason why "auto" must not choose it."""
    return HAVE_TRITON and (_mode == "triton" or (_mode == "auto" and x.is_cuda and not unsupported))


def keep_channels_last(keep: bool) -> None:
    """Choose for the whole process whether eager code on a CPU has its maps channels-last, as version 0.1 had them.

    A run that began so continues so, because sums in another order differ in their last bits.
    """
    global _channels_last
    _channels_last = keep


def keeps_channels_last() -> bool:
    """What was chosen by `keep_channels_last`."""
    return _channels_last


def map_layout(x: Tensor) -> torch.memory_format:
    """The memory format of feature maps like x: channels-last, but contiguous where PyTorch computes eagerly on a CPU.

    There its group norm takes a half to a third of the time on contiguous maps, and its convolutions as long as on
    channels-last ones.
    """
    eager = x.device.type == "cpu" and not uses_kernels(x) and not torch.compiler.is_compiling()
    return torch.contiguous_format if eager and not _channels_last else torch.channels_last


class Choice(NamedTuple):
    """Which implementation computes an op, and why."""

    op: str
    implementation: str
    reason: str


def choices(device: torch.device) -> list[Choice]:
    """The implementation of each op on `device`, which a run logs at its start."""
    if _mode == "reference":
        return [Choice("all", "PyTorch", "kernels reference")]
    convolved = [
        Choice("upsample_conv", "one transposed convolution", "4/9 of the operations"),
        Choice("skip_conv1x1", "two matrix products", "no concatenated map"),
    ]
    if not HAVE_TRITON or (_mode == "auto" and device.type != "cuda"):
        why = "no GPU" if HAVE_TRITON else "Triton is not installed"
        if device.type == "cpu":
            return [convolved[0], Choice("all others", "PyTorch", why)]
        return [*convolved, Choice("all others", "PyTorch", why)]
    why = "kernels triton" if _mode == "triton" else "a GPU"
    return [
        Choice(
            "add_group_norm_silu, group_norm_silu, norm_and_shortcut, q_sample, diffusion_loss, sampler_step",
            "Triton",
            why,
        ),
        Choice("output_layer", "Triton", f"{why}; in a bf16 or fp16 network"),
        _attention_choice(device),
        *convolved,
    ]


def _attention_choice(device: torch.device) -> Choice:
    if _mode == "triton":
        return Choice("attention", "Triton", "everywhere")
    rule = "head sizes that flash attention pads or refuses; else SDPA"
    measured, problem = attention_choices.summary(device)
    if measured:
        return Choice("attention", "as measured", f"on this GPU ({measured}); at other sizes Triton for {rule}")
    return Choice("attention", "Triton", rule + (f"; measured choices are not used: {problem}" if problem else ""))


def choose_kernels(kernels: Kernels, device: torch.device, threads_before: int | None = None) -> list[str]:
    """Apply the setting, let a CPU use its free cores, and return log lines on what computes each op on `device`.

    threads_before is the number of threads of the run that is resumed. Raises UserError where Triton's kernels can't
    run.
    """
    try:
        use(kernels)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    threads = [_threads(threads_before)] if device.type == "cpu" else []
    return threads + [f"{op}: {implementation} ({reason})" for op, implementation, reason in choices(device)]


def _threads(before: int | None) -> str:
    count = use_free_cores(before)
    if not before:
        return f"threads: {count}"
    if count == before:
        return f"threads: {count}, as before"
    return f"threads: {count}, where the run had {before}: its results differ in their last bits from here on"


# --- the network ---


class NormOptions(TypedDict, total=False):
    """Keyword arguments of the norms, as `reference.group_norm_silu` describes them."""

    num_groups: int
    eps: float
    scale: Tensor | None
    shift: Tensor | None
    skip: Tensor | None
    offset: Tensor | None
    silu: bool
    dropout: float
    seed: Tensor | None


def dropout_seeds(x: Tensor, count: int) -> Sequence[Tensor | None]:
    """Seeds [1] int64 for the dropouts of `count` norms of maps like x, drawn at once; None where PyTorch drops."""
    if not uses_kernels(x):
        return [None] * count
    # A seed has a row of two numbers, so that its address is a multiple of 16 bytes: Triton compiles another kernel for
    # addresses that aren't.
    return [row[:1] for row in torch.randint(2**62, (count, 2), device=x.device)]


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, **options: Unpack[NormOptions]) -> Tensor:
    """Group norm and what follows it, [B, C, H, W] → the same; see `reference.group_norm_silu`."""
    norms = _norms(x, options)
    return norms.group_norm_silu(x, weight, bias, **_fitting(options, x, norms))


def add_group_norm_silu(
    a: Tensor,
    b: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    b_bias: Tensor | None = None,
    **options: Unpack[NormOptions],
) -> tuple[Tensor, Tensor]:
    """(a + b + b_bias, `group_norm_silu` of it), [B, C, H, W] each; see `reference.add_group_norm_silu`."""
    norms = _norms(a, options)
    return norms.add_group_norm_silu(a, b, weight, bias, b_bias=b_bias, **_fitting(options, a, norms))


def fuses_shortcut(x: Tensor, skip: Tensor | None) -> bool:
    """Whether `norm_and_shortcut` can compute a block's first norm and the 1x1 convolution of its shortcut together."""
    return uses_kernels(x, _norm_unsupported(x, skip, 32))


def norm_and_shortcut(
    a: Tensor, weight: Tensor, bias: Tensor, conv_weight: Tensor, **others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, its norm, the shortcut), where `fuses_shortcut` allows it; see `reference.norm_and_shortcut`.

    others  b, b_bias and skip
    """
    return triton_shortcut.norm_and_shortcut(a, weight, bias, conv_weight.to(a.dtype), **others)


def _fitting(options: NormOptions, x: Tensor, norms: Any) -> NormOptions:
    """The options for the module that computes the norm of x.

    PyTorch has its own seed, and expands an offset [C] to [B, C], for which it sums up the gradient.
    """
    if norms not in (reference, group_norm_silu_eager):
        return options
    options = options.copy()
    options.pop("seed", None)
    offset = options.get("offset")
    if offset is not None and offset.dim() == 1:
        options["offset"] = offset.expand(x.shape[0], -1)
    return options


def _norms(x: Tensor, options: NormOptions) -> Any:
    """The module that computes the norm of x."""
    if uses_kernels(x, _norm_unsupported(x, options.get("skip"), options.get("num_groups", 32))):
        return triton_norm
    if _channels_last and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return group_norm_silu_eager
    return reference


def _norm_unsupported(x: Tensor, skip: Tensor | None, num_groups: int) -> str:
    if not HAVE_TRITON:
        return "no Triton"
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if x.shape[1] % 8 or channels % 8:
        return "channels not in multiples of 8"
    return "groups too large" if channels // num_groups > MAX_GROUP else ""


def has_output_layer(x: Tensor, out_channels: int) -> bool:
    """Whether `output_layer` takes maps like x; where it doesn't, the last norm and convolution are two ops."""
    return HAVE_TRITON and not triton_output.unsupported(x, out_channels) and uses_kernels(x)


def output_layer(x: Tensor, *parameters: Tensor, second: Tensor | None, second_bias: Tensor | None) -> Tensor:
    """The last norm and convolution, [B, C, H, W] → [B, O, H, W] float32; see `reference.output_layer`.

    parameters  weight and bias of the norm, then of the convolution
    """
    return triton_output.output_layer(x, *parameters, second=second, second_bias=second_bias)


_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def self_attention(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """Attention of qkv = x @ weight.T + bias, [B, L, C] → [B, L, C], where `has_self_attention` allows it.

    weight [3C, C] and bias [3C] of any dtype. The bias's gradient is a by-product of the attention's backward pass.
    """
    qkv = F.linear(x, weight.to(x.dtype), bias.detach().to(x.dtype))
    return triton_attention.attention(qkv, num_heads, bias)


def has_self_attention(x: Tensor, width: int, num_heads: int) -> bool:
    """Whether our kernel computes the attention of qkv [B, L, width], where x [B, L, any] is like qkv in all else."""
    if not HAVE_TRITON:
        return False
    way = attention_way(x, x.shape[1], width // (3 * num_heads))
    problem = triton_attention.unsupported(x.dtype, x.shape[1], width, num_heads)
    return uses_kernels(x, problem or ("" if way == "ours" else way))


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention over packed heads, [B, L, 3C] → [B, L, C]; see `reference.attention`.

    torch's fused attention where it keeps float32 softmax and never stores the score matrix. On a CPU that is float32
    throughout where gradients are needed, because in bf16 its backward pass takes four times as long or more.
    """
    bf16_on_cpu = qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu" and qkv.requires_grad
    if bf16_on_cpu and _mode == "auto" and not _channels_last:
        return attention(qkv.float(), num_heads).to(qkv.dtype)
    B, L, width = qkv.shape
    D = width // (3 * num_heads)
    if has_self_attention(qkv, width, num_heads):
        return triton_attention.attention(qkv, num_heads)
    way = attention_way(qkv, L, D)
    if D > 256 and qkv.is_cuda and way == "ours":  # flash and cuDNN stop at 256
        return reference.attention(qkv, num_heads)
    q, k, v = qkv.view(B, L, num_heads, 3, D).permute(3, 0, 2, 1, 4).unbind(0)  # [B, N, L, D] each
    if way in _BACKENDS:
        # Nothing but the backend that was timed. An order of several (set_priority) would change PyTorch's own choice
        # for later calls: it puts cuDNN first when it chooses for the first time, unless an order was set before.
        with sdpa_kernel(_BACKENDS[way]):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(B, L, width // 3)


def attention_way(qkv: Tensor, L: int, D: int) -> str:
    """One of `attention_choices.WAYS`: by measurement where this GPU has one of this size, else `expected_way`."""
    if _mode == "auto" and qkv.is_cuda:
        way = attention_choices.measured(qkv.device, qkv.dtype, L, D, qkv.requires_grad)
        if way:
            return way
    return expected_way(L, D)


def expected_way(L: int, D: int) -> str:
    """ "sdpa" where PyTorch's fused attention is expected to be faster than "ours", which has not been measured.

    It pads no heads of these sizes, and our kernel holds whole rows of scores only up to L = 256.
    """
    return "sdpa" if D in (32, 64, 96, 128) or (D <= 256 and L > 256) else "ours"


def skip_conv1x1(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution of cat(x, skip); see `reference.skip_conv1x1`."""
    by_products = _mode != "reference" and map_layout(x) is torch.channels_last
    return (convolutions if by_products else reference).skip_conv1x1(x, skip, weight, bias)


def conv_weight(weight: Tensor, x: Tensor) -> Tensor:
    """A convolution's weight in x's dtype and, where kernels run, in channels-last layout like x."""
    return convolutions.conv_weight(weight, x.dtype) if uses_kernels(x) else weight.to(x.dtype)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest-neighbour enlargement by 2 and a 3x3 convolution; see `reference.upsample_conv`.

    Outside mode "reference" the weight may be the result of `upsample_taps`, computed beforehand.
    """
    if _mode == "reference":
        return reference.upsample_conv(x, weight, bias)
    channels_last = map_layout(x) is torch.channels_last
    return convolutions.upsample_conv(x, weight, bias, channels_last=channels_last)


def sums_in_norms() -> Any:
    """A pass for Inductor, by which a norm's backward kernel adds up gradients; see `kernels/gradient_sums.py`."""
    from fastdiff.kernels import gradient_sums  # imports Inductor, which takes two seconds

    return gradient_sums.SumsInNorms()


def eager_sums() -> AbstractContextManager[Any]:
    """A context in which that pass applies to eager code."""
    from fastdiff.kernels import gradient_sums

    return gradient_sums.EagerSums()


# --- noise, and diffusion maths ---


Noise: TypeAlias = Tensor | CounterNoise


def image_noise(seed: int, index: Tensor, draw: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise that depends on (seed, index[b], draw) alone; see `reference.image_noise`."""
    if uses_kernels(index):
        draws = draw if isinstance(draw, Tensor) else torch.full_like(index, draw)
        return triton_noise.image_noise(seed, index, draws, shape)
    return reference.image_noise(seed, index, draw, shape)


def image_uniform(seed: int, index: Tensor, draw: int) -> Tensor:
    """One uniform number per image that depends on (seed, index[b], draw) alone; see `reference.image_uniform`."""
    if uses_kernels(index):
        return triton_noise.image_uniform(seed, index, draw)
    return reference.image_uniform(seed, index, draw)


def _as_tensor(noise: Noise | None) -> Any:
    if not isinstance(noise, CounterNoise):
        return noise
    return image_noise(noise.seed, noise.index, 0 if noise.draw is None else noise.draw, noise.shape)


def _channels(x_start: Tensor) -> int:
    return x_start.shape[-1 if x_start.dtype == torch.uint8 else 1]


def _map_unsupported(x: Tensor) -> str:
    if not HAVE_TRITON:
        return "no Triton"
    if x.dtype not in (torch.uint8, torch.float32):
        return "not float32"
    return "more than 4 channels" if _channels(x) > triton_q_sample.MAX_CHANNELS else ""


def prepared(x_start: Tensor, noise: Noise) -> tuple[Tensor, Noise]:
    """The inputs that q_sample and diffusion_loss share: unchanged for kernels, else float32 images and drawn noise."""
    if uses_kernels(x_start, _map_unsupported(x_start)):
        return x_start, noise
    return start_map(x_start), _as_tensor(noise)


def q_sample(
    x_start: Tensor,
    coefficients: Tensor,
    noise: Noise,
    *,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> Tensor:
    """x_start noised to x_t, [B, channels, H, W] in `dtype`; see `reference_diffusion.q_sample`."""
    if uses_kernels(x_start, _map_unsupported(x_start)):
        return triton_q_sample.q_sample(x_start, coefficients, noise, flip=flip, dtype=dtype, channels=channels)
    return reference_diffusion.q_sample(
        x_start, coefficients, _as_tensor(noise), flip=flip, dtype=dtype, channels=channels
    )


def timesteps_at(uniform: Tensor, edges: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps [B] int64 and importance weights [B] for uniform [B]; see `reference_diffusion.timesteps_at`."""
    timesteps = triton_timesteps if uses_kernels(uniform) else reference_diffusion
    return timesteps.timesteps_at(uniform, edges, importance)


def add_losses_(sums: Tensor, losses: Sequence[Tensor], t: Tensor, weights: Tensor, num_timesteps: int) -> None:
    """Add losses [B] to sums by quartile of the timestep, in place; see `reference_diffusion.add_losses_`."""
    timesteps = triton_timesteps if uses_kernels(t) else reference_diffusion
    timesteps.add_losses_(sums, losses, t, weights, num_timesteps)


def diffusion_loss(
    output: Tensor,
    x_start: Tensor,
    coefficients: Tensor,
    noise: Noise,
    *,
    epsilon: bool = True,
    variance: str = "fixed",
    kl: bool = False,
    vb_scale: float = 1.0,
    flip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, mse, vb), [B] float32 each, of a network's output; see `reference_diffusion.diffusion_loss`."""
    settings: dict[str, Any] = {"epsilon": epsilon, "variance": variance, "kl": kl, "vb_scale": vb_scale, "flip": flip}
    if uses_kernels(output, _map_unsupported(x_start)):
        return triton_loss.diffusion_loss(output, x_start, coefficients, noise, **settings)
    return reference_diffusion.diffusion_loss(output, x_start, coefficients, _as_tensor(noise), **settings)


def sampler_step(
    output: Tensor,
    x: Tensor,
    coefficients: Tensor,
    noise: Noise | None,
    *,
    gradient: Tensor | None = None,
    history: tuple[Tensor, ...] = (),
    epsilon: bool = True,
    clip: bool = True,
    variance: str = "fixed",
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_next, pred_xstart, next network input); see `reference_diffusion.sampler_step`.

    The network input is x_next itself; with input_dtype the kernel writes a copy [B, 8, H, W] in that dtype.
    """
    settings: dict[str, Any] = {"gradient": gradient, "history": history}
    settings |= {"epsilon": epsilon, "clip": clip, "variance": variance}
    if uses_kernels(output, _map_unsupported(x)):
        x_next, pred_xstart, network_input = triton_step.sampler_step(
            output, x, coefficients, noise, **settings, input_dtype=input_dtype
        )
        return x_next, pred_xstart, x_next if network_input is None else network_input
    x_next, pred_xstart = reference_diffusion.sampler_step(output, x, coefficients, _as_tensor(noise), **settings)
    return x_next, pred_xstart, x_next


# --- the optimiser ---


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """The sum of squares over all tensors, a scalar on their device; not finite if an element isn't."""
    if uses_kernels(tensors[0], "float64" if tensors[0].dtype == torch.float64 else ""):
        return triton_squared_norm.implementation(tensors)  # dispatching hundreds of tensors takes half a millisecond
    return torch.nn.utils.get_total_norm(tensors).square()
