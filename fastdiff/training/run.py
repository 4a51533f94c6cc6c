"""A training run from settings to its folder: what train.py and super_res_train.py do."""

from __future__ import annotations

import errno
import functools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from fastdiff import errors, precompile
from fastdiff.config.load import Config
from fastdiff.diffusion import GaussianDiffusion, create_diffusion
from fastdiff.errors import StopWith, UserError, blaming
from fastdiff.images.loader import Loader
from fastdiff.images.open import open_images
from fastdiff.models import build_model
from fastdiff.models.unet import body_dtype
from fastdiff.ops import choose_kernels
from fastdiff.runtime.compilation import keep_compiled_code, prepare_cudnn, tf32
from fastdiff.runtime.processes import Processes, current, make_writable, output_folder
from fastdiff.runtime.script import is_broken_collective
from fastdiff.runtime.signals import StopSignals
from fastdiff.runtime.watchdog import Watchdog
from fastdiff.training import compilation, loop
from fastdiff.training.checkpoints import resume
from fastdiff.training.checkpoints.format import Snapshot
from fastdiff.training.deepspeed_engine import deepspeed_config, needs_engine, split_batch, start_processes
from fastdiff.training.diagnostics.anomaly import NonFinite, detect_anomaly
from fastdiff.training.diagnostics.microbatch_tuning import fit
from fastdiff.training.loop import LONG
from fastdiff.training.previews import preview_diffusion
from fastdiff.training.trainer import Trainer


def train(config: Config, default_name: str, dry_run: bool = False) -> None:
    """Train until the last step, or continue to it; with dry_run one step, and nothing written.

    config as `fastdiff.config.load` gives it. Raises StopWith when a signal, or numbers that stay bad, end the run.
    """
    started = time.perf_counter()
    settings = config.train
    _check(config)
    deepspeed_config(settings, config.deepspeed, current().world_size)  # refuses early what can't be
    folder = output_folder(settings.run_dir, f"runs/{settings.name or default_name}")
    with ExitStack() as open_things:
        signals = open_things.enter_context(StopSignals())
        watchdog = open_things.enter_context(Watchdog(current(), 60 * settings.stall_minutes))
        watchdog.progress("starting", LONG)
        writes = current().is_main and not dry_run
        known = resume.holds_run(folder)  # else nothing is written before all is known to be well
        if writes and known:
            open_things.enter_context(resume.lock(folder))
        snapshot, source = resume.find_snapshot(config, folder)
        preview = preview_diffusion(config)
        packs = config.data.cache != "none"
        watchdog.progress("opening the images", math.inf if packs else LONG)  # who packs sees to it that it gets on
        loader = open_things.enter_context(_open_loader(config, current(), snapshot, build_cache=not dry_run))
        watchdog.progress("joining", LONG)
        # Nodes that pack images for themselves are not ready at the same time.
        processes = start_processes(settings.stall_minutes, early=packs)
        watchdog.progress("starting", LONG)
        snapshot, source = resume.agree_on_snapshot(processes, config, folder, snapshot, source)
        notes = choose_kernels(settings.kernels, processes.device, threads_before=_threads_of(snapshot, processes))
        open_things.enter_context(tf32(settings.allow_tf32))
        keep_compiled_code()
        searches = prepare_cudnn(settings.deterministic, settings.cudnn_benchmark_limit)
        if processes.device.type == "cuda":
            notes.append(searches)
        diffusion = create_diffusion(config.diffusion, config.model.learn_sigma)
        config, settled = _settle(config, diffusion, processes, snapshot, dry_run)
        if not dry_run:
            settled += _compile_kernels(config, processes)
        torch.manual_seed(settings.seed)
        model = build_model(config.model)
        trainer = Trainer(config.train, config.deepspeed, model, diffusion, loader, processes, snapshot)
        found = snapshot.notes if snapshot else []
        snapshot = None  # it takes as much memory as a checkpoint has bytes
        if writes:
            with blaming("--run_dir"):
                make_writable(folder)
        if writes and not known:
            open_things.enter_context(resume.lock_new(folder))
        if settings.detect_anomaly:
            open_things.enter_context(detect_anomaly(model))
        with _clear_words(folder, trainer, writes=writes):
            if dry_run:
                loop.dry_run(config, folder, trainer, [*notes, *settled])
            else:
                run = loop.Loop(config, folder, trainer, preview, [*notes, *settled], started, signals, watchdog)
                run.go(source, found)


def _threads_of(snapshot: Snapshot | None, processes: Processes) -> int | None:
    """How many threads the run had on a CPU, if it had as many processes as now."""
    state = snapshot.state if snapshot else {}
    return state.get("threads") if state.get("world_size") == processes.world_size else None


