"""AdamW, moving averages of the weights and their 16-bit copy in one pass over memory, one launch for all tensors.

    m       = beta1 * m + (1 - beta1) * g            average = rate * average + (1 - rate) * p
    v       = beta2 * v + (1 - beta2) * g^2          half    = p, rounded
    p       = p - lr * weight_decay * p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

Shapes   lists of N float32 tensors, params, exp_avgs, exp_avg_sqs [N]; averages [N * K], the K of a parameter side by
         side; grads [N], all float32, bf16 or fp16; halves [N] bf16 or fp16, or none; steps [N] float32 scalars,
         already incremented.
Traffic  per element 12 bytes and the gradient's (4 or 2) read and 12 written, 8 for each average, 2 for the half;
         squared_norm reads the gradient.
Source   Loshchilov & Hutter 2019, algorithm 2 (https://arxiv.org/abs/1711.05101), as torch.optim.AdamW writes it.

Tables on the device hold the tensors' addresses and each program's range. `Lists` and the kernels share their layout,
hence one file.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from fastdiff.kernels.launch import Launch, Work, kernel_op, launcher
from torch import Tensor

CHUNK = 8192
"""Elements per program: 300 KB of traffic, which hides the two dependent reads of the tables."""
BLOCK = 512
"""Elements per loop iteration: 4 warps make one 128-bit access per thread and tensor, with at most 72 registers."""
NORM_BLOCK = 2048
"""The same for the norm, which reads only one tensor."""
SUM_BLOCK = 4096
"""Partial sums that the single program of the second stage reads at a time."""

_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Columns of the table of addresses; the averages follow, then the half.
_PARAM, _EXP_AVG, _EXP_AVG_SQ, _STEP, _AVERAGES = (tl.constexpr(i) for i in range(5))


# --- device code ---


@triton.jit
def _stretch(chunks_ptr, numels_ptr, CHUNK: tl.constexpr):
    """The tensor of this program, its first element there, and its number of elements."""
    i_tensor = tl.load(chunks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    return i_tensor, start, tl.minimum(tl.load(numels_ptr + i_tensor) - start, CHUNK).to(tl.int32)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _mix(b_old, b_new, weight):
    """(1 - weight) * old + weight * new, written as torch.lerp does.

    With weights rounded one by one, which don't add up to 1, an average drifts off a constant by 2e-4 at rate 0.9999.
    """
    b_change = b_new - b_old
    return tl.where(weight < 0.5, b_old + weight * b_change, b_new - (1.0 - weight) * b_change)


@triton.jit
def _update(
    p_row, grad, shares_ptr, start, o, m, scalars,
    K: tl.constexpr, GRAD: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Update elements start + o of one parameter; returns their unscaled gradients.

    Addresses are read here, in the loop: they are in the L1 cache, and registers are scarcer.
    """
    grad_scale, share1, share2, decay, step_size, root_scale, eps = scalars
    p_param = _pointer(tl.load(p_row + _PARAM), tl.float32, ALIGNED) + start + o
    p_exp_avg = _pointer(tl.load(p_row + _EXP_AVG), tl.float32, ALIGNED) + start + o
    p_exp_avg_sq = _pointer(tl.load(p_row + _EXP_AVG_SQ), tl.float32, ALIGNED) + start + o
    b_grad = tl.load(_pointer(grad, GRAD, ALIGNED) + start + o, mask=m).to(tl.float32)
    b_p = tl.load(p_param, mask=m)
    b_g = b_grad * grad_scale
    b_m = _mix(tl.load(p_exp_avg, mask=m), b_g, share1)
    b_v = _mix(tl.load(p_exp_avg_sq, mask=m), b_g * b_g, share2)
    b_p -= decay * b_p
    b_p -= tl.div_rn(step_size * b_m, tl.sqrt_rn(b_v) * root_scale + eps)
    tl.store(p_exp_avg, b_m, mask=m)
    tl.store(p_exp_avg_sq, b_v, mask=m)
    tl.store(p_param, b_p, mask=m)
    for k in tl.static_range(K):
        p_average = _pointer(tl.load(p_row + _AVERAGES + k), tl.float32, ALIGNED) + start + o
        tl.store(p_average, _mix(tl.load(p_average, mask=m), b_p, tl.load(shares_ptr + k)), mask=m)
    if HALF is not None:
        tl.store(_pointer(tl.load(p_row + _AVERAGES + K), HALF, ALIGNED) + start + o, b_p.to(HALF), mask=m)
    return b_grad


