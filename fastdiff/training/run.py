"""A training run from its settings to its folder, as train.py and super_res_train.py start it."""

from __future__ import annotations

import errno
import functools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from fastdiff import errors, precompile
from fastdiff.config.sections import Config
from fastdiff.errors import StopWith, UserError, blaming
from fastdiff.images.labels import describe_classes
from fastdiff.images.loader import Loader
from fastdiff.images.open import open_images
from fastdiff.images.outputs import refuse_as_run
from fastdiff.images.unreadable import STEM, naming_all
from fastdiff.models import UNet
from fastdiff.models.classifier import Classifier, build_network
from fastdiff.models.classifier_settings import ClassifierSettings, NetworkSettings
from fastdiff.models.settings import default_attention_warning, misplaced_attention
from fastdiff.ops import choose_kernels, keep_channels_last
from fastdiff.runtime.machine import choose_threads, keep_compiled_code, prepare_cudnn, share_compile_processes, tf32
from fastdiff.runtime.processes import Processes, current, make_writable, output_folder
from fastdiff.runtime.script import CTRL_C, StopSignals, is_broken_collective
from fastdiff.runtime.watchdog import Watchdog
from fastdiff.training import loop
from fastdiff.training.checkpoints import resume
from fastdiff.training.checkpoints.format import Snapshot
from fastdiff.training.deepspeed_engine import start_processes
from fastdiff.training.diagnostics.anomaly import NonFinite, detect_anomaly
from fastdiff.training.effect import check_effect, effect_warnings
from fastdiff.training.evaluation import AverageEvaluation, check_evaluation, scores_averages
from fastdiff.training.initial_weights import open_initial, take_weights
from fastdiff.training.loop import LONG
from fastdiff.training.microbatch import dummy_step, fit
from fastdiff.training.objective import Objective, create_objective
from fastdiff.training.previews import preview_diffusion
from fastdiff.training.settings import ClassifierTrainSettings
from fastdiff.training.step_plan import StepPlan, decide_compile, decide_cuda_graph, plan_step, training_launches
from fastdiff.training.summary import dry_run as take_dry_run
from fastdiff.training.trainer import Trainer

WORTHWHILE_TRIAL = 200
"""Steps from which numbers of threads are tried, which takes the time of a few steps, or about a second."""


