"""A training run from settings to its folder: what train.py and super_res_train.py do."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from fastdiff import ops
from fastdiff.compilation import keep_compiled_code, prepare_cudnn
from fastdiff.config import Config, SuperResConfig
from fastdiff.diffusion import GaussianDiffusion, create_diffusion
from fastdiff.images import Loader, open_images
from fastdiff.kernel_choice import choose_kernels
from fastdiff.models import SuperResSettings, build_model, weights
from fastdiff.processes import Processes, current, make_writable, output_folder
from fastdiff.reporting import Reporter
from fastdiff.sampling.draw import draw
from fastdiff.sampling.pictures import grid, save_grid, to_uint8
from fastdiff.settings import UserError, what_is_wrong
from fastdiff.training import checkpoints, compilation
from fastdiff.training.checkpoints import Snapshot
from fastdiff.training.engine import deepspeed_config, needs_engine, start_processes
from fastdiff.training.fitting import fit
from fastdiff.training.profile import StepProfiler, floor_of
from fastdiff.training.trainer import Trainer, low_res_of


def train(config: Config, default_name: str, dry_run: bool = False) -> None:
    """Train until the last step, or continue to it; with dry_run one step, and nothing written.

    config as `fastdiff.config.load` gives it.
    """
    started = time.perf_counter()
    settings = config.train
    _check(config)
    deepspeed_config(settings, config.deepspeed, current().world_size)  # refuses early what can't be
    folder = output_folder(settings.run_dir, f"runs/{settings.name or default_name}")
    previous = checkpoints.latest(folder / "checkpoints")
    if previous:
        _check_same_model(folder, config)
    snapshot, source = _snapshot(config, previous)
    preview = _preview_diffusion(config)
    processes = current()
    loader = _open_loader(config, processes, snapshot, build_cache=not dry_run)
    processes = start_processes()
    notes = choose_kernels(settings.kernels, processes.device)
    torch.set_float32_matmul_precision("highest")
    keep_compiled_code()
    prepare_cudnn()
    diffusion = create_diffusion(config.diffusion, config.model.learn_sigma)
    config, settled = _settle(config, diffusion, processes, snapshot, dry_run)
    torch.manual_seed(settings.seed)
    model = build_model(config.model)
    trainer = Trainer(config.train, config.deepspeed, model, diffusion, loader, processes, snapshot)
    if not dry_run and processes.is_main:
        make_writable(folder, "--run_dir")
    run = _Run(config, folder, trainer, preview, [*notes, *settled], started)
    try:
        if dry_run:
            run.dry()
        else:
            run.go(source, snapshot.notes if snapshot else [])
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full with {trainer.micro} images at once; try --microbatch auto, a smaller "
            "--microbatch, or --use_checkpoint True"
        ) from error
    loader.close()


def _settle(
    config: Config, diffusion: GaussianDiffusion, processes: Processes, snapshot: Snapshot | None, dry_run: bool
) -> tuple[Config, list[str]]:
    """The settings with every auto replaced by what it comes to here, and lines that say so."""
    train, step = config.train, snapshot.step if snapshot else 0
    before = snapshot.state.get("microbatch") if snapshot else None
    fitted = fit(config.model, train, diffusion, processes, config.deepspeed, before, always_estimate=dry_run)
    compiles, why = compilation.decide(train, processes.device, train.last_step - step)
    if dry_run:
        compiles, why = False, "a dry run takes one step"
    update = {"compile": compiles, "microbatch": fitted.microbatch}
    model = config.model.model_copy(update={"use_checkpoint": fitted.use_checkpoint})
    settled = config.model_copy(update={"train": train.model_copy(update=update), "model": model})
    why_engine = needs_engine(train, config.deepspeed, processes.world_size)
    step_line = f"step: through DeepSpeed ({why_engine})" if why_engine else "step: on the device alone (one process)"
    return settled, [step_line, f"torch.compile: {'yes' if compiles else 'no'} ({why})", *fitted.lines]


def _check(config: Config) -> None:
    train, model = config.train, config.model
    if not config.data.data_dir:
        raise UserError("--data_dir is missing: give the folder of images to train on")
    if train.label_dropout and not model.null_class:
        raise UserError(f"--label_dropout {train.label_dropout:g} needs class_cond True and null_class True")
    if train.cuda_graph and not torch.cuda.is_available():
        raise UserError("--cuda_graph True needs a GPU; leave it out")
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if train.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("--precision bf16: this GPU has no bf16 arithmetic; use fp16 or fp32")
    if model.in_channels not in (1, 3, 4):
        raise UserError(f"--in_channels {model.in_channels}: image files have 1 (gray), 3 (RGB) or 4 (RGBA) channels")


def _snapshot(config: Config, previous: Path | None) -> tuple[Snapshot | None, str]:
    """The state to go on from: the run's own newest checkpoint before the one that resume_checkpoint names."""
    train = config.train
    rates = [str(rate) for rate in train.ema_rate]
    if previous:
        snapshot = checkpoints.read(previous, rates, "--run_dir")
        source = str(previous)
    elif train.resume_checkpoint:
        snapshot = checkpoints.read(Path(train.resume_checkpoint), rates)
        source = train.resume_checkpoint
    else:
        return None, ""
    with torch.device("meta"):
        model = build_model(config.model)
    labels = snapshot.model.get(checkpoints.LABELS)
    lacks_null_class = labels is not None and tuple(labels.shape[:1]) == (config.model.num_classes,)
    if config.model.null_class and lacks_null_class and not previous:
        checkpoints.add_null_class(snapshot)
    flag = "--run_dir" if previous else "--resume_checkpoint"
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if own != {name: tuple(value.shape) for name, value in snapshot.model.items()}:
        weights.load_into(model, snapshot.model, Path(source), flag)  # says what differs
    return snapshot, source


