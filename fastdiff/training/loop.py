"""The loop around the trainer: when to log, save, draw, roll back and stop, and into which files."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fastdiff import errors
from fastdiff.config.sections import Config
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.errors import StopWith, blaming
from fastdiff.runtime.files import write_json
from fastdiff.runtime.processes import Consensus
from fastdiff.runtime.script import CTRL_C, StopSignals
from fastdiff.runtime.watchdog import Watchdog
from fastdiff.training.checkpoints.best import NAME as BEST
from fastdiff.training.checkpoints.best import read_best, write_best
from fastdiff.training.checkpoints.folder import (
    list_checkpoints,
    remove_checkpoint,
    set_aside,
    set_latest,
    step_of,
    tidy,
)
from fastdiff.training.checkpoints.format import read_snapshot
from fastdiff.training.checkpoints.manifest import MANIFEST, find_damage
from fastdiff.training.checkpoints.resume import FILE_SYSTEM_LAG, kind_of
from fastdiff.training.checkpoints.saver import Saver
from fastdiff.training.deepspeed_engine import collective_timeout
from fastdiff.training.diagnostics.diagnosis import diagnose
from fastdiff.training.diagnostics.profile import SETTLING, StepProfiler, floor_of
from fastdiff.training.evaluation import AverageEvaluation
from fastdiff.training.previews import draw_preview
from fastdiff.training.reporting import Reporter
from fastdiff.training.summary import batch_of, classes_line, memory_gb, millions
from fastdiff.training.trainer import Trainer

LONG = 3600.0
"""Seconds that compiling, drawing, scoring or writing may take, before the watchdog regards it as a hang."""
POLL = 20.0
"""Seconds between the collectives in which ranks ask whether rank 0 is still writing or drawing."""
REQUESTS = STOP, SAVE, BACK = range(3)
"""Requests of a rank, as `Consensus` numbers them: stop, save, roll back."""


class Loop:
    """Takes a run from its current step to its last, and writes its folder."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        trainer: Trainer,
        preview: GaussianDiffusion | None,
        evaluation: AverageEvaluation | None,
        notes: list[str],
        started: float,
        signals: StopSignals,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.folder, self.trainer = config, folder, trainer
        self.preview, self.evaluation = preview, evaluation
        self.notes, self.started, self.signals, self.watchdog = notes, started, signals, watchdog
        self.train, self.processes = config.train, trainer.processes
        self.checkpoints = folder / "checkpoints"
        self._start_interval(time.perf_counter())
        self.info: dict[str, Any] = {
            "kind": kind_of(config),
            "model": config.model.model_dump(mode="json"),
            "diffusion": config.diffusion.model_dump(mode="json"),
            "class_names": trainer.loader.class_names if config.model.class_cond else [],
        }
        if not getattr(config.train, "noised", True):  # a setting of classifiers
            self.info["noised"] = False
        every = config.train.save_interval
        self.save_seconds = 60 * float(every.removesuffix("min")) if isinstance(every, str) else None
        self.save_steps = None if isinstance(every, str) else every
        self.last_save = self.last_poll = time.monotonic()

    def go(self, source: str, notes: list[str]) -> None:
        """Train to the end. StopWith when a signal, or losses that stay non-finite, end the run earlier."""
        train, trainer = self.train, self.trainer
        main = self.processes.is_main
        with Reporter(self.folder if main else None, train.last_step, trainer.step) as reporter:
            self.reporter = reporter
            self._introduce(source, notes)
            self.saver = self._open_saver() if main else None
            self.consensus = Consensus(
                self.processes.world_size, len(REQUESTS), collective_timeout(train.stall_minutes)
            )
            try:
                self._take_steps(source)
            finally:
                if self.saver:
                    self.saver.close()
            self.consensus.wait()
            unreadable = len(trainer.loader.unreadable)
            skipped = f" (unreadable files left out: {unreadable}, named in the log)" if unreadable else ""
            reporter.log(f"done: {trainer.step} steps, {trainer.samples} images{skipped}, in {self.folder}")

    def _take_steps(self, source: str) -> None:
        train, trainer, reporter = self.train, self.trainer, self.reporter
        saved = trainer.step if source else -1
        first = trainer.step + 1
        profiler = self._profiler()
        if source and self.evaluation and self.evaluation.is_due(trainer.step) and self._lacks_scores():
            self._evaluate(saved)  # the run was stopped before that
        self.watchdog.progress("the first step", LONG)
        for step in trainer.run():
            self.watchdog.progress(f"step {step}")
            reporter.advance()
            if step == first:
                self._first_step_done()
            if profiler:
                self._profile(profiler)
            if self.saver:
                self.saver.check()
            stop, save_now, roll_back = self.consensus.exchange(
                (bool(self.signals.requested), self._save_is_due(), self._has_diverged())
            )
            if roll_back and self._has_diverged():  # the step after that request may have been a good one
                self._roll_back()
                continue
            last = step == train.last_step
            if step % train.log_interval == 0 or last:
                self._log()
            if save_now or last or stop or (self.save_steps and step % self.save_steps == 0):
                self._save()
                saved = step
            if stop and not last:
                self._stop()
            if self.preview and (step % train.sample_interval == 0 or last):
                self._draw()
            if self.evaluation and self.evaluation.is_due(step):
                self._evaluate(saved)
        if profiler and not profiler.finished and trainer.step >= first:
            profiler.close()
            reporter.log(f"no profile: it takes {SETTLING} steps to settle and {profiler.steps} more")
        if saved < trainer.step:
            self._save()
        self._finish_saving()

    # --- starting ---

    def _introduce(self, source: str, notes: list[str]) -> None:
        """Write config.json, clean up the checkpoints' folder, and log what is trained on what."""
        trainer, loader = self.trainer, self.trainer.loader
        if self.processes.is_main:
            content = {"kind": kind_of(self.config), **self.config.model_dump(mode="json")}
            write_json(self.folder / "config.json", content)
            aside = set_aside(self.checkpoints, trainer.step)
            notes = [*notes, *aside, *tidy(self.checkpoints)]
        classes = f" in {len(loader.class_names)} classes" if self.config.model.class_cond else ""
        summary = (
            f"{millions(trainer)} parameters, {loader.num_images} images{classes} ({loader.loader_name}), "
            f"batch {batch_of(trainer)}, {self.train.precision} on {self.processes.device}, in {self.folder}"
        )
        resuming_from = [f"resuming from {source} at step {trainer.step}"] if source else []
        for line in (*classes_line(self.config, trainer), summary, *self.notes, *resuming_from, *notes):
            self.reporter.log(line)

    def _open_saver(self) -> Saver:
        return Saver(
            self.checkpoints,
            keep_last=self.train.keep_last,
            keep_every=self.train.keep_every,
            background=self.train.save_in_background,
            log=self.reporter.log,
        )

    def _profiler(self) -> StepProfiler | None:
        """The profiler on rank 0 if the setting `profile` is given, else None."""
        if not self.train.profile or not self.processes.is_main:
            return None
        share, device = self.trainer.plan.share, self.processes.device
        floor = floor_of(self.config.model, self.train, share, device)
        return StepProfiler(self.train.profile, self.folder / "profile", share, device, floor)

    def _profile(self, profiler: StepProfiler) -> None:
        with self._off_the_clock():  # writing the trace takes seconds
            if found := profiler.advance(self.trainer.waited):
                self.reporter.log("\n".join([f"profile, in {profiler.folder}:", *found.rows()]))

    def _first_step_done(self) -> None:
        """Log how long starting took, and leave the first step, which compiles, out of images/s."""
        self.signals.defer_ctrl_c()  # from here on there are steps to save
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        begun = self.interval_start
        self.reporter.log(
            f"first step after {now - self.started:.1f} s: {begun - self.started:.1f} s to start, {now - begun:.1f} s "
            "for the step"
        )
        self._start_interval(now)

    # --- reporting ---

    def _start_interval(self, now: float) -> None:
        self.interval_start, self.interval_step, self.interval_waited = now, self.trainer.step, self.trainer.waited

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Leave the time within the block out of images/s."""
        start = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - start

    def _log(self) -> None:
        trainer = self.trainer
        metrics = trainer.read_metrics()
        now = time.perf_counter()
        seconds = max(now - self.interval_start, 1e-9)
        steps = trainer.step - self.interval_step
        if steps:  # none in an interval of the first step alone, which compiles
            metrics["images_per_second"] = steps * self.train.batch_size / seconds
        metrics["data_wait"] = (trainer.waited - self.interval_waited) / seconds
        metrics["memory_gb"] = memory_gb(self.processes.device)
        remaining = (self.train.last_step - trainer.step) * seconds / max(1, steps)
        self.reporter.write(trainer.step, self.train.last_step, metrics, remaining)
        self._start_interval(time.perf_counter())

    def _draw(self) -> None:
        """Draw a grid of samples, unless the run is about to stop. Collective."""
        assert self.preview is not None
        trainer = self.trainer
        self.watchdog.progress(f"drawing after step {trainer.step}", LONG)
        with self._off_the_clock():
            file = self.folder / "samples" / f"step_{trainer.step:06d}.png"
            self.last_poll = time.monotonic()
            picture = draw_preview(trainer, self.preview, file, self._may_draw_on)
            if picture is not None:
                self.reporter.picture("samples", trainer.step, picture)
            while self.consensus.any(False):  # answers rank 0's polls in `_may_draw_on`
                continue

    def _may_draw_on(self) -> bool:
        """Tell the waiting ranks now and then that rank 0 is still drawing; returns False once the run is to stop."""
        if time.monotonic() - self.last_poll > POLL:
            self.consensus.any(True)
            self.last_poll = time.monotonic()
        return not self.signals.requested

    def _evaluate(self, saved: int) -> None:
        """Score the averages, and keep the best one. Collective.

        StopWith when a signal ends that: no step is taken before the scores are made up for. saved is the step of the
        newest checkpoint.
        """
        assert self.evaluation is not None
        trainer, reporter = self.trainer, self.reporter
        self.watchdog.progress(f"evaluating after step {trainer.step}", LONG)
        with self._off_the_clock():
            result = self.evaluation.score(trainer, self._may_evaluate_on)
            if result is None:
                if saved < trainer.step:
                    self._save()
                self._stop()
            if not self.processes.is_main:
                return
            best = result.best
            # The row comes last: a run that is killed before that evaluates again, with the same result.
            if better := best is not None and best.beats(read_best(self.checkpoints)):
                write_best(self.checkpoints, best.about, best.weights, self.info)
            reporter.add(trainer.step, result.scores)
            kept = [f"the best average so far is in {self.checkpoints / BEST}"] if better else []
            for line in (*result.lines, *kept):
                reporter.log(line)

    def _lacks_scores(self) -> bool:
        """Whether the averages of this step have not been scored, by rank 0's table. Collective."""
        assert self.evaluation is not None
        return self.consensus.any(self.reporter.lacks(self.trainer.step, self.evaluation.columns))

    def _may_evaluate_on(self) -> bool:
        """Whether no rank is to stop. Collective."""
        self.watchdog.progress(f"evaluating after step {self.trainer.step}", LONG)
        return not self.consensus.any(bool(self.signals.requested))

    # --- saving and stopping ---

    def _save_is_due(self) -> bool:
        """Whether an interval in minutes is over, by rank 0's clock."""
        if self.save_seconds is None or not self.processes.is_main:
            return False
        return time.monotonic() - self.last_save >= self.save_seconds

    def _save(self) -> None:
        """Save the current state. With save_in_background the checkpoint is on disk only later. Collective."""
        self.watchdog.progress(f"saving after step {self.trainer.step}", LONG)
        self.last_save = time.monotonic()
        with self._off_the_clock():
            self._wait_for_writing()
            self.consensus.forget(SAVE)
            self.reporter.sync()
            trainer = self.trainer
            files = trainer.checkpoint_files(self.info)
            if self.saver:
                last_good = trainer.step - trainer.stepper.state_dict()["bad_streak"]  # current, unlike bad_streak()
                self.saver.save(trainer.step, files, trainer.state_bytes, last_good)
            else:
                deque(files, maxlen=0)

    def _finish_saving(self) -> None:
        """Wait until everything is on disk: launchers end all ranks as soon as one exits. Collective."""
        self._wait_for_writing()
        self.signals.finish()

    def _wait_for_writing(self) -> None:
        """Wait until rank 0 has written its checkpoint, in collectives that each last at most POLL. Collective."""
        self.watchdog.progress(f"saving after step {self.trainer.step}", LONG)
        while self.consensus.any(self.saver is not None and not self.saver.wait(POLL)):
            continue

    def _stop(self) -> NoReturn:
        """End the run because of a signal, after the step has been saved. Collective."""
        # The signals of launchers differ from rank to rank; the terminal sends Ctrl-C to all of them.
        interrupted = self.consensus.any(self.signals.requested == CTRL_C)
        self._finish_saving()
        name = CTRL_C if interrupted else self.signals.requested or "a signal to another rank"
        raise StopWith(
            errors.INTERRUPTED if interrupted else errors.PREEMPTED,
            f"stopped by {name} after step {self.trainer.step}; everything is saved in {self.folder}, and the same "
            "command resumes from there",
        )

    # --- losses that stay non-finite ---

    def _has_diverged(self) -> bool:
        """Whether max_bad_steps steps in a row were skipped."""
        limit = self.train.max_bad_steps
        return bool(limit) and self.trainer.stepper.bad_streak() >= limit

    def _roll_back(self) -> None:
        """Return to the last checkpoint before the bad steps; StopWith if there is none, or after a roll-back before.

        Collective.
        """
        trainer = self.trainer
        self.watchdog.progress("rolling back", LONG)
        bad = trainer.stepper.bad_streak()
        self._wait_for_writing()
        self.consensus.forget(SAVE, BACK)
        if trainer.rollbacks:
            self._diverged(bad, "once more")
        target = self._last_good(trainer.step - bad)
        if target is None:
            self._diverged(bad, "and there is no checkpoint from before")
        self.reporter.log(
            f"{bad} steps in a row had a non-finite loss or gradient and were skipped: going back to {target}, to "
            "continue with other images, timesteps and noise"
        )
        with blaming("--run_dir"):
            trainer.roll_back(read_snapshot(target, [str(rate) for rate in self.train.ema_rate]))
        self.processes.barrier()
        if self.processes.is_main:
            for newer in list_checkpoints(self.checkpoints):
                if step_of(newer) > trainer.step:
                    remove_checkpoint(newer)
            set_latest(target)
        self.reporter.rewind(trainer.step)
        self._start_interval(time.perf_counter())

    def _last_good(self, step: int) -> Path | None:
        """The newest undamaged checkpoint up to `step` that rank 0 sees, or None. Collective."""
        before = [p for p in list_checkpoints(self.checkpoints) if step_of(p) <= step]
        found = next((p for p in reversed(before) if not find_damage(p)), None) if self.processes.is_main else None
        if self.processes.world_size == 1:
            return found
        box = [found.name if found else None]
        dist.broadcast_object_list(box, src=0)
        if box[0] is None:
            return None
        until = time.monotonic() + FILE_SYSTEM_LAG
        while not (self.checkpoints / box[0] / MANIFEST).is_file() and time.monotonic() < until:
            time.sleep(0.5)
        return self.checkpoints / box[0]

    def _diverged(self, bad: int, why: str) -> NoReturn:
        lines, content = diagnose(self.trainer)
        for line in lines:
            self.reporter.log(line)
        if self.processes.is_main:
            write_json(self.folder / "diagnosis.json", content)
        self.processes.barrier()
        self.signals.finish()
        raise StopWith(
            errors.DIVERGED,
            f"{bad} steps in a row had a non-finite loss or gradient, {why}; the diagnosis is in the log and in "
            f"{self.folder / 'diagnosis.json'}: try a lower --lr, --grad_clip 1, --precision bf16 or fp32, or "
            "--detect_anomaly True",
        )