@contextmanager
def _clear_words(folder: Path, trainer: Trainer, writes: bool) -> Iterator[None]:
    """status.json from the beginning to the end of a run, and sentences for errors that have none."""

    def tell(state: str, code: int | None = None, reason: str = "") -> None:
        if writes:
            resume.write_status(folder, state, trainer.step, code, reason)

    tell("running")
    try:
        yield
    except StopWith as stop:
        tell("preempted" if stop.code == errors.PREEMPTED else "diverged", stop.code, str(stop))
        raise
    except NonFinite as found:
        tell("diverged", errors.DIVERGED, str(found))
        raise StopWith(errors.DIVERGED, str(found)) from None
    except torch.OutOfMemoryError as error:
        reason = (
            f"the GPU's memory is full with {trainer.micro} images at once; try --microbatch auto, a smaller "
            "--microbatch, or --use_checkpoint True"
        )
        tell("failed", errors.USER_ERROR, reason)
        raise UserError(reason) from error
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"--run_dir: {folder} can't be written to ({error.strerror}); make room: the same command goes on"
            with suppress(OSError, UserError):
                tell("failed", errors.USER_ERROR, reason)
            raise UserError(reason) from error
        code = errors.USER_ERROR if isinstance(error, UserError) else 1
        if is_broken_collective(error):
            code = errors.PEER_LOST
        with suppress(OSError, UserError):  # the disk may be what is wrong
            tell("failed", code, f"{error}" or type(error).__name__)
        raise
    tell("done", errors.DONE)


def _settle(
    config: Config, diffusion: GaussianDiffusion, processes: Processes, snapshot: Snapshot | None, dry_run: bool
) -> tuple[Config, list[str]]:
    """The settings with every auto replaced by what it comes to here, and lines that say so."""
    train, step = config.train, snapshot.step if snapshot else 0
    before = snapshot.state.get("microbatch") if snapshot else None
    fitted = fit(config.model, train, diffusion, processes, config.deepspeed, before, always_estimate=dry_run)
    stored = snapshot.state.get("settings", {}).get("compile") if snapshot else None
    compiles, why = compilation.decide(train, processes.device, train.last_step - step, stored)
    if dry_run:
        compiles, why = False, "a dry run takes one step"
    if train.detect_anomaly:
        compiles, why = False, "detect_anomaly looks at single operations"
    update = {"compile": compiles, "microbatch": fitted.microbatch}
    model = config.model.model_copy(update={"use_checkpoint": fitted.use_checkpoint})
    settled = config.model_copy(update={"train": train.model_copy(update=update), "model": model})
    why_engine = needs_engine(train, config.deepspeed, processes.world_size)
    step_line = f"step: through DeepSpeed ({why_engine})" if why_engine else "step: on the device alone (one process)"
    return settled, [step_line, f"torch.compile: {'yes' if compiles else 'no'} ({why})", *fitted.lines]


def _compile_kernels(config: Config, processes: Processes) -> list[str]:
    """Have Triton's kernels compiled while this process builds and traces the network; lines that say so."""
    train, world_size = config.train, processes.world_size
    micro, accumulation = split_batch(train, world_size)
    launches = functools.partial(
        compilation.training_launches,
        *(config.model, config.diffusion, micro, body_dtype(train.precision, processes.device)),
        more=accumulation > 1,
        rates=train.ema_rate,
        scaled=train.precision == "fp16" or train.grad_clip > 0,
        through_engine=bool(needs_engine(train, config.deepspeed, world_size)),
    )
    return precompile.start(launches, processes.device)


def _check(config: Config) -> None:
    train, model = config.train, config.model
    if not config.data.data_dir:
        raise UserError("--data_dir is missing: give the folder of images to train on")
    if train.label_dropout and not model.null_class:
        raise UserError(f"--label_dropout {train.label_dropout:g} needs class_cond True and null_class True")
    if train.detect_anomaly and (train.compile is True or train.cuda_graph):
        which = "cuda_graph" if train.cuda_graph else "compile"
        raise UserError(f"--detect_anomaly True contradicts {which} True; leave one of them out")
    if train.cuda_graph and not torch.cuda.is_available():
        raise UserError("--cuda_graph True needs a GPU; leave it out")
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if train.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("--precision bf16: this GPU has no bf16 arithmetic; use fp16 or fp32")
    if model.in_channels not in (1, 3, 4):
        raise UserError(f"--in_channels {model.in_channels}: image files have 1 (gray), 3 (RGB) or 4 (RGBA) channels")


def _open_loader(config: Config, processes: Processes, snapshot: Snapshot | None, build_cache: bool) -> Loader:
    known = snapshot.state.get("class_names") if snapshot else None
    loader = open_images(
        config.data,
        size_hw=config.model.size_hw,
        channels=config.model.in_channels,
        batch_size=config.train.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.train.seed,
        device=processes.device,
        class_names=known if config.model.class_cond else None,
        build_cache=build_cache,
    )
    if config.model.class_cond:
        count = len(loader.class_names)
        if count < 2:
            raise UserError(
                f"--class_cond: {config.data.data_dir} has one class only ({loader.class_names[0]}); name files "
                "CLASS_anything, or sort them into class folders"
            )
        if count > config.model.num_classes:
            raise UserError(
                f"--class_cond: {config.data.data_dir} has {count} classes, the model {config.model.num_classes}; "
                f"give --num_classes {count}"
            )
    return loader
