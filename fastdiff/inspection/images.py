"""Describes images: a folder or zip of pictures, one picture, an npz, a packed folder, and a sampling job's folder."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.diffusion.settings import DiffusionSettings
from fastdiff.errors import UserError, one_line
from fastdiff.evaluation.picture_sets import Pictures, ZippedPictures
from fastdiff.images.cache.format import PIXELS, open_packed_at_its_size
from fastdiff.images.image_files import open_file
from fastdiff.images.labels import NoClasses, index_images
from fastdiff.images.listing import Listing
from fastdiff.images.pixels import read_header
from fastdiff.images.unreadable import what_is_wrong
from fastdiff.inspection.description import Description, command
from fastdiff.models import SuperResSettings, UNetSettings
from fastdiff.runtime.files import files_in, read_json
from fastdiff.runtime.untrusted import npz_array_header, read_npz_array
from fastdiff.sampling.job.chunks import Piece, cover, range_of
from fastdiff.sampling.job.manifest import Manifest
from fastdiff.sampling.job.results import images_of_job
from fastdiff.settings import Settings, validated

_LOOKED_AT = 100
"""Pictures of a folder whose sizes are read."""
_SMALL = 1 << 28
"""Bytes that an array beside the images of an npz may have."""
_SMALL_MULTS = ("1,2,2", "1,2", "1")
"""channel_mult of networks for small images of sizes without a default, the first that fits."""
PREPARED = 64
"""Pixels to which the suggested command prepares a folder of large pictures."""


def describe_pictures(folder: Path) -> Description:
    """A folder of pictures. Raises UserError where there are none."""
    found = Description(folder, "folder of images")
    try:
        listing = index_images(folder, "auto")
    except NoClasses:
        listing = index_images(folder, "none")
    except UserError as error:
        listing = index_images(folder, "none")
        found.notes.append(f"classes: {error}")
    looked_at = _spread(listing.names)
    pictures = Pictures(folder, looked_at, None)
    lengths = [(folder / name).stat().st_size for name in looked_at]
    sizes, channels, about = _sizes(pictures, found.notes)
    found.facts = {
        **_counted(len(listing.names), listing),
        **about,
        "bytes": round(sum(lengths) / len(lengths) * len(listing.names)),
        "labels_from": listing.labels_from,
    }
    if len(looked_at) < len(listing.names):
        found.notes.append(f"sizes and bytes are those of {len(looked_at)} of the images")
    record = folder / ".preparation.json"
    if record.is_file():
        with suppress(UserError):
            found.facts["prepared_by"] = str(read_json(record).get("made_by", ""))
    found.next = _train(folder, sizes[0], listing.class_names, channels) if len(sizes) == 1 else ""
    if not found.next:
        out = folder.absolute().with_name(f"{folder.absolute().name}_{PREPARED}")
        found.next = command("prepare folder", source=folder, out=out, size=PREPARED)
    return found


def describe_picture(file: Path) -> Description:
    """A single picture. Raises UserError for a damaged one."""
    try:
        with open_file(file) as opened:
            header = read_header(opened)
    except Exception as error:  # Pillow raises many types
        raise UserError(f"{file} is a picture that can't be read ({what_is_wrong(error)})") from None
    height, width = header.size_hw
    found = Description(file, "picture")
    found.facts = {"images": f"{height}x{width}x{1 if header.is_gray else 3}", "bytes": file.stat().st_size}
    found.next = command("super-res-sample", model_path="MODEL", base_samples=file)
    return found


def describe_zip(file: Path) -> Description:
    """A zip of pictures. Raises UserError where it holds none."""
    pictures = ZippedPictures(file, None)
    names = pictures.listing.names
    found = Description(file, "zip of images")
    looked_at = _spread(names)
    pictures.listing = Listing(file, looked_at, np.zeros(len(looked_at), dtype=np.int64), [])
    found.facts = {"count": len(names), **_sizes(pictures, found.notes)[2], "bytes": file.stat().st_size}
    if len(looked_at) < len(names):
        found.notes.append(f"sizes are those of {len(looked_at)} of the images")
    found.next = command("evaluate", samples=file, reference="REFERENCE")
    return found


def describe_samples(file: Path, archive: zipfile.ZipFile) -> Description:
    """An npz with images in arr_0."""
    header = npz_array_header(archive, "arr_0")
    names = {name.removesuffix(".npy") for name in archive.namelist()}
    count, *shape = header.shape
    found = Description(file, "samples")
    class_names: list[str] = []
    if "class_names" in names:
        class_names = [one_line(str(name)) for name in read_npz_array(archive, "class_names", _SMALL)]
    labels = np.unique(read_npz_array(archive, "arr_1", _SMALL)) if "arr_1" in names else np.array([])
    found.facts = {
        "count": count,
        "images": "x".join(map(str, shape)),
        "classes": len(labels) or None,
        "class_names": [class_names[label] for label in labels if 0 <= label < len(class_names)],
        "seed": int(read_npz_array(archive, "seed", _SMALL)) if "seed" in names else None,
        "bytes": file.stat().st_size,
    }
    found.next = command("evaluate", samples=file, reference="REFERENCE")
    return found


def describe_packed(folder: Path) -> Description:
    """A packed folder."""
    packed = open_packed_at_its_size(folder)
    class_names = [str(name) for name in packed.record["class_names"]]
    count, height, width, channels = packed.pixels.shape
    found = Description(folder, "packed images")
    found.facts = {
        "count": count,
        "images": f"{height}x{width}x{channels}",
        "classes": len(class_names) or None,
        "class_names": class_names,
        "labels_from": packed.record.get("labels_from"),
        "unreadable": len(packed.unreadable) or None,
        "bytes": (folder / PIXELS).stat().st_size,
    }
    found.next = _train(folder, (height, width), class_names, channels)
    return found


def describe_job(folder: Path, manifest: Manifest) -> Description:
    """A sampling job's folder."""
    merged = images_of_job(folder, ".npz", ".zip")
    pieces = [Piece(Path(name), drawn, drawn) for name in files_in(folder / "parts") if (drawn := range_of(name))]
    most = max((piece.holds.stop for piece in pieces), default=0)
    in_parts = sum(piece.used.stop - piece.used.start for piece in cover(pieces, most)[0])
    identity = manifest["identity"]
    found = Description(folder, "sampling job", settings=_settings_of_job(identity))
    shown = {name for settings in found.settings.values() for name in type(settings).model_fields}
    found.facts = {
        "state": "done" if merged else "unfinished",
        "drawn": _drawn(merged) if merged else in_parts,
        "images": "x".join(map(str, manifest["shape"])),
        "class_names": manifest.get("class_names", []),
        "seed": manifest["seed"],
        "checkpoint": identity.get("model_path"),
        "drawn_with": {name: value for name, value in identity.items() if name not in shown | {"model_path", "seed"}},
        "files": sorted(name for name in files_in(folder) if name.startswith("samples_")),
    }
    if merged:
        found.next = command("evaluate", samples=folder, reference="REFERENCE")
    else:
        found.notes.append("the command that began the job goes on with it")
    return found