def train(config: Config, default_name: str, dry_run: bool = False) -> None:
    """Train to the last step, from the beginning or from where the run stopped; dry_run: take one step, write nothing.

    config is what `fastdiff.config.load` returns. Raises StopWith when a signal, or losses that stay non-finite,
    end the run early.
    """
    started = time.perf_counter()
    settings = config.train
    _check(config)
    plan = plan_step(settings, config.deepspeed, current())  # contradictions raise before anything is written
    folder = output_folder(settings.run_dir, f"runs/{settings.name or default_name}")
    refuse_as_run(folder, Path(config.data.data_dir))
    if isinstance(settings, ClassifierTrainSettings) and settings.val_data_dir:
        refuse_as_run(folder, Path(settings.val_data_dir), "--val_data_dir")
    keep_compiled_code()
    share_compile_processes()
    with ExitStack() as open_things:
        signals = open_things.enter_context(StopSignals())
        watchdog = open_things.enter_context(Watchdog(current(), 60 * settings.stall_minutes))
        watchdog.progress("starting", LONG)
        writes = current().is_main and not dry_run
        known = resume.holds_run(folder)  # a new folder is not written to until all settings are known to be good
        if writes and known:
            open_things.enter_context(resume.lock(folder))
        snapshot, source = resume.find_snapshot(config, folder)
        initial = None if snapshot or not settings.init_from else open_initial(config)
        advice = [] if snapshot else _check_attention(config.model)
        advice += effect_warnings(settings, snapshot.step if snapshot else 0)
        preview = preview_diffusion(config)
        packs = config.data.cache != "none"
        watchdog.progress("opening the images", math.inf if packs else LONG)  # packing reports its own progress
        loader = open_things.enter_context(_open_loader(config, current(), snapshot, build_cache=not dry_run))
        watchdog.progress("joining", LONG)
        # Nodes that pack images for themselves are not ready at the same time.
        processes = start_processes(settings.stall_minutes, early=packs)
        watchdog.progress("starting", LONG)
        snapshot, source = resume.agree_on_snapshot(processes, config, folder, snapshot, source)
        threads = _threads_of(snapshot, processes)
        notes = advice + choose_kernels(settings.kernels, processes.device, threads_before=threads)
        keep_channels_last(_was_channels_last(snapshot))
        open_things.enter_context(tf32(settings.allow_tf32))
        searches = prepare_cudnn(settings.deterministic, settings.cudnn_benchmark_limit)
        if processes.device.type == "cuda":
            notes.append(searches)
        objective = create_objective(config.model, config.diffusion, getattr(settings, "noised", True))
        watchdog.progress("opening the reference", math.inf)  # a progress bar shows how it is read
        evaluation = AverageEvaluation(config, processes) if scores_averages(settings) else None
        watchdog.progress("starting", LONG)
        config, plan, resolved = resolve_auto(config, plan, objective, processes, snapshot, dry_run)
        notes += resolved
        if not dry_run:
            notes += _compile_kernels(config, plan, processes.device)
        torch.manual_seed(settings.seed)
        model = build_network(config.model)
        if initial and not snapshot:
            notes += take_weights(initial, model, config, loader.class_names)
        initial = None
        alone_on_cpu = processes.device.type == "cpu" and processes.world_size == 1
        if alone_on_cpu and not dry_run and not _threads_of(snapshot, processes):
            notes += _try_threads(plan, model, objective, processes.device, snapshot.step if snapshot else 0)
        validation = None
        if isinstance(settings, ClassifierTrainSettings) and settings.val_data_dir:
            watchdog.progress("opening the validation images", LONG)
            validation = open_things.enter_context(_open_validation(config, settings, processes, loader.class_names))
            watchdog.progress("starting", LONG)
        trainer = Trainer(plan, model, objective, loader, processes, snapshot, validation)
        found = snapshot.notes if snapshot else []
        snapshot = None  # frees as much memory as a checkpoint has bytes
        if writes:
            with blaming("--run_dir"):
                make_writable(folder)
        if writes and not known:
            open_things.enter_context(resume.lock_new(folder))
        if settings.detect_anomaly:
            open_things.enter_context(detect_anomaly(model))

        def alive() -> None:
            watchdog.progress("trying every image", LONG)

        with (
            report_outcome(folder, trainer, writes, signals),
            naming_all(None if dry_run else folder / STEM, alive),
        ):
            if dry_run:
                take_dry_run(config, folder, trainer, notes)
            else:
                run = loop.Loop(config, folder, trainer, preview, evaluation, notes, started, signals, watchdog)
                run.go(source, found)


def _threads_of(snapshot: Snapshot | None, processes: Processes) -> int | None:
    """Number of threads that the run used on a CPU, if it had as many processes as now."""
    state = snapshot.state if snapshot else {}
    return state.get("threads") if state.get("world_size") == processes.world_size else None


def _try_threads(
    plan: StepPlan, model: UNet | Classifier, objective: Objective, device: torch.device, step: int
) -> list[str]:
    """Choose a CPU's number of threads by timing the network on a dummy batch; returns lines for the log.

    The run keeps the number, which is in its checkpoints. No random number that it draws depends on the trial.
    """
    if plan.train.last_step - step < WORTHWHILE_TRIAL:
        return []
    model.set_precision(plan.dtype).train()
    with torch.random.fork_rng(devices=[]):
        line = choose_threads(dummy_step(model, objective, device, plan.micro))
    model.zero_grad(set_to_none=True)
    return [line] if line else []


def _was_channels_last(snapshot: Snapshot | None) -> bool:
    """Whether maps are channels-last in eager code on a CPU. Version 0.1 had them so, and didn't store it."""
    return bool(snapshot and snapshot.state.get("channels_last", "threads" in snapshot.state))


