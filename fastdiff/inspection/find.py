"""Finds out what a file or folder is, and describes it. Nothing is written, and no code of a file is run."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.config.presets import config_file
from fastdiff.config.sections import Config
from fastdiff.errors import UserError, one_line, quoted
from fastdiff.evaluation.classifier import is_classifier
from fastdiff.evaluation.report import TABLE
from fastdiff.evaluation.statistics import holds_statistics
from fastdiff.images import other_data
from fastdiff.images.cache.format import RECORD, is_packed
from fastdiff.images.listing import has_own_images
from fastdiff.images.outputs import kind_of_output
from fastdiff.inspection.description import Description, command
from fastdiff.inspection.images import (
    describe_job,
    describe_packed,
    describe_picture,
    describe_pictures,
    describe_samples,
    describe_zip,
)
from fastdiff.inspection.networks import describe_checkpoint, describe_config, describe_run, describe_runs
from fastdiff.inspection.scores import (
    describe_curves,
    describe_features,
    describe_result,
    describe_results,
    describe_statistics,
    describe_terms,
    is_curves,
    is_result,
)
from fastdiff.models import weights
from fastdiff.models.foreign import OtherFile, describe_folder
from fastdiff.runtime.file_kinds import WEIGHTS
from fastdiff.runtime.files import read_json
from fastdiff.runtime.untrusted import npz_array_header
from fastdiff.sampling.job.manifest import NAME, read_manifest
from fastdiff.training.checkpoints.folder import list_checkpoints
from fastdiff.training.checkpoints.manifest import MANIFEST

_PARTS = {"config.json", "status.json", "log.txt", "progress.csv", NAME, RECORD, MANIFEST, "best.json", TABLE}
"""Files that say something about the folder that they lie in."""
_LOOSE = ("folder of images", "folder of runs", "folder of weights")
"""Kinds of folders of which no file says anything."""
OTHER = "not a network of fastdiff"


def find(given: str) -> Description:
    """Describe what lies at a path, or the configuration of that name. UserError for anything unknown."""
    path = Path(given)
    notes: list[str] = []
    try:
        if not given or not path.exists():
            with suppress(UserError):
                if (config := config_file(given)) != given:
                    return find(config)
            raise UserError(f"{given or 'an empty path'} does not exist")
        with _warnings_in(notes):
            found = _folder(path) if path.is_dir() else _file(path)
    except OtherFile as error:
        return Description(path, OTHER, {"about": str(error).removeprefix(f"{path} ")})
    except OSError as error:
        raise UserError(f"{quoted(given)} can't be read ({error.strerror or error})") from error
    found.notes = [*notes, *found.notes]
    return found


@contextmanager
def _warnings_in(notes: list[str]) -> Iterator[None]:
    """Add what the package warns of to notes, each once, instead of printing it."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in notes:
                notes.append(record.getMessage())

    logger, handler = logging.getLogger("fastdiff"), Keep(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


# --- folders ---


def _folder(folder: Path) -> Description:
    names = sorted(path.name for path in folder.iterdir())  # raises where the folder can't be read
    if not names:
        raise UserError(f"{folder} is an empty folder")
    kind = kind_of_output(folder, names)
    if kind == "run":
        return describe_run(folder)
    if is_packed(folder):
        return describe_packed(folder)
    if kind == "job" and not has_own_images(names):
        try:
            manifest = read_manifest(folder)
        except ValueError as error:
            raise UserError(f"{folder / NAME} is damaged: {error}") from None
        assert manifest is not None
        return describe_job(folder, manifest)
    if any(weights.step_and_rate(Path(name))[0] is not None or name in weights.CONVERTED for name in names):
        return describe_checkpoint(folder)
    if "model_index.json" in names and (other := _of_another_program(folder)):
        return other
    if list_checkpoints(folder):
        run = folder.absolute().parent
        is_run = kind_of_output(run, [path.name for path in run.iterdir()]) == "run"
        return describe_run(folder.parent) if is_run else describe_checkpoint(folder)
    if TABLE in names:
        return describe_results(folder)
    runs = [name for name in names if (folder / name / "checkpoints").is_dir()]
    if runs and not has_own_images(names):
        return describe_runs(folder, runs)
    return _pictures_or_other(folder, names)


def _pictures_or_other(folder: Path, names: list[str]) -> Description:
    if found := _to_prepare(folder, names):
        return found
    if "vb_terms.npz" in names:
        return _npz(folder / "vb_terms.npz")
    try:
        return describe_pictures(folder)
    except UserError as error:
        if other := _of_another_program(folder):
            return other
        if files := [name for name in names if name.endswith(WEIGHTS)]:
            return Description(folder, "folder of weights", {"files": files}, next=command("info", folder / files[0]))
        kinds = "a run, a checkpoint, a sampling job or packed images"
        raise UserError(f"{folder} is none of fastdiff's folders ({kinds}), and {error}") from None


def _of_another_program(folder: Path) -> Description | None:
    what = describe_folder(folder)
    if not what.startswith("; it is "):
        return None
    found = Description(folder, OTHER, {"about": what.removeprefix("; it is ")})
    if found.facts["about"].startswith("a folder of diffusers"):
        found.next = command("convert", model_path=folder, to="pt", out="FILE.pt")
    return found


def _to_prepare(path: Path, names: Sequence[str]) -> Description | None:
    """The description of a known data set that `fastdiff prepare` reads: a folder with these names, or an archive."""
    known = (
        ("an LMDB", "data.mdb" in names, "lsun", "lmdb"),
        ("CIFAR-10's batches", other_data.CIFAR_BATCH in names, "cifar10", "archive"),
        ("CIFAR-10's archive", path.name.startswith("cifar-10-") and ".tar" in path.name, "cifar10", "archive"),
        ("ImageNet's archive", path.name.startswith("ILSVRC2012") and ".tar" in path.name, "imagenet64", "source"),
    )
    for what, fits, script, flag in known:
        if fits:
            fitting = command(f"prepare {script}", **{flag: path}, out="FOLDER")
            return Description(path, f"data set to prepare: {what}", next=fitting)
    return None


# --- files ---


def _file(file: Path) -> Description:
    if not file.is_file():  # opening a named pipe would wait
        raise UserError(f"{file} is neither a file nor a folder")
    if file.name in _PARTS:
        with suppress(UserError):
            found = _folder(file.parent)
            if not found.kind.startswith(_LOOSE):
                return found
    kind = other_data.kind_of_file(file)
    if kind == "npz" or (kind in ("", "zip") and file.suffix == ".npz"):
        return _npz(file)
    if kind == "picture":
        return describe_picture(file)
    if kind == "labels" and file.suffix == ".json":
        return _json(file, read_json(file))
    if kind == "zip" and not _is_of_torch(file):
        return describe_zip(file)
    if kind in ("", "zip") or file.suffix in WEIGHTS:
        try:
            return describe_checkpoint(file)
        except UserError:
            if is_classifier(file):
                return describe_features(file)
            raise
    if data_set := _to_prepare(file, ()):
        return data_set
    if kind == "text":
        raise UserError(f"{file} is a text file, and nothing that fastdiff knows")
    raise UserError(f"{file} is {other_data.describe_file(file)}")


def _npz(file: Path) -> Description:
    try:
        with zipfile.ZipFile(file) as archive:
            if holds_statistics(file):
                return describe_statistics(file, archive)
            if "arr_0.npy" in archive.namelist():
                header = npz_array_header(archive, "arr_0")
                if len(header.shape) == 4 and header.dtype == np.uint8:
                    return describe_samples(file, archive)
                if len(header.shape) == 1 and header.dtype.kind == "f":
                    return describe_terms(file, archive)
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and json raise many types
        raise UserError(f"{file} is no .npz of arrays, or is damaged ({one_line(str(error))[:200]})") from None
    shown = one_line(", ".join(names[:5])) + ", ..." * (len(names) > 5)
    raise UserError(f"{file} is an .npz of arrays ({shown}), but holds neither images nor statistics of images")


def _json(file: Path, content: Any) -> Description:
    if is_result(content):
        return describe_result(file, content)
    if is_curves(content):
        return describe_curves(file, content)
    if isinstance(content, dict) and content and content.keys() <= {*Config.model_fields, "family"}:
        return describe_config(file, content)
    raise UserError(f"{file} is a JSON file, but neither a configuration nor the result of an evaluation")


def _is_of_torch(file: Path) -> bool:
    """Whether a zip may be of torch.save."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # it is damaged, which reading it as a checkpoint says
        return True