@triton.jit
def _adamw_ema(
    chunks_ptr, numels_ptr, rows_ptr, grads_ptr, shares_ptr, lr_ptr, grad_scale_ptr, found_inf_ptr, squares_ptr,
    lr, decay, share1, share2, log_beta1, log_beta2, eps,
    K: tl.constexpr, GRAD: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_tensor, start, count = _stretch(chunks_ptr, numels_ptr, CHUNK)
    WIDTH: tl.constexpr = _AVERAGES + K + (0 if HALF is None else 1)
    p_row = rows_ptr + i_tensor * WIDTH
    grad = tl.load(grads_ptr + i_tensor)
    places = grad | tl.load(p_row + _PARAM) | tl.load(p_row + _EXP_AVG) | tl.load(p_row + _EXP_AVG_SQ)
    for k in tl.static_range(K):
        places |= tl.load(p_row + _AVERAGES + k)
    if HALF is not None:
        places |= tl.load(p_row + _AVERAGES + K)
    if found_inf_ptr is not None:
        count = tl.where(tl.load(found_inf_ptr) != 0, 0, count)
    if lr_ptr is not None:  # then `decay` does not include the learning rate yet
        lr = tl.load(lr_ptr)
        decay *= lr
    grad_scale = 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr)
    # The powers are computed in float64: for beta 0.999 a float32 1 - beta^1 has three digits less.
    step = tl.load(_pointer(tl.load(p_row + _STEP), tl.float32, False)).to(tl.float64)
    step_size = tl.div_rn(lr, (1.0 - tl.exp(step * log_beta1)).to(tl.float32))
    root_scale = tl.div_rn(1.0, tl.sqrt_rn((1.0 - tl.exp(step * log_beta2)).to(tl.float32)))
    scalars = (grad_scale, share1, share2, decay, step_size, root_scale, eps)

    bulk = tl.where(places % 16 == 0, count // BLOCK * BLOCK, 0)  # elements that are accessed 128 bits at a time
    o = tl.arange(0, BLOCK)
    b_squares = tl.zeros([BLOCK], tl.float32)
    for i in range(0, bulk, BLOCK):
        b_grad = _update(p_row, grad, shares_ptr, start, i + o, None, scalars, K, GRAD, HALF, True)
        b_squares += b_grad * b_grad
    for i in range(bulk, count, BLOCK):
        m = i + o < count
        b_grad = _update(p_row, grad, shares_ptr, start, i + o, m, scalars, K, GRAD, HALF, False)
        b_squares += tl.where(m, b_grad * b_grad, 0.0)
    if squares_ptr is not None:
        total = tl.sum(b_squares, axis=0)
        if found_inf_ptr is not None:
            total = tl.where(tl.load(found_inf_ptr) != 0, float("inf"), total)
        tl.store(squares_ptr + tl.program_id(0), total)


@triton.jit
def _squares(
    chunks_ptr, numels_ptr, grads_ptr, squares_ptr, GRAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of squares of a chunk."""
    i_tensor, start, count = _stretch(chunks_ptr, numels_ptr, CHUNK)
    grad = tl.load(grads_ptr + i_tensor)
    bulk = tl.where(grad % 16 == 0, count // BLOCK * BLOCK, 0)
    o = tl.arange(0, BLOCK)
    b_squares = tl.zeros([BLOCK], tl.float32)
    for i in range(0, bulk, BLOCK):
        b_grad = tl.load(_pointer(grad, GRAD, True) + start + i + o).to(tl.float32)
        b_squares += b_grad * b_grad
    for i in range(bulk, count, BLOCK):
        b_grad = tl.load(_pointer(grad, GRAD, False) + start + i + o, mask=i + o < count, other=0.0).to(tl.float32)
        b_squares += b_grad * b_grad
    tl.store(squares_ptr + tl.program_id(0), tl.sum(b_squares, axis=0))


@triton.jit
def _sum(squares_ptr, total_ptr, count, BLOCK: tl.constexpr):
    """The sum of all chunks, by one program and so in one order."""
    o = tl.arange(0, BLOCK)
    b_total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, count, BLOCK):
        b_total += tl.load(squares_ptr + i + o, mask=i + o < count, other=0.0).to(tl.float64)
    tl.store(total_ptr, tl.sum(b_total, axis=0).to(tl.float32))


def _work(launch: Launch) -> Work:
    """Tensors are taken for whole chunks at multiples of 16 bytes; the launch has only tables of their addresses."""
    given = launch.named()
    count = float(launch.grid[0] * CHUNK)
    each = 28 + 8 * given["K"] + 2 * (given["HALF"] is not None) if "K" in given else 4
    return Work(values={"bulk": CHUNK, "count": CHUNK}, elements=count, least_bytes=each * count)


WORK = {"_adamw_ema": _work, "_squares": _work}


# --- tables ---


def _upload(values: tuple[float, ...] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to the device asynchronously; torch keeps the pinned source until it has been read."""
    if device.type == "meta":
        return torch.empty(len(values), dtype=dtype, device=device)
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@functools.lru_cache(maxsize=512)
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    """`_upload`, once per content and stream: addresses rarely change between steps."""
    return _upload(values, dtype, device)


@functools.lru_cache(maxsize=64)
def _chunks(numels: tuple[int, ...], device: torch.device, stream: int) -> tuple[int, Tensor, Tensor]:
    """Number of programs; each one's (tensor, chunk within it), int32, concatenated; elements per tensor."""
    counts = torch.tensor([triton.cdiv(numel, CHUNK) for numel in numels])
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    owner = torch.arange(len(numels)).repeat_interleave(counts)
    pairs = torch.stack([owner, torch.arange(len(owner)) - first], dim=1)
    return len(owner), _upload(pairs.flatten(), torch.int32, device), _upload(numels, torch.int64, device)


def _addresses(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(map(Tensor.data_ptr, tensors))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


# --- checks of the inputs ---


def _check(
    op: str, name: str, tensors: list[Tensor], params: list[Tensor], dtypes: tuple[torch.dtype, ...], per: int = 1
) -> None:
    """Raise ValueError unless there are `per` tensors for each param, with its shape, device and memory layout."""
    if len(tensors) != per * len(params):
        raise ValueError(f"{op} needs {per * len(params)} {name} for {len(params)} params; got {len(tensors)}")
    device = params[0].device
    for i, tensor in enumerate(tensors):
        param = params[i // per]
        if tensor.dtype not in dtypes or tensor.dtype != tensors[0].dtype:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{op} needs {name} all {wanted}; got {tensor.dtype}: convert it")
        if tensor.device != device:
            raise ValueError(f"{op} needs everything on one device, {device}; got {name} on {tensor.device}")
        if tensor.shape != param.shape:
            raise ValueError(f"{op}: {name} {tuple(tensor.shape)} doesn't fit params {tuple(param.shape)}")
        if not ((tensor.is_contiguous() and param.is_contiguous()) or _both_channels_last(tensor, param)):
            raise ValueError(
                f"{op} needs {name} contiguous, or channels-last if its params are; got strides {tensor.stride()} for "
                f"{param.stride()}: use torch.empty_like(param).copy_(tensor)"
            )


def _both_channels_last(a: Tensor, b: Tensor) -> bool:
    return a.dim() == 4 and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (a, b))


def _check_scalar(op: str, name: str, value: Tensor, device: torch.device, *dtypes: torch.dtype) -> None:
    if value.numel() != 1 or value.dtype not in dtypes or value.device != device:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{op} needs {name} a {wanted} scalar on {device}; got {tuple(value.shape)} {value.dtype} on {value.device}"
        )


# --- ops ---


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


class Lists:
    """The op's tensors except the gradients, checked at the first step and again only if an address has changed.

    An optimiser keeps it because dispatching a torch op with several hundred tensors takes several milliseconds.
    """

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        averages: list[Tensor],
        rates: list[float],
        halves: list[Tensor],
    ) -> None:
        self.params, self.exp_avgs, self.exp_avg_sqs, self.steps = params, exp_avgs, exp_avg_sqs, steps
        self.averages, self.rates, self.halves = averages, rates, halves
        self._rows: list[Tensor] = []  # in the order of the table of addresses
        self._numels: tuple[int, ...] = ()
        self._checked: tuple[int, ...] | None = None  # the addresses at the last check
        self._tables: tuple[Tensor | None, ...] = ()  # of the last step

    def _check(self) -> None:
        op, fp32 = "adamw_ema_", (torch.float32,)
        if not self.params:
            raise ValueError(f"{op} needs at least one of params; got none")
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            _check(op, name, getattr(self, name), self.params, fp32)
        _check(op, "averages", self.averages, self.params, fp32, per=len(self.rates))
        if self.halves:
            _check(op, "halves", self.halves, self.params, (torch.bfloat16, torch.float16))
        if len(self.steps) != len(self.params):
            raise ValueError(f"{op} needs {len(self.params)} steps for as many params; got {len(self.steps)}")
        for step in self.steps:
            _check_scalar(op, "steps", step, self.params[0].device, torch.float32)
        K, N = len(self.rates), len(self.params)
        columns = [self.params, self.exp_avgs, self.exp_avg_sqs, self.steps]
        columns += [self.averages[k::K] for k in range(K)]
        columns += [self.halves] if self.halves else []
        self._rows = [column[i] for i in range(N) for column in columns]
        self._numels = tuple(param.numel() for param in self.params)

    def prepare(self, grads: list[Tensor]) -> int:
        """Check everything and copy the tables to the device; returns the number of programs of a step."""
        if self._checked is None or self._checked != _addresses(self._rows):
            self._check()
            self._checked = _addresses(self._rows)
        _check("adamw_ema_", "grads", grads, self.params, _GRADIENTS)
        device = self.params[0].device
        stream = _stream(device)
        programs, chunks, numels = _chunks(self._numels, device, stream)
        rows = _table(self._checked, torch.int64, device, stream)
        gradients = _table(_addresses(grads), torch.int64, device, stream)
        shares = tuple(1 - rate for rate in self.rates)
        shares_table = _table(shares, torch.float32, device, stream) if shares else None
        self._tables = (
            chunks,
            numels,
            rows,
            gradients,
            shares_table,
        )  # a CUDA graph reads them at every replay
        return programs

    def step(
        self,
        grads: list[Tensor],
        *,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        norm: bool = False,
    ) -> Tensor:
        """One step, as `adamw_ema_`, which describes the arguments; lr may also be a float32 scalar on the device."""
        programs = self.prepare(grads)
        op, params, K, device = "adamw_ema_", self.params, len(self.rates), self.params[0].device
        lr_on_device = lr if isinstance(lr, Tensor) else None
        if lr_on_device is not None:
            _check_scalar(op, "lr", lr_on_device, device, torch.float32)
        if grad_scale is not None:
            _check_scalar(op, "grad_scale", grad_scale, device, torch.float32)
        if found_inf is not None:
            _check_scalar(op, "found_inf", found_inf, device, torch.float32, torch.bool)
        squares = params[0].new_empty(programs) if norm else None
        rate, decay = (0.0, weight_decay) if isinstance(lr, Tensor) else (lr, lr * weight_decay)
        if programs:
            run = launcher(
                _adamw_ema,
                (programs,),
                *(rate, decay, 1 - beta1, 1 - beta2, _log(beta1), _log(beta2), eps),
                K=K,
                GRAD=_TRITON_TYPES[grads[0].dtype],
                HALF=_TRITON_TYPES[self.halves[0].dtype] if self.halves else None,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
            )
            run(*self._tables, lr_on_device, grad_scale, found_inf, squares)
        return params[0].new_empty(0) if squares is None else _total(squares)


def _total(squares: Tensor) -> Tensor:
    total = squares.new_empty(())
    launcher(_sum, (1,), squares.numel(), BLOCK=SUM_BLOCK, num_warps=16)(squares, total)
    return total


@kernel_op("adamw_ema_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "averages", "halves"))
def adamw_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    halves: list[Tensor],
    steps: list[Tensor],
    rates: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    norm: bool = False,
) -> Tensor:
    """One step, in place; see the module's docstring.

    rates       [K] of the averages.
    grad_scale  float32 scalar on the device by which gradients are multiplied.
    found_inf   float32 or bool scalar on the device; unless it is 0, nothing is changed.
    norm        whether to return the sum of squares of the unscaled gradients, a float32 scalar, inf if found_inf
                skipped the step; else the result is an empty tensor.
    """
    squares = Lists(params, exp_avgs, exp_avg_sqs, steps, averages, rates, halves).step(
        grads,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        found_inf=found_inf,
        norm=norm,
    )
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *averages, *halves])
    return squares


