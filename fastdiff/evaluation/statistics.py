"""What the metrics need to know of a set of images, and the .npz files that keep it.

    mu, sigma        mean [D] and covariance [D, D] of the features, as in clean-fid's and EDM's files
    mu_s, sigma_s    the same of the spatial features, as in OpenAI's reference batches
    features         [n, D] float32, features of up to `KEPT` images, for precision, recall and KID
    count            number of images
    about            JSON: network, hash of its weights, precision, size of the images, hash of their pixels

The first four names are read wherever they come from; the others are fastdiff's own.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import UserError, one_line, quoted
from fastdiff.evaluation.features import FeatureNetwork, Output
from fastdiff.evaluation.moments import Moments
from fastdiff.runtime.files import atomic_write
from fastdiff.runtime.untrusted import is_there, npz_header, read_npz_array

KEPT = 10_000
"""Reference images whose features precision, recall and KID use, as in OpenAI's reference batches."""
_NAMES: dict[Output, tuple[str, str]] = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_WIDEST = 8192
"""The largest number of features in a file."""


@dataclass
class Described:
    """A set of images as the metrics see it."""

    path: str
    count: int
    """Number of images; 0 where a file of statistics doesn't say it."""
    moments: dict[Output, Moments] = field(default_factory=dict)
    features: dict[Output, Tensor] = field(default_factory=dict)
    """[n, D] float32 on the CPU, in the order of the images."""
    probe: dict[Output, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of the first images, features as they were computed in bf16 or fp16, and in fp32; empty where all are fp32."""
    size: str = ""
    """HxWxC, empty where it is unknown."""
    digest: str = ""
    """A hash of the pixels, the same for an npz and a folder of PNG files; empty where it is unknown."""
    about: dict[str, Any] = field(default_factory=dict)
    """Further entries of a result, such as the network of a file of statistics."""
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The entries of a result that say what the set is."""
        known = {"path": self.path, "count": self.count or None, "size": self.size, "pixels": self.digest, **self.about}
        return {name: value for name, value in known.items() if value}


def write_statistics(path: Path, found: Described, network: FeatureNetwork) -> None:
    """Write a set's statistics, with all moments and features that were computed. Raises UserError."""
    arrays: dict[str, np.ndarray] = {"count": np.array(found.count)}
    for output, names in _NAMES.items():
        if output in found.moments:
            moments = found.moments[output]
            arrays |= dict(zip(names, (moments.mean.numpy(), moments.covariance.numpy()), strict=True))
    if "pool" in found.features:
        arrays["features"] = found.features["pool"].numpy()
    about = {**network.describe(), "size": found.size, "pixels": found.digest, "made_of": found.path, **found.about}
    arrays["about"] = np.array(json.dumps(about))
    try:
        with atomic_write(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"--reference_out: {path} can't be written ({error.strerror or error})") from error


def lossy_note(what: str, formats: str) -> str:
    """The remark on a set of images whose files are lossy."""
    return f"the files of the {what} are {formats}, whose compression changes every metric"


def holds_statistics(path: Path) -> bool:
    """Whether a file is an npz with a mean, or one of `write_statistics`, whatever else is in it."""
    try:
        if not path.is_file():  # opening a named pipe would wait
            return False
        with zipfile.ZipFile(path) as archive:
            return not {"mu.npy", "mu_s.npy", "about.npy"}.isdisjoint(archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # ValueError: names that are no UTF-8
        return False


def holds_images(path: Path) -> bool:
    """Whether an npz holds images, as OpenAI's reference batches do beside their statistics."""
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def read_statistics(path: Path, outputs: Collection[Output], network: FeatureNetwork) -> Described:
    """Read the moments of these outputs, and the features that the file has.

    Raises UserError for a damaged file, one of another network's features, and one that lacks moments that are wanted.
    """
    if not is_there(path, "file"):
        raise UserError(f"{path} does not exist; give statistics (.npz) or images")
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            about = read_about(archive, names)
            _check_network(path, about, network)
            count = int(read_npz_array(archive, "count", 1 << 12)) if "count" in names else 0
            if count < 0:
                raise ValueError(f"count is {count}")
            found = Described(
                path=str(path),
                count=count,
                size=str(about.pop("size", "")),
                digest=str(about.pop("pixels", "")),
                about={"statistics": True, **about},
            )
            if "lossy" in about:
                found.notes.append(lossy_note("reference", str(about["lossy"])))
            if not about and network.is_inception:
                found.notes.append(f"{path.name} doesn't say which network made it, and is taken for Inception's")
                if "_clean_" in path.name:
                    found.notes.append(
                        f"{path.name} looks like clean-fid's mode clean, which resizes images otherwise; its mode "
                        "legacy_tensorflow doesn't"
                    )
            for output in outputs:
                if output in _NAMES:
                    found.moments[output] = _moments(archive, names, output, network.widths[output], path, found.count)
            if "features" in names:
                found.features["pool"] = _matrix(archive, "features", network.widths["pool"], path)
            return found
    except UserError:
        raise
    except Exception as error:  # zipfile, numpy and json raise many types
        raise UserError(f"{path} is no file of statistics, or is damaged ({one_line(str(error))[:200]})") from error


def read_about(archive: zipfile.ZipFile, names: set[str]) -> dict[str, Any]:
    """The entry about, the plain values of its JSON object; empty where there is none. ValueError for another value."""
    if "about" not in names:
        return {}
    content = json.loads(str(read_npz_array(archive, "about", 1 << 16)))
    if not isinstance(content, dict):
        raise ValueError("about is no object")
    return {str(name): value for name, value in content.items() if isinstance(value, (str, int, float, bool))}


def _check_network(path: Path, about: dict[str, Any], network: FeatureNetwork) -> None:
    ours = network.describe()
    for name in ("network", "weights"):
        if name in about and about[name] != ours[name]:
            raise UserError(
                f"{path} holds statistics of other features: its {name} is {quoted(about[name])}, now it is "
                f"{quoted(ours[name])}; make it anew with --reference_out"
            )


def _moments(archive: zipfile.ZipFile, names: set[str], output: Output, width: int, path: Path, count: int) -> Moments:
    mean_name, covariance_name = _NAMES[output]
    for name in (mean_name, covariance_name):
        if name not in names:
            what = (
                ", which sFID needs; give OpenAI's reference batch, images" if output == "spatial" else "; give images"
            )
            raise UserError(f"{path} has no {name}{what} or a file of --reference_out")
    mean, covariance = (
        _matrix(archive, name, width, path, rank).double() for name, rank in ((mean_name, 1), (covariance_name, 2))
    )
    if len(covariance) != width:
        raise UserError(f"{covariance_name} of {path} is {list(covariance.shape)}, not [{width}, {width}]")
    return Moments(mean, covariance, count)


def _matrix(archive: zipfile.ZipFile, name: str, width: int, path: Path, rank: int = 2) -> Tensor:
    """An array of floats whose last dimension is `width`. UserError for another."""
    most = 8 * _WIDEST * max(_WIDEST, KEPT) + (1 << 12)
    shape, dtype = npz_header(archive, name, most)
    if len(shape) != rank or shape[-1] != width or dtype.kind != "f":
        raise UserError(
            f"{name} of {path} is {dtype} {list(shape)}, and the network has {width} features: the statistics are of "
            "another network"
        )
    values = torch.from_numpy(np.ascontiguousarray(read_npz_array(archive, name, most)))
    if not values.isfinite().all():
        raise UserError(f"{name} of {path} has values that are not finite")
    return values