@contextmanager
def report_outcome(folder: Path, trainer: Trainer, writes: bool, signals: StopSignals) -> Iterator[None]:
    """Keep status.json up to date while a run runs and when it ends; turn errors that users can fix into UserErrors.

    writes  whether this process writes status.json
    """
    first = trainer.step

    def report(state: str, code: int | None = None, reason: str = "") -> None:
        if writes:
            resume.write_status(folder, state, trainer.step, code, reason)

    report("running")
    signals.on_abort = functools.partial(report, "interrupted", errors.INTERRUPTED)
    try:
        yield
    except StopWith as stop:
        report(_STATES[stop.code], stop.code, str(stop))
        raise
    except NonFinite as found:
        report("diverged", errors.DIVERGED, str(found))
        raise StopWith(errors.DIVERGED, str(found)) from None
    except torch.OutOfMemoryError as error:
        reason = (
            f"the GPU's memory is full with {trainer.plan.micro} images at once; try --microbatch auto, a smaller "
            "--microbatch, or --use_checkpoint True"
        )
        report("failed", errors.USER_ERROR, reason)
        raise UserError(reason) from error
    except BaseException as error:
        broken = is_broken_collective(error)
        # A collective fails after Ctrl-C where another rank ended at once, as ranks do in their first step.
        if isinstance(error, KeyboardInterrupt) or (broken and signals.requested == CTRL_C):
            place = "before the first step was finished"
            if trainer.step > first:
                place = f"after step {trainer.step}, which was not saved because another rank had ended"
            then = "resumes from the last checkpoint" if first or trainer.step else "starts again"
            reason = f"stopped by Ctrl-C {place}; the same command {then}"
            report("interrupted", errors.INTERRUPTED, reason)
            raise StopWith(errors.INTERRUPTED, reason) from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            file = Path(error.filename or folder).absolute()  # of a compiler's cache, perhaps
            where = f"--run_dir: {folder}" if file.is_relative_to(folder.absolute()) else str(file)
            reason = f"{where} can't be written to ({error.strerror}); make room: the same command resumes"
            with suppress(OSError, UserError):
                report("failed", errors.USER_ERROR, reason)
            raise UserError(reason) from error
        code = errors.PEER_LOST if broken else errors.USER_ERROR if isinstance(error, UserError) else 1
        with suppress(OSError, UserError):  # the disk may be what failed
            report("failed", code, f"{error}" or type(error).__name__)
        raise
    report("done", errors.DONE)


_STATES = {errors.PREEMPTED: "preempted", errors.INTERRUPTED: "interrupted", errors.DIVERGED: "diverged"}
"""States of status.json by exit code, for runs that end themselves."""


def resolve_auto(
    config: Config,
    plan: StepPlan,
    objective: Objective,
    processes: Processes,
    snapshot: Snapshot | None,
    dry_run: bool,
) -> tuple[Config, StepPlan, list[str]]:
    """Settings and plan with every auto replaced by the value chosen here, and lines for the log about the choices."""
    train, state = config.train, snapshot.state if snapshot else {}
    fitted = fit(config.model, plan, objective, processes, state.get("microbatch"), always_estimate=dry_run)
    steps_left = train.last_step - (snapshot.step if snapshot else 0)
    compiles, why = decide_compile(train, processes.device, steps_left, state.get("settings", {}).get("compile"))
    if dry_run:
        compiles, why = False, "a dry run takes one step"
    if train.detect_anomaly:
        compiles, why = False, "detect_anomaly looks at single operations"
    cuda_graph, why_graph = decide_cuda_graph(plan, processes.device)
    plan = plan.resolved(fitted.microbatch, compiles, cuda_graph)
    model = config.model.model_copy(update={"use_checkpoint": fitted.use_checkpoint})
    path = f"through DeepSpeed ({plan.engine_reason})" if plan.engine_reason else "on the device alone (one process)"
    lines = [f"step: {path}", f"torch.compile: {'yes' if compiles else 'no'} ({why})"]
    if processes.device.type == "cuda":
        lines.append(f"CUDA graphs: {'yes' if cuda_graph else 'no'} ({why_graph})")
    lines += fitted.lines
    return config.model_copy(update={"train": plan.train, "model": model}), plan, lines


def _compile_kernels(config: Config, plan: StepPlan, device: torch.device) -> list[str]:
    """Start compiling Triton's kernels in the background, while the network is built; returns lines for the log."""
    launches = functools.partial(
        training_launches,
        *(config.model, config.diffusion, plan.micro, plan.dtype),
        more=plan.accumulation > 1,
        rates=plan.train.ema_rate,
        scaled=plan.scales_gradients,
        through_engine=bool(plan.engine_reason),
        in_regions=plan.in_regions,
        compiled=plan.train.compile is True,
        noised=getattr(plan.train, "noised", True),
    )
    return precompile.start(launches, device)