@adamw_ema_.register_fake
def _(params, grads, m, v, averages, halves, steps, rates, lr, b1, b2, eps, decay, scale=None, inf=None, norm=False):
    return params[0].new_empty(()) if norm else params[0].new_empty(0)


@kernel_op("squared_norm")
def squared_norm(grads: list[Tensor]) -> Tensor:
    """The sum of squares over tensors, a float32 scalar. Not finite if any of them isn't, or if it overflows.

    They are float32, bf16 or fp16, with one launch for each dtype. The order of summation is fixed: by chunk in
    float32, over the chunks in float64.
    """
    if not grads:
        raise ValueError("squared_norm needs at least one of grads; got none")
    device, squares = grads[0].device, []
    stream = _stream(device)
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        same = [grad for grad in grads if grad.dtype == dtype]
        _check("squared_norm", "grads", same, same, _GRADIENTS)
        programs, chunks, numels = _chunks(tuple(grad.numel() for grad in same), device, stream)
        squares.append(same[0].new_empty(programs, dtype=torch.float32))
        if programs:
            addresses = _table(_addresses(same), torch.int64, device, stream)
            run = launcher(_squares, (programs,), GRAD=_TRITON_TYPES[dtype], CHUNK=CHUNK, BLOCK=NORM_BLOCK)
            run(chunks, numels, addresses, squares[-1])
    return _total(squares[0] if len(squares) == 1 else torch.cat(squares))


@squared_norm.register_fake
def _(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


squared_norm.register_no_derivative()