def _check_same_model(folder: Path, config: Config) -> None:
    file = folder / "config.json"
    if not file.is_file():
        return
    stored = checkpoints.read_json(file)
    if stored.get("kind", _kind(config)) != _kind(config):
        script = "super_res_train.py" if stored["kind"] == "super_res" else "train.py"
        raise UserError(f"--run_dir: {folder} holds a run of {script}; give another --run_dir, or use that script")
    for section in ("model", "diffusion"):
        now = getattr(config, section).model_dump(mode="json")
        absent = {"null_class": False} if section == "model" else {}  # from runs of before there was one
        for name, value in {**absent, **stored.get(section, {})}.items():
            if name in now and name != "use_checkpoint" and now[name] != value:
                raise UserError(
                    f"--run_dir: {folder} holds a run with {section}.{name} {value}, now it is {now[name]}; "
                    "give another --run_dir, or the run's own settings"
                )


def _kind(config: Config) -> str:
    return "super_res" if isinstance(config, SuperResConfig) else "unet"


def _preview_diffusion(config: Config) -> GaussianDiffusion | None:
    """The process of the sample grids during training."""
    if not config.train.sample_interval:
        return None
    try:
        settings = type(config.diffusion).model_validate(
            {**config.diffusion.model_dump(), "timestep_respacing": config.train.sample_respacing}
        )
    except ValidationError as error:
        raise UserError(f"--sample_respacing: {what_is_wrong(error).replace('timestep_respacing ', '')}") from None
    return create_diffusion(settings, config.model.learn_sigma)


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