def _drawn(merged: Path) -> int:
    """The number of images in a merged file, by its name, or in a folder of pictures."""
    return int(merged.name.split("_")[1].split("x")[0]) if merged.is_file() else len(files_in(merged))


def _settings_of_job(identity: dict[str, Any]) -> dict[str, Settings]:
    """The settings of the network and the diffusion process that a manifest holds."""
    model: type[Settings] = SuperResSettings if "large_size" in identity else UNetSettings
    kinds: dict[str, type[Settings]] = {"model": model, "diffusion": DiffusionSettings}
    found: dict[str, Settings] = {}
    for section, kind in kinds.items():
        with suppress(UserError):
            found[section] = validated(kind, {name: identity[name] for name in kind.model_fields if name in identity})
    return found


def _spread(names: Sequence[str]) -> list[str]:
    """At most _LOOKED_AT of the names, spread evenly."""
    return [names[int(i)] for i in np.linspace(0, len(names) - 1, min(len(names), _LOOKED_AT))]


def _sizes(pictures: Pictures, notes: list[str]) -> tuple[list[tuple[int, int]], int, dict[str, Any]]:
    """The sizes (height, width) of pictures from small to large, their channels, and facts about their pixels."""
    try:
        headers = pictures.headers()
    except UserError as error:
        notes.append(str(error))
        return [], 3, {}
    sizes = sorted({header.size_hw for header in headers}, key=lambda size: size[0] * size[1])
    channels = 1 if all(header.is_gray for header in headers) else 3
    first, last = ("x".join(map(str, size)) for size in (sizes[0], sizes[-1]))
    return (
        sizes,
        channels,
        {
            "images": f"{first}x{channels}" if len(sizes) == 1 else f"{first} to {last}, of several sizes",
            "lossy": sorted({header.lossy for header in headers} - {""}),
        },
    )


def _counted(count: int, listing: Listing) -> dict[str, Any]:
    return {"count": count, "classes": len(listing.class_names) or None, "class_names": listing.class_names}


def _train(folder: Path, size: tuple[int, int], class_names: list[str], channels: int) -> str:
    """The command that trains on images of this size; empty where they are large and of none for which there is a
    default network."""
    shown = size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"
    flags: dict[str, Any] = {"data_dir": folder, "image_size": shown}
    flags |= {"in_channels": channels} if channels != 3 else {}
    flags |= {"class_cond": True, "num_classes": len(class_names)} if len(class_names) > 1 else {}
    for more in ({}, *({"channel_mult": mult} for mult in _SMALL_MULTS if max(size) < PREPARED)):
        with suppress(UserError):
            validated(UNetSettings, {"image_size": shown, **more})
            return command("train", **flags, **more)
    return ""
