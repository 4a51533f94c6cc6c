"""Functions that all kernel files share: registering ops, launching kernels, recording launches without making them.

A recorded launch holds everything that determines the compiled code, so kernels can be compiled without the GPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar, overload

import torch
from torch import Tensor

Result = TypeVar("Result")

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every kernel."""

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""Name of each op in the `fastdiff` namespace → the Python function that launches its kernels."""


_libraries: dict[str, torch.library.Library] = globals().get("_libraries", {})
"""Name of each op → its registration, which ends when the op is defined again, as by `importlib.reload`."""


class KernelOp:
    """A torch op, opaque to torch.compile, whose implementation is one Python function on every device.

    It is registered with the dispatcher directly, because `torch.library.custom_op` wraps every call in more Python
    functions, which together take several times as long as a launch.
    """

    def __init__(self, name: str, implementation: Callable[..., Any], mutates_args: tuple[str, ...]) -> None:
        self.name, self.implementation = f"fastdiff::{name}", implementation
        if name in _libraries:
            _libraries[name]._destroy()
        self._library = _libraries[name] = torch.library.Library("fastdiff", "FRAGMENT")
        schema = torch.library.infer_schema(implementation, mutates_args=mutates_args)
        self._library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(name, implementation, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.fastdiff, name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Set the function that gives the results' shapes, dtypes and strides to torch.compile."""
        torch.library.register_fake(self.name, fake, lib=self._library)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Set the op's derivative; see `torch.library.register_autograd`."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=self._library)

    def register_no_derivative(self) -> None:
        """Let a backward pass through the op raise RuntimeError, where PyTorch would take its gradient for zero."""
        self.register_autograd(lambda ctx, *_: no_derivative(self.name), setup_context=lambda ctx, inputs, output: None)


def no_derivative(name: str) -> NoReturn:
    """Raise RuntimeError, because an op, or the backward pass of one, has no derivative."""
    raise RuntimeError(f"{name} has no derivative; where one is needed, use the ops' mode reference")


def kernel_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], KernelOp]:
    """Register a function as the torch op fastdiff::name; its fake and its backward come later."""

    def register(fn: Callable[..., Any]) -> KernelOp:
        IMPLEMENTATIONS[name] = fn
        return KernelOp(name, fn, mutates_args)

    return register


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel: positional arguments, then constexprs by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the kernel's call."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS, **self.constexprs}

    def named(self) -> dict[str, Any]:
        """The kernel's arguments and constexprs by the names of its parameters."""
        return {**dict(zip(self.kernel.arg_names, self.args, strict=False)), **self.constexprs}


@dataclass(frozen=True)
class Work:
    """What a launch does that its machine code, its grid and its arguments don't tell.

    `benchmarks/kernel_cost.py` predicts a kernel's time from it. A kernel's module may have a dict WORK: name of the
    kernel → function from a `Launch` to its `Work`. Whatever a Work leaves out is taken from the launch.
    """

    executions: dict[str, float] = field(default_factory=dict)
    """Device function → how often all programs of the launch together run it, where that is not once wherever they
    call it: in a `while`, under an `if`. Functions that it calls run as often."""
    turns: dict[str, float] = field(default_factory=dict)
    """Kernel or device function → passes of its `while` loops, whenever a program enters it; 1 for one that waits."""
    values: dict[str, float] = field(default_factory=dict)
    """Variable in the range of a `for` → its usual value, where it depends on data."""
    elements: float | None = None
    """Numbers that the launch is there to compute; None for those of its largest tensor."""
    least_bytes: float | None = None
    """Bytes that must be moved; None for those of its tensors, each read or written once."""
    dram_bytes: float | None = None
    """Bytes between memory and the L2 cache; None for least_bytes."""
    l2_bytes: float | None = None
    """Bytes between the L2 cache and the multiprocessors; None for what the loads and stores of all lanes ask for."""


