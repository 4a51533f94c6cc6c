"""AdamW with averages in one launch, and the norm of gradients, agree with float64 and with torch's own."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from fastdiff.kernels import reference
from fastdiff.kernels.adamw_ema import BLOCK, CHUNK, Lists, adamw_ema_, squared_norm
from fastdiff.kernels.launch import record
from fastdiff.kernels.reference import grad_scale_and_overflow
from helpers.kernel_checks import DEVICE, LOW, assert_no_worse, normal
from torch import Tensor
from torch.optim.adamw import adamw

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RATES = [0.9999, 0.9, 0.3]
NUMBERS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.05}
SIZES = {
    "one element": [(1,)],
    "less than a vector": [(7,)],
    "one less than a power of two": [(1023,)],
    "bulk and a rest": [((1 << 12) + 3,)],
    "one block exactly": [(BLOCK,)],
    "two chunks": [(CHUNK + 3,)],
    "shapes of a network": [(8, 3, 3, 3), (8,), (16, 8, 1, 1), (), (5, 7)],
}


@dataclass
class Tensors:
    """The lists of tensors that the op takes."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    averages: list[Tensor]
    halves: list[Tensor]
    steps: list[Tensor]

    def all(self) -> list[Tensor]:
        return [tensor for field in fields(self) for tensor in getattr(self, field.name)]

    def clone(self) -> Tensors:
        return copy.deepcopy(self)

    def double(self) -> Tensors:
        return Tensors(*([t.double() for t in getattr(self, field.name)] for field in fields(self)))


def make(
    shapes: list[tuple[int, ...]], K: int = 1, half: torch.dtype | None = None, step: int = 3, off: int = 0
) -> Tensors:
    """Make tensors, with weights around 3 to show cancellation; `off` elements are left out before each tensor."""
    seeds = iter(range(1000))

    def tensors(mean: float, std: float, per: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        made = []
        for shape in shapes:
            for _ in range(per):
                flat = normal(off + math.prod(shape), seed=next(seeds), mean=mean, std=std, dtype=dtype)
                made.append(flat[off:].view(shape))
        return made

    return Tensors(
        params=tensors(3.0, 1.0),
        grads=tensors(0.1, 1.0),
        exp_avgs=tensors(0.1, 0.3),
        exp_avg_sqs=[v.abs_() for v in tensors(0.5, 0.3)],
        averages=tensors(3.0, 1.0, per=K),
        halves=tensors(0.0, 1.0, dtype=half) if half else [],
        steps=[torch.tensor(float(step), device=DEVICE) for _ in shapes],
    )


def run(t: Tensors, **changes: Any) -> Tensor:
    K = len(t.averages) // len(t.params)
    values = {"rates": RATES[:K], **NUMBERS, **changes}
    return adamw_ema_(*(getattr(t, field.name) for field in fields(t)), **values)


def by_torch(t: Tensors, grad_scale: float = 1.0, **changes: float) -> Tensors:
    """Take the step in place by torch's fused AdamW, which counts the steps itself, and the reference's averages."""
    torch._foreach_sub_(t.steps, 1)
    torch._foreach_mul_(t.grads, grad_scale)
    adamw(
        *(t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, [], t.steps),
        fused=True, amsgrad=False, maximize=False, **{**NUMBERS, **changes},
    )  # fmt: skip
    K = len(t.averages) // len(t.params)
    for k in range(K):
        reference.update_ema(t.averages[k::K], t.params, RATES[k])
    return t


def exactly(t: Tensors, grad_scale: float = 1.0, **changes: float) -> Tensors:
    """Return the step by its formulas in float64."""
    t = t.double()
    lr, beta1, beta2, eps, decay = ({**NUMBERS, **changes}[name] for name in NUMBERS)
    K = len(t.averages) // len(t.params)
    for i, (p, g, m, v, step) in enumerate(zip(t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.steps, strict=True)):
        g = g * grad_scale
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g**2)
        p.mul_(1 - lr * decay)
        p.sub_(lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + eps))
        for average, rate in zip(t.averages[i * K : i * K + K], RATES, strict=False):
            average.copy_(rate * average + (1 - rate) * p)
    return t


