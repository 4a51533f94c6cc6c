"""Settings with which steps, or the rest of a run, change nothing: what is refused, and what the log warns about."""

from __future__ import annotations

from fastdiff.errors import UserError
from fastdiff.training.settings import TrainSettings

LEAST_LR = 1e-10
"""AdamW's updates are about as large as lr. Below this they are less than half a unit in the last place of a float32
weight of 0.002, and are rounded away."""
_LEFT = 0.5  # share of the initial weights in an average from which the log warns
_USUAL_RATES = (0.9999, 0.999, 0.99, 0.9)


def check_effect(train: TrainSettings) -> None:
    """UserError for settings with which steps of the run would learn nothing."""
    anneal, last = train.lr_anneal_steps, train.last_step
    if anneal and last > anneal:
        raise UserError(
            f"--max_steps {last} is past --lr_anneal_steps {anneal}, after which the learning rate is 0 and nothing is "
            f"learnt; give --lr_anneal_steps {last}, with which it falls to 0 there, --lr_anneal_steps 0 for one that "
            f"doesn't fall, or --max_steps {anneal}"
        )
    if train.lr * train.weight_decay >= 1:
        raise UserError(
            f"--weight_decay {train.weight_decay:g} with --lr {train.lr:g} takes every weight to 0 or beyond in each "
            "step, which multiplies it by 1 - lr * weight_decay; 0.01 to 0.1 is usual"
        )


def check_steps_left(train: TrainSettings, step: int, source: str) -> None:
    """UserError if a new run from the checkpoint `source`, which is at `step`, would take no step."""
    if step >= train.last_step:
        raise UserError(
            f"--resume_checkpoint: {source} is at step {step}, and the run ends after step {_end(train)}; steps are "
            "counted from the checkpoint's own beginning: give a larger --max_steps"
        )


def effect_warnings(train: TrainSettings, step: int = 0) -> list[str]:
    """Warnings for the log of a run that begins or continues at `step`."""
    lines, last = [], train.last_step
    if step >= last:
        return [
            f"nothing is left to do: the run is at step {step} and ends after step {_end(train)}; give a larger one to "
            "train on"
        ]
    if train.lr < LEAST_LR:
        lines.append(f"warning: lr {train.lr:g} is so small that float32 weights hardly change")
    if train.lr_warmup_steps >= last:
        lines.append(
            f"warning: the learning rate reaches {train.lr * last / train.lr_warmup_steps:.2g} at most, not lr "
            f"{train.lr:g}: lr_warmup_steps {train.lr_warmup_steps} are not over when the run ends, after step {last}"
        )
    if 0 in train.ema_rate:
        lines.append("warning: ema_rate 0 keeps no average: its files hold the weights of the last step")
    if warning := _average_warning(max(train.ema_rate), last):
        lines.append(warning)
    return lines


def _average_warning(rate: float, last: int) -> str:
    """A warning if the average with the highest rate is mostly initial weights at the end, and a usual one isn't."""
    left = rate**last
    better = next((usual for usual in _USUAL_RATES if usual**last < 0.05), None)
    if left <= _LEFT or better is None:
        return ""
    return (
        f"warning: after {last} steps {100 * left:.0f}% of the average with ema_rate {rate:g}, with which images are "
        f"drawn, is still the weights that the run began with; give e.g. --ema_rate {better:g}"
    )


def _end(train: TrainSettings) -> str:
    """The last step, with the setting that decides it."""
    name = "max_steps" if train.max_steps else "lr_anneal_steps" if train.lr_anneal_steps else "the default"
    return f"{train.last_step} ({name})"