class _Run:
    """The loop around the trainer: when to log, save and draw, and into which files."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        trainer: Trainer,
        preview: GaussianDiffusion | None,
        notes: list[str],
        started: float,
    ) -> None:
        self.config, self.folder, self.trainer, self.preview = config, folder, trainer, preview
        self.notes, self.started = notes, started
        self.processes = trainer.processes
        self._start_interval(time.perf_counter())
        self.info = {
            "kind": _kind(config),
            "model": config.model.model_dump(mode="json"),
            "diffusion": config.diffusion.model_dump(mode="json"),
            "class_names": trainer.loader.class_names if config.model.class_cond else [],
        }

    def go(self, source: str, notes: list[str]) -> None:
        train, trainer = self.config.train, self.trainer
        folder = self.folder if self.processes.is_main else None
        with Reporter(folder, train.last_step, trainer.step, train.batch_size) as reporter:
            self._introduce(reporter, source, notes)
            saved = trainer.step if source else -1
            first = trainer.step + 1
            profiler = self._profiler()
            for step in trainer.run():
                reporter.advance()
                if step == first:
                    self._first_step_done(reporter)
                if profiler:
                    self._profile(profiler, reporter)
                last = step == train.last_step
                if step % train.log_interval == 0 or last:
                    self._log(reporter)
                if step % train.save_interval == 0 or last:
                    self._save(reporter)
                    saved = step
                if self.preview and (step % train.sample_interval == 0 or last):
                    self._draw(reporter)
            if saved < trainer.step:
                self._save(reporter)
            unreadable = len(trainer.loader.unreadable)
            skipped = f" ({unreadable} unreadable files left out, named in the log)" if unreadable else ""
            reporter.say(
                f"done: {trainer.step} steps, {trainer.step * train.batch_size} images{skipped}, in {self.folder}"
            )

    def _introduce(self, reporter: Reporter, source: str, notes: list[str]) -> None:
        trainer, loader = self.trainer, self.trainer.loader
        if self.processes.is_main:
            content = {"kind": _kind(self.config), **self.config.model_dump(mode="json")}
            checkpoints.write_json(self.folder / "config.json", content)
        classes = f" in {len(loader.class_names)} classes" if self.config.model.class_cond else ""
        reporter.say(
            f"{_millions(trainer)} parameters, {loader.num_images} images{classes} ({loader.loader_name}), batch "
            f"{self.config.train.batch_size} = {self.processes.world_size} x {trainer.micro} x {trainer.accumulation}, "
            f"{self.config.train.precision} on {self.processes.device}, in {self.folder}"
        )
        for line in self.notes:
            reporter.say(line)
        if source:
            reporter.say(f"resuming from {source} at step {trainer.step}")
        for note in notes:
            reporter.say(note)

    def _profiler(self) -> StepProfiler | None:
        """On rank 0 for the setting `profile`."""
        train, device = self.config.train, self.processes.device
        if not train.profile or not self.processes.is_main:
            return None
        share = train.batch_size // self.processes.world_size
        floor = floor_of(self.config.model, train, share, device)
        return StepProfiler(train.profile, self.folder / "profile", share, device, floor)

    def _profile(self, profiler: StepProfiler, reporter: Reporter) -> None:
        with self._off_the_clock():  # writing the trace takes seconds
            if found := profiler.advance(self.trainer.waited):
                reporter.say("\n".join([f"profile, in {profiler.folder}:", *found.rows()]))

    def _first_step_done(self, reporter: Reporter) -> None:
        """How long starting took. It doesn't count in images/s: the first step compiles."""
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        built = self.interval_start - self.started
        reporter.say(f"started in {built:.1f} s, first step {now - self.interval_start:.1f} s")
        if self.config.train.log_interval > 1 and self.trainer.step % self.config.train.log_interval:
            self._start_interval(now)

    def _start_interval(self, now: float) -> None:
        self.interval_start, self.interval_step, self.interval_waited = now, self.trainer.step, self.trainer.waited

    def _log(self, reporter: Reporter) -> None:
        trainer = self.trainer
        metrics = trainer.read_metrics()
        now = time.perf_counter()
        seconds = max(now - self.interval_start, 1e-9)
        rate = (trainer.step - self.interval_step) * self.config.train.batch_size / seconds
        metrics |= {
            "images_per_second": rate,
            "data_wait": (trainer.waited - self.interval_waited) / seconds,
            "memory_gb": _memory_gb(self.processes.device),
        }
        reporter.write(trainer.step, self.config.train.last_step, metrics, rate)
        self._start_interval(time.perf_counter())

    def _save(self, reporter: Reporter) -> None:
        with self._off_the_clock():
            self.trainer.save(self.folder / "checkpoints", self.info)
            reporter.say(f"saved {self.folder / 'checkpoints' / f'step_{self.trainer.step:06d}'}")

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Saving and drawing don't count in images/s."""
        start = time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - start

    def _draw(self, reporter: Reporter) -> None:
        """A grid of samples from the first average, from the same noise every time."""
        with self._off_the_clock():
            average = self.trainer.masters.gather(self.trainer.ema[str(self.config.train.ema_rate[0])])
            if self.processes.is_main and average is not None:
                images = self._draw_images(average)
                samples = self.folder / "samples"
                samples.mkdir(exist_ok=True)
                save_grid(samples / f"step_{self.trainer.step:06d}.png", images)
                reporter.picture("samples", self.trainer.step, np.array(grid(images).convert("RGB")))
            self.processes.barrier()

    def _draw_images(self, average: dict[str, torch.Tensor]) -> np.ndarray:
        settings, train, device = self.config.model, self.config.train, self.processes.device
        model = build_model(settings)
        model.load_state_dict(average)
        model.to(device).eval().set_precision(self.trainer.model.dtype)
        index = torch.arange(train.sample_count, device=device)
        kwargs: dict[str, Any] = {}
        batch = next(self.trainer.loader.once()) if isinstance(settings, SuperResSettings) else None
        if batch is not None:
            x = ops.start_map(batch.images[: train.sample_count])
            kwargs["low_res"] = low_res_of(x, settings.small_size)
            index = index[: len(x)]
        if settings.class_cond:
            classes = torch.tensor(range(len(self.trainer.loader.class_names)), device=device)
            kwargs["y"] = classes[index % len(classes)] if batch is None else batch.labels[: len(index)]
        shape = (settings.in_channels, *settings.size_hw)
        assert self.preview is not None
        use_ddim = train.sample_respacing.startswith("ddim")
        drawn = draw(model, self.preview, index, shape, seed=train.seed, use_ddim=use_ddim, model_kwargs=kwargs)
        return to_uint8(drawn).cpu().numpy()

    def dry(self) -> None:
        """One step, and a report of what a run would take."""
        trainer = self.trainer
        start = time.perf_counter()
        trainer.take_step()
        metrics = trainer.read_metrics()
        seconds = time.perf_counter() - start
        if not self.processes.is_main:
            return
        names = ", ".join(
            str(self.folder / name) for name in ("config.json", "log.txt", "progress.csv", "samples/", "checkpoints/")
        )
        print(
            "\n".join(self.notes) + "\n"
            f"parameters     {_millions(trainer)}\n"
            f"images         {trainer.loader.num_images} ({trainer.loader.loader_name})\n"
            f"batch          {self.config.train.batch_size} = {self.processes.world_size} processes x {trainer.micro} "
            f"images x {trainer.accumulation} times\n"
            f"first loss     {metrics['loss']:.4f}\n"
            f"first step     {seconds:.1f} s, start-up included\n"
            f"peak memory    {_memory_gb(self.processes.device):.2f} GB on {self.processes.device}\n"
            f"would write    {names}\n"
            "nothing was written"
        )


def _millions(trainer: Trainer) -> str:
    return f"{sum(shape.numel() for shape in trainer.masters.shapes.values()) / 1e6:.1f}M"


def _memory_gb(device: torch.device) -> float:
    """Most memory used so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