def check(t: Tensors, grad_scale: Tensor | None = None, **changes: float) -> None:
    got = t.clone()
    run(got, grad_scale=grad_scale, **changes)
    scale = 1.0 if grad_scale is None else float(grad_scale)
    torchs, exact = by_torch(t.clone(), scale, **changes), exactly(t, scale, **changes)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        for rows in zip(getattr(got, name), getattr(torchs, name), getattr(exact, name), strict=True):
            if rows[0].numel():
                assert_no_worse(*rows, what=name)
    for half, p in zip(got.halves, got.params, strict=bool(got.halves)):
        if half.dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter cuts bf16 off
            assert ((half.float() - p).abs() <= torch.finfo(half.dtype).eps * p.abs()).all()
        else:
            assert torch.equal(half, p.to(half.dtype))
    for before, after in zip(t.grads + t.steps, got.grads + got.steps, strict=True):
        assert torch.equal(before, after)


# --- one step ---


@pytest.mark.parametrize("shapes", SIZES.values(), ids=SIZES)
def test_sizes(shapes: list[tuple[int, ...]]) -> None:
    check(make(shapes))


@pytest.mark.parametrize("half", [None, *LOW])
@pytest.mark.parametrize("K", [0, 1, 3])
def test_averages_and_halves(K: int, half: torch.dtype | None) -> None:
    check(make([(2 * BLOCK + 5,), (3,)], K, half))


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_addresses_that_are_no_multiple_of_16(half: torch.dtype | None) -> None:
    check(make([(BLOCK + 70,), (7,)], half=half, off=1))


@pytest.mark.parametrize("name", ["grads", "averages", "halves"])
def test_one_odd_address_among_even_ones(name: str) -> None:
    t, odd = make([(BLOCK + 1,)], half=torch.float16), make([(BLOCK + 1,)], half=torch.float16, off=1)
    setattr(t, name, getattr(odd, name))
    check(t)


def test_neighbours_in_one_buffer_keep_to_themselves() -> None:
    """In a flat buffer of odd sizes, a write beyond the end of a tensor would hit the next one."""
    t = make([(5,), (1,), (BLOCK + 3,), (2,)])
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        tensors = getattr(t, name)
        flat = torch.cat([*tensors, tensors[0].new_full((9,), 7.0)])
        setattr(t, name, list(flat[:-9].split([x.numel() for x in tensors])))
        check(t.clone())
        run(t)
        assert torch.equal(flat[-9:], torch.full_like(flat[-9:], 7.0))


def test_many_tensors_take_one_launch() -> None:
    shapes = [(3 + i % 5, 1 + i % 4) for i in range(40)]
    t = make(shapes, K=2, step=2)
    t.steps = [torch.tensor(float(1 + i), device=DEVICE) for i in range(len(shapes))]  # each its own bias correction
    with record() as launches:
        run(t.clone())
    assert len(launches) == 1
    assert launches[0].grid == (40,)
    check(t)


def test_channels_last_weights() -> None:
    t = make([(8, 4, 3, 3)], half=torch.bfloat16)
    for field in fields(t):
        if field.name != "steps":
            tensors = [x.contiguous(memory_format=torch.channels_last) for x in getattr(t, field.name)]
            setattr(t, field.name, tensors)
    check(t)