_recorded: list[Launch] | None = None
listener: Callable[[Launch], None] | None = None
"""A function that is called with every launch before it is made."""


class Launcher:
    """Launches one kernel with fixed numbers and constexprs: kernel[grid](*tensors, *numbers, **constexprs).

    Triton takes five times as long to find a kernel's code as to launch it. So the code is kept by what it can still
    depend on: the tensors' device and dtypes, and whether their addresses are multiples of 16.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *numbers: float | None,
        num_warps: int = 4,
        num_stages: int = 3,
        **constexprs: Any,
    ) -> None:
        self._launch = Launch(kernel, grid, numbers, constexprs, num_warps, num_stages)
        self._compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, first: Tensor, *others: Tensor | None) -> None:
        """Launch the kernel on these tensors. Inside `record` the launch is recorded, and nothing runs."""
        if _recorded is not None or listener is not None:
            made = replace(self._launch, args=(first, *others, *self._launch.args))
            if _recorded is not None:
                _recorded.append(made)
                return
            if listener is not None:
                listener(made)
        device = first.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
                self(first, *others)
            return
        tensors = (first, *others)
        key = (device.index, *[None if each is None else (each.dtype, each.data_ptr() % 16) for each in tensors])
        run = self._compiled.get(key)
        if run is None:
            self._compile(key, tensors)
        else:
            run(*tensors)

    def _compile(self, key: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> None:
        """Launch the kernel by Triton's own way, and keep the code that it found or compiled."""
        kernel, grid, numbers = self._launch.kernel, self._launch.grid, self._launch.args
        compiled = kernel[grid](*tensors, *numbers, **self._launch.options())
        if compiled is not None:  # Triton's interpreter compiles nothing
            constants = [self._launch.constexprs[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
            run = compiled[(*grid, 1, 1)[:3]]
            self._compiled[key] = lambda *given: run(*given, *numbers, *constants)


launcher = functools.lru_cache(maxsize=4096, typed=True)(Launcher)
"""`Launcher`, made once for every combination of arguments. Triton compiles 1, 1.0 and True differently."""


def once_per_layout(prepare: Callable[..., Result]) -> Callable[..., Result]:
    """Cache the results of a function that depends on its tensors' shapes, strides, dtypes and devices alone."""
    known: dict[tuple[Any, ...], Result] = {}

    @functools.wraps(prepare)
    def prepared(*args: Any) -> Result:
        key = tuple(
            [(arg.shape, arg.stride(), arg.dtype, arg.device) if isinstance(arg, Tensor) else arg for arg in args]
        )
        if key not in known:
            known[key] = prepare(*args)
        return known[key]

    return prepared


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of making them; with tensors on the meta device nothing is allocated either."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 132 (H100, H200) for any other device."""
    return _processors(device) if device.type == "cuda" else 132


# --- layouts ---


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


def is_channels_last(x: Tensor | None) -> bool:
    """Whether a map [B, C, H, W] lies in channels-last memory, is empty or is None."""
    return x is None or x.is_contiguous(memory_format=torch.channels_last) or not x.numel()


@overload
def channels_last(x: Tensor, op: str, name: str) -> Tensor: ...
@overload
def channels_last(x: None, op: str, name: str) -> None: ...
def channels_last(x: Tensor | None, op: str, name: str) -> Tensor | None:
    """A map [B, C, H, W] in channels-last memory; any other layout is converted, with one warning per op."""
    if x is None or is_channels_last(x):
        return x
    if not torch.compiler.is_compiling():
        _warn_once(
            f"{op}: {name} came in another layout than channels-last and is copied at every call; "
            "use .to(memory_format=torch.channels_last) once"
        )
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(B: int, C: int, H: int, W: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels-last map, also where C, H or W is 1 and PyTorch could call it either layout."""
    strides = (H * W * C, 1, W * C, C)
    return torch.empty_strided((B, C, H, W), strides, dtype=dtype or like.dtype, device=like.device)