def _check(config: Config) -> None:
    """UserError for settings that training can't use, alone or on this machine."""
    train, model = config.train, config.model
    if not config.data.data_dir:
        raise UserError("--data_dir is missing: give the folder of images to train on")
    check_effect(train)
    check_evaluation(config)
    if train.label_dropout and not model.null_class:
        raise UserError(f"--label_dropout {train.label_dropout:g} needs class_cond True and null_class True")
    if train.detect_anomaly and (train.compile is True or train.cuda_graph is True):
        which = "cuda_graph" if train.cuda_graph is True else "compile"
        raise UserError(f"--detect_anomaly True contradicts {which} True; leave one of them out")
    if train.cuda_graph is True and not torch.cuda.is_available():
        raise UserError("--cuda_graph True needs a GPU; leave it out")
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if train.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("--precision bf16: this GPU has no bf16 arithmetic; use fp16 or fp32")
    if model.in_channels not in (1, 3, 4):
        raise UserError(f"--in_channels {model.in_channels}: image files have 1 (gray), 3 (RGB) or 4 (RGBA) channels")


def _check_attention(model: NetworkSettings) -> list[str]:
    """Lines for the log on the default attention_resolutions of a new run; UserError for given ones of no level.

    Checkpoints keep theirs: their networks have attention where the resolutions, rounded down, put it.
    """
    prefix = "classifier_" if isinstance(model, ClassifierSettings) else ""
    named = lambda text: text.replace("attention_resolutions", f"{prefix}attention_resolutions")
    if named("attention_resolutions") not in model.model_fields_set:
        warning = default_attention_warning(model.backbone)
        return [named(warning)] if warning else []
    if message := misplaced_attention(model.backbone):
        raise UserError(f"--{named(message)}")
    return []


def _open_loader(config: Config, processes: Processes, snapshot: Snapshot | None, build_cache: bool) -> Loader:
    """This rank's images, with the classes of the checkpoint. UserError for classes that don't fit the model."""
    known = (snapshot.state.get("class_names") or snapshot.info.get("class_names")) if snapshot else None
    loader = open_images(
        config.data,
        size_hw=config.model.size_hw,
        channels=config.model.in_channels,
        batch_size=config.train.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.train.seed,
        device=processes.device,
        class_cond=config.model.class_cond,
        class_names=known or None,
        build_cache=build_cache,
    )
    if config.model.class_cond:
        count = len(loader.class_names)
        if count < 2:
            classifies = isinstance(config.model, ClassifierSettings)
            flag, rest = (
                ("data_dir", "or give --labels")
                if classifies
                else ("class_cond", "give --labels, or train with --class_cond False")
            )
            raise UserError(
                f"--{flag}: {config.data.data_dir} has one class only ({loader.class_names[0]}); name files "
                f"CLASS_anything, sort them into class folders, {rest}"
            )
        if count > config.model.num_classes:
            raise UserError(
                f"--num_classes {config.model.num_classes}: {config.data.data_dir} has {count} classes "
                f"({describe_classes(loader.listing)}); give --num_classes {count} if these are the right ones, "
                "else --labels"
            )
    return loader


def _open_validation(
    config: Config, settings: ClassifierTrainSettings, processes: Processes, class_names: Sequence[str]
) -> Loader:
    """This rank's validation images, in the classes of the training images, without flips and random crops."""
    own = {"data_dir": settings.val_data_dir, "random_flip": False, "random_crop": False, "shuffle": True}
    if config.data.cache_dir:  # where the cache of the training images may have the same name
        own["cache_dir"] = str(Path(config.data.cache_dir) / "validation")
    data = config.data.model_copy(update=own)
    with blaming("--val_data_dir"):
        return open_images(
            data,
            size_hw=config.model.size_hw,
            channels=config.model.in_channels,
            batch_size=settings.batch_size,
            rank=processes.rank,
            world_size=processes.world_size,
            seed=settings.seed,
            device=processes.device,
            class_cond=True,
            class_names=class_names,
        )