def test_empty_tensors() -> None:
    check(make([(0,), (3,), (0, 4)]))
    nothing = make([(0,)])
    assert run(nothing, norm=True).item() == 0


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_16_bit_gradients_are_as_their_float32_values(dtype: torch.dtype) -> None:
    """To the last bit, also where addresses are no multiple of 16; a norm over both kinds is their norm."""
    for off in (0, 1):
        t = make([(2 * BLOCK + 5,), (3, 3)], K=1, half=dtype, off=off)
        t.grads = make([(2 * BLOCK + 5,), (3, 3)], half=dtype, off=off).halves
        wide = t.clone()
        wide.grads = [g.float() for g in t.grads]
        assert torch.equal(squared_norm(t.grads), squared_norm(wide.grads))
        mixed = squared_norm([t.grads[0], *make([(7,)]).grads, t.grads[1]])
        exact = sum(g.double().square().sum() for g in [*t.grads, *make([(7,)]).grads])
        assert mixed.item() == pytest.approx(float(exact), rel=1e-6)
        run(t)
        run(wide)
        wide.grads = t.grads
        for a, b in zip(t.all(), wide.all(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("step", [1, 2, 100_000])
def test_bias_corrections(step: int) -> None:
    """At step 1 the moments were zero, so that the result depends on 1 - beta; at step 10^5 the corrections are 1."""
    t = make([(300,)], step=step)
    if step == 1:
        for moment in t.exp_avgs + t.exp_avg_sqs:
            moment.zero_()
    check(t)
    check(t, beta2=0.9999)


@pytest.mark.parametrize(
    "changes", [{"beta1": 0.0}, {"beta1": 0.0, "beta2": 0.0}, {"beta1": 0.3}, {"lr": 0.0}, {"eps": 0.3}]
)
def test_other_numbers(changes: dict[str, float]) -> None:
    check(make([(200,)]), **changes)


def test_small_weight_decay_is_not_rounded() -> None:
    """float32 represents 1e-6 well, but 1 - 1e-6 differs from 1 only to within 1.3% of that."""
    t = make([(1000,)], K=0)
    for x in t.grads + t.exp_avgs:
        x.zero_()
    before = t.params[0].double()
    for _ in range(20):
        run(t, lr=1e-2, weight_decay=1e-4)
    assert (t.params[0].double() / before - 1).mean().item() == pytest.approx(-2e-5, rel=3e-3)


def test_an_average_does_not_drift_from_a_constant() -> None:
    t = make([(500,)], K=1)
    t.averages = [p.clone() for p in t.params]
    for x in t.grads + t.exp_avgs:
        x.zero_()
    for _ in range(10):
        run(t, weight_decay=0.0)
    assert torch.equal(t.averages[0], t.params[0])


def test_grad_scale() -> None:
    check(make([(700,), (9,)], K=2), grad_scale=torch.tensor(2.0**-10 * 0.7, device=DEVICE))


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan, True])
def test_found_inf_changes_no_bit(value: float) -> None:
    t = make([(BLOCK + 3,), (4,)], K=2, half=torch.bfloat16)
    t.grads[0][1] = math.inf
    before = t.clone()
    square = run(t, found_inf=torch.tensor(value, device=DEVICE), norm=True)
    assert square.item() == math.inf
    for a, b in zip(before.all(), t.all(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("zero", [0.0, False])
def test_nothing_found_is_as_without(zero: float) -> None:
    t = make([(BLOCK + 3,)])
    with_flag = t.clone()
    run(t)
    run(with_flag, found_inf=torch.tensor(zero, device=DEVICE))
    for a, b in zip(t.all(), with_flag.all(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_not_finite_gradients_spread() -> None:
    t = make([(8,)])
    t.grads[0][2], t.grads[0][5] = math.nan, math.inf
    run(t)
    assert t.params[0].isnan().nonzero().flatten().tolist() == [2, 5]


def test_steps_in_a_row_follow_torch() -> None:
    """Rounding errors accumulate no faster than in torch's own steps."""
    t = make([(BLOCK + 1,), (6,)], K=2, step=0)
    for moment in t.exp_avgs + t.exp_avg_sqs:
        moment.zero_()
    got, torchs, exact = t.clone(), t.clone(), t.double()
    for i in range(6):
        changes = {"lr": 1e-2 / (1 + i), "weight_decay": 0.01 * i}
        fresh = make([(BLOCK + 1,), (6,)]).grads
        for lists in (got, torchs, exact):
            torch._foreach_copy_(lists.grads, [g * (i - 2.5) for g in fresh])
            torch._foreach_add_(lists.steps, 1)
        run(got, **changes)
        by_torch(torchs, **changes)
        exact = exactly(exact, **changes)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        for rows in zip(getattr(got, name), getattr(torchs, name), getattr(exact, name), strict=True):
            assert_no_worse(*rows, what=name, slack=4.0)


def test_equal_results_twice() -> None:
    first = make([(CHUNK + 1,), (3,)], K=1)
    second = first.clone()
    squares = [run(t, norm=True) for t in (first, second)]
    assert torch.equal(*squares)
    for a, b in zip(first.all(), second.all(), strict=True):
        assert torch.equal(a, b)


# --- registration as a torch op ---


def _arguments(t: Tensors) -> tuple[Any, ...]:
    K = len(t.averages) // len(t.params)
    return (*(getattr(t, field.name) for field in fields(t)), RATES[:K], *NUMBERS.values())


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm: bool) -> None:
    t = make([(5,), (3, 2)], K=2, half=torch.bfloat16)
    scalar = torch.tensor(0.5, device=DEVICE)
    torch.library.opcheck(
        adamw_ema_.overload, _arguments(t), {"norm": norm, "grad_scale": scalar, "found_inf": scalar * 0}
    )
    torch.library.opcheck(squared_norm.overload, (t.grads,))


def test_compiles_in_one_graph() -> None:
    t = make([(5,), (3, 2)])
    expected = t.clone()

    def step(t: Tensors) -> Tensor:
        return run(t, norm=True) + squared_norm(t.grads)

    square = torch.compile(step, backend="aot_eager", fullgraph=True)(t)
    assert torch.equal(square, step(expected))
    for a, b in zip(t.all(), expected.all(), strict=True):
        assert torch.equal(a, b)


def test_launches_can_be_recorded_without_memory() -> None:
    def meta(count: int, *shape: int) -> list[Tensor]:
        return [torch.empty(shape, device="meta") for _ in range(count)]

    n = 5 * CHUNK + 1
    with record() as launches:
        Lists(meta(2, n), meta(2, n), meta(2, n), meta(2), meta(4, n), RATES[:2], []).step(meta(2, n), **NUMBERS)
    assert [launch.grid for launch in launches] == [(12,)]


def test_lists_notice_what_has_moved() -> None:
    t = make([(20,), (4,)])
    lists = Lists(t.params, t.exp_avgs, t.exp_avg_sqs, t.steps, t.averages, RATES[:1], [])
    lists.step(t.grads, **NUMBERS)
    expected = t.clone()
    t.params[1].data = t.params[1].clone()
    t.averages[0].data = t.averages[0].clone()
    lists.step(t.grads, **NUMBERS)
    run(expected)
    for a, b in zip(t.all(), expected.all(), strict=True):
        assert torch.equal(a, b)
    t.params[1].data = t.params[1].clone()[:3]
    with pytest.raises(ValueError, match="doesn't fit params"):
        lists.step(t.grads, **NUMBERS)


def _wrong() -> dict[str, tuple[str, Any, str]]:
    """Return description → (list, its replacement, part of the message)."""
    return {
        "none": ("params", [], "at least one"),
        "too few": ("exp_avgs", [], "needs 1 exp_avgs"),
        "too few averages": ("averages", [], "needs 1 averages"),
        "steps missing": ("steps", [], "needs 1 steps"),
        "double gradients": ("grads", [torch.zeros(4, 6, dtype=torch.float64, device=DEVICE)], "float32 or bf"),
        "float halves": ("halves", [torch.zeros(4, 6, device=DEVICE)], "bfloat16 or float16"),
        "another shape": ("exp_avg_sqs", [torch.zeros(6, 4, device=DEVICE)], "doesn't fit"),
        "transposed": ("grads", [torch.zeros(6, 4, device=DEVICE).t()], "contiguous"),
        "every second element": ("params", [torch.zeros(4, 12, device=DEVICE)[:, ::2]], "contiguous"),
        "another device": ("averages", [torch.zeros(4, 6, device="meta")], "one device"),
        "integer step": ("steps", [torch.tensor(3, device=DEVICE)], "float32 scalar"),
        "long step": ("steps", [torch.ones(2, device=DEVICE)], "float32 scalar"),
    }


@pytest.mark.parametrize("case", _wrong().values(), ids=_wrong())
def test_refusals(case: tuple[str, Any, str]) -> None:
    name, value, message = case
    t = make([(4, 6)])
    setattr(t, name, value)
    lists = Lists(t.params, t.exp_avgs, t.exp_avg_sqs, t.steps, t.averages, RATES[:1], t.halves)
    with pytest.raises(ValueError, match=message):
        lists.step(t.grads, **NUMBERS)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_refuses_flags_of_other_kinds(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} a float32"):
        run(make([(4,)]), **{name: torch.ones(2, device=DEVICE)})
    with pytest.raises(ValueError, match=f"{name} a float32"):
        run(make([(4,)]), **{name: torch.ones((), dtype=torch.float64, device=DEVICE)})


# --- the norm ---

NORM_SHAPES = {**SIZES, "many": [(i % 7, 3) for i in range(30)]}


@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize("shapes", NORM_SHAPES.values(), ids=NORM_SHAPES)
def test_squared_norm(shapes: list[tuple[int, ...]], off: int) -> None:
    t = make(shapes, K=0, off=off)
    exact = sum(g.double().square().sum() for g in t.grads)
    got = [squared_norm(t.grads), squared_norm(t.grads), run(t, norm=True)]
    assert torch.equal(got[0], got[1])
    for value in got:
        assert value.dtype == torch.float32
        assert value.shape == ()
        # A lane adds up 16 products in a row, the rest is a tree of 9 levels: 25 roundings at most.
        assert abs(value.double() - exact) <= 25 * 2.0**-24 * exact


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2e19])
def test_squared_norm_of_what_is_not_finite(value: float) -> None:
    """A value in the bulk, in the rest or in a small tensor is found; the square of 2e19 is beyond float32."""
    for i, j in [(0, 0), (0, BLOCK + 1), (1, 2)]:
        t = make([(BLOCK + 2,), (3,)], K=0)
        t.grads[i][j] = value
        total = squared_norm(t.grads)
        assert not total.isfinite()
        assert total.isnan() == math.isnan(value)
        scale, found_inf = grad_scale_and_overflow(total, loss_scale=4.0, max_norm=1.0)
        assert found_inf.item() == 1
        before = t.clone()
        run(t, grad_scale=scale, found_inf=found_inf)
        assert torch.equal(before.params[0], t.params[0])


def test_squared_norm_refusals() -> None:
    with pytest.raises(ValueError, match="at least one"):
        squared_norm([])
    with pytest.raises(ValueError, match="float32"):
        squared_norm([torch.zeros(3, dtype=torch.float64, device=DEVICE)])
    with pytest.raises(ValueError, match="contiguous"):
        squared_norm([torch.zeros(3, 4, device=DEVICE).t()])


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_grad_scale_and_overflow(loss_scale: float, max_norm: float) -> None:
    grads = make([(50,), (3, 3)]).grads
    norm = torch.nn.utils.get_total_norm(grads)
    scaled = [g * loss_scale for g in grads]
    for scale in (loss_scale, torch.tensor(loss_scale, device=DEVICE)):
        grad_scale, found_inf = grad_scale_and_overflow(squared_norm(scaled), scale, max_norm)
        assert found_inf.item() == 0
        wanted = min(1.0, max_norm / (norm.item() + 1e-6)) if max_norm else 1.0
        assert grad_scale.item() * loss_scale == pytest.approx(wanted, rel=1e-6)
        assert grad_scale.dtype == found_inf.dtype == torch.float32
